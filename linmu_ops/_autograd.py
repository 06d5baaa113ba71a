"""Backward ops by differentiating the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(
    f: Callable[..., Any], inputs: Sequence[Any], wrt: Sequence[int], grad_outputs: Sequence[Tensor | None]
) -> list[Tensor]:
    """Contiguous gradients of `f(*inputs)` with respect to `inputs[i] for i in wrt`; empty where an input is None."""
    values = list(inputs)
    with torch.enable_grad():
        for i in wrt:
            values[i] = None if inputs[i] is None else inputs[i].detach().requires_grad_()
        out = f(*values)
        outputs = out if isinstance(out, tuple) else (out,)
        given = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None]
        leaves = [values[i] for i in wrt if values[i] is not None]
        found = iter(torch.autograd.grad([o for o, _ in given], leaves, [g for _, g in given], allow_unused=True))
    grads = []
    for i in wrt:
        grad = None if inputs[i] is None else next(found)
        if grad is None:
            grad = inputs[wrt[0]].new_empty(0) if inputs[i] is None else torch.zeros_like(inputs[i])
        grads.append(grad.contiguous())
    return grads


def fakes(inputs: Sequence[Any], wrt: Sequence[int]) -> list[Tensor]:
    """What `gradients` returns, without values."""
    return [
        inputs[wrt[0]].new_empty(0)
        if inputs[i] is None
        else torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
        for i in wrt
    ]
