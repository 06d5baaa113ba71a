"""What the gradients of ops share: a call kept for its gradient, and backward ops by differentiating the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Where autograd records, also within inference mode, which torch.func.grad does not end."""
    # Of the mode torch.func.grad leaves on what hides autograd's kernels, and no flag that tells.
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(values: Sequence[Any]) -> list[Any]:
    """Values of which, within `recording`, a graph can be made: tensors of inference mode cannot be kept for one."""
    return [v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in values]


def gradients(
    f: Callable[..., Any], inputs: Sequence[Any], wrt: Sequence[int], grad_outputs: Sequence[Tensor | None]
) -> list[Tensor]:
    """Contiguous gradients of `f(*inputs)` with respect to `inputs[i] for i in wrt`; empty where an input is None.

    Under a transform of torch.func they can be differentiated again.
    """
    at = [i for i in wrt if inputs[i] is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for i, value in zip(at, values, strict=True):
            full[i] = value
        out = f(*full)
        out = out if isinstance(out, tuple) else (out,)
        return tuple(o for o, g in zip(out, grad_outputs, strict=True) if g is not None)

    given: Sequence[Tensor] = tuple(g for g in grad_outputs if g is not None)
    if torch._C._are_functorch_transforms_active():
        _, pull = torch.func.vjp(outputs, *(inputs[i] for i in at))[:2]
        found = iter(pull(tuple(given)))
    else:
        # Not so here: PyTorch 2.13 crashes where a kernel that a dispatch mode called begins a transform.
        with recording():
            inputs, given = ordinary(inputs), ordinary(given)
            leaves = [inputs[i].detach().requires_grad_() for i in at]
            made = [(o, g) for o, g in zip(outputs(*leaves), given, strict=True) if o.requires_grad]
            grads = torch.autograd.grad([o for o, _ in made], leaves, [g for _, g in made], allow_unused=True)
        found = iter(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True))
    return [inputs[wrt[0]].new_empty(0) if inputs[i] is None else next(found).contiguous() for i in wrt]


def fakes(inputs: Sequence[Any], wrt: Sequence[int]) -> list[Tensor]:
    """What `gradients` returns, without values."""
    return [
        inputs[wrt[0]].new_empty(0)
        if inputs[i] is None
        else torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
        for i in wrt
    ]


def keep(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor] = ()) -> None:
    """Keep a call's arguments, and some of its outputs, for its gradient; `kept` gives them back."""
    ctx.save_for_backward(*outputs, *(v for v in inputs if isinstance(v, Tensor)))
    ctx.consts = [None if isinstance(v, Tensor) else (v,) for v in inputs]
    ctx.set_materialize_grads(False)


def kept(ctx: Any) -> tuple[list[Tensor], list[Any]]:
    """The outputs and the arguments that `keep` was given."""
    tensors, num_inputs = list(ctx.saved_tensors), ctx.consts.count(None)
    outputs, saved = tensors[: len(tensors) - num_inputs], iter(tensors[len(tensors) - num_inputs :])
    return outputs, [next(saved) if c is None else c[0] for c in ctx.consts]


def in_places(grads: Sequence[Tensor], wrt: Sequence[int], inputs: Sequence[Any]) -> list[Tensor | None]:
    """For each of `inputs` its gradient, given those of `inputs[i] for i in wrt`; None where an input is None."""
    found: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(wrt, grads, strict=True):
        found[i] = None if inputs[i] is None else grad
    return found
