"""What a layer remembers between calls. Its size does not depend on the length of the context."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _transforms

STEPS = 16  # tokens of a call that go on from a state one by one, bit for bit as in so many calls


class MMATEState(NamedTuple):
    """Decode state of one block. A field is None where the option that it serves is off.

    Attributes:
        ssm: (B, H, P, N) float32 (float64 for a float64 model). State of the forward scan. In `ExactMMATE` P is the
            head size plus 1, for the sum of the weights, and N is `feature_dim`; with far="delta" it is
            (B, H, N, P), and P the head size.
        keys, values: (B, G, n, P). Keys are rotated. In `MMATE` the last w = `text_window` tokens; token i is at i % w:
            a step writes one place and moves nothing. In `ExactMMATE` first come the sinks, then the last w + c tokens,
            of which c = min(w, 64) leave at a time, then those that are kept, in order, the last one at the end.
        steps: (B, G, n, H / G) float32 (float64 for a float64 model). In `ExactMMATE`, step sizes of the last w + c
            tokens and of those that are kept.
        sinks: (B, s) bool. True at those of the first s tokens that are text and have come.
        seen: (B,) int64. Number of tokens so far. Counted with a `text_window` alone.

    After a call that cuts a video, `ExactMMATE` has two places in mind. The fields above are of the row's tokens before
    the slab that is cut (see `ExactMMATE`); those below are the n tokens since then. None after any other call.

        slab_keys, slab_values: (B, G, n, P). Keys are rotated.
        slab_steps: (B, G, n, H / G), as `steps`.
        slab_tokens: (B, n) int64. Number of a visual token in its image or video; -1: text; -2: no token.
        slab_text: (B, k) int64. Which of the n are text; -1: none is.
    """

    ssm: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    steps: Tensor | None = None
    sinks: Tensor | None = None
    seen: Tensor | None = None
    slab_keys: Tensor | None = None
    slab_values: Tensor | None = None
    slab_steps: Tensor | None = None
    slab_tokens: Tensor | None = None
    slab_text: Tensor | None = None

    @property
    def slab(self) -> dict[str, Tensor | None]:
        """The fields of the slab that is cut, whose sizes differ from call to call."""
        return {name: value for name, value in self._asdict().items() if name.startswith("slab_")}

    def without_slab(self) -> MMATEState:
        """The fields whose sizes do not change."""
        return self if self.slab_keys is None else self._replace(**dict.fromkeys(self.slab))

    def map(self, rows: Callable[[Tensor], Tensor]) -> MMATEState:
        """A new state, of `rows` of each tensor."""
        return MMATEState(*(None if t is None else rows(t) for t in self))

    def reorder(self, index: Tensor) -> MMATEState:
        """A new state of the rows `index` (int64), as beam search needs it."""
        return self.map(lambda t: t.index_select(0, index))

    def repeat(self, n: int) -> MMATEState:
        """A new state in which each row stands n times, one after the other."""
        return self.map(lambda t: t.repeat_interleave(n, dim=0))

    def copy_(self, other: MMATEState) -> MMATEState:
        """Overwrite this state in place, keeping the addresses of its tensors; of a slab that is cut, a new state has
        the other's."""
        for mine, new in zip(self.without_slab(), other, strict=True):
            if mine is not None and new is not None and mine is not new:
                mine.copy_(new)
        return self if self.slab_keys is other.slab_keys else self._replace(**other.slab)


def activations(block: nn.Module, projection: nn.Module) -> tuple[torch.dtype, torch.device]:
    """dtype and device of what a block computes, whatever holds its weights.

    These may be quantised (bitsandbytes, torchao), elsewhere between calls (accelerate), sharded and cast for a call
    (FSDP2), or wrapped (LoRA, parametrizations). projection: the map that plain weights are read off.
    """
    weight = getattr(projection, "weight", None)
    policies = (_mixed_precision(module) for module in (block, *block.children(), projection))
    widths = [p.dtype for p in block.parameters() if _is_wide(p.dtype)]
    known = (*policies, getattr(getattr(weight, "quant_state", None), "dtype", None), getattr(weight, "dtype", None))
    # Some parameters of a half precision model are float32; all of those of a float32 model are.
    narrowest = min(widths, key=lambda dtype: dtype.itemsize, default=torch.get_default_dtype())
    dtype = next((d for d in known if d is not None and _is_wide(d)), narrowest)
    placed = [p.device for p in (weight, *block.parameters()) if isinstance(p, Tensor) and p.device.type != "meta"]
    wanted = [*_execution_devices(block), *placed, torch.device("meta" if widths else "cpu")]
    return dtype, wanted[0]


def _is_wide(dtype: torch.dtype) -> bool:
    """Whether activations may be of it: floating, and not one of 8 bits or fewer, which only weights are."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _mixed_precision(module: nn.Module) -> torch.dtype | None:
    state = getattr(module, "_get_fsdp_state", None)
    return None if state is None else getattr(getattr(state(), "_mp_policy", None), "param_dtype", None)


def _execution_devices(block: nn.Module) -> list[torch.device]:
    """Where accelerate's hooks run a block whose weights they bring."""
    hooks = [getattr(module, "_hf_hook", None) for module in block.modules()]
    every = [h for hook in hooks for h in (getattr(hook, "hooks", None) or [hook])]
    devices = (getattr(hook, "execution_device", None) for hook in every)
    return [torch.device(device) for device in devices if device is not None]


def check_state(op: str, state: MMATEState, batch: int, kept: int) -> None:
    """Before anything of a state is written, find out whether it is of this module and of so many rows.

    kept: tokens whose keys it has, if it has any.
    """
    for name, tensor in zip(state._fields, state, strict=True):
        if tensor is not None and tensor.shape[0] != batch:
            raise ValueError(f"{op}: state.{name} must have B={batch} rows, got {tensor.shape[0]}")
        kind = "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
        if name.removeprefix("slab_") in ("keys", "values") and tensor is not None and not _is_wide(tensor.dtype):
            raise TypeError(f"{op}: state.{name} must be float64, float32, bfloat16 or float16, got {kind}")
        if (
            name.removeprefix("slab_") in ("ssm", "steps")
            and tensor is not None
            and tensor.dtype not in (torch.float32, torch.float64)
        ):
            raise TypeError(
                f"{op}: state.{name} must be float32 or float64, as it is under FSDP2 with "
                f"MixedPrecisionPolicy(cast_forward_inputs=False), got {kind}"
            )
        if tensor is not None and not name.startswith("slab_") and _is_expanded(tensor) and written_in_place():
            raise ValueError(
                f"{op}: state.{name} must be in memory of its own, as it is written to, got strides {tensor.stride()}; "
                "state.repeat(n) makes n rows of each"
            )
    if state.keys is not None and state.keys.shape[2] != kept:
        raise ValueError(f"{op}: state.keys must be of {kept} tokens, as the options say, got {state.keys.shape[2]}")


def _is_expanded(t: Tensor) -> bool:
    """Whether several elements are kept once."""
    if torch.compiler.is_compiling() or t.is_contiguous():
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def _in_function() -> bool:
    """Whether this is the forward of a `torch.autograd.Function`, as that of a reentrant checkpoint.

    Autograd turns gradients off there, and forward-mode AD, which no_grad leaves on.
    """
    return not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def in_checkpoint() -> bool:
    """Whether this forward may be one of two: under a reentrant checkpoint, or run again during a backward pass."""
    return not torch.compiler.is_compiling() and (_in_function() or torch._C._current_graph_task_id() != -1)


def written_in_place() -> bool:
    """Whether a state that is given is overwritten: gradients are off, and it was the caller who put them off."""
    return not torch.is_grad_enabled() and (torch.compiler.is_compiling() or not _in_function())


def continue_state(state: MMATEState | None, new: MMATEState) -> MMATEState:
    """What a call leaves behind: the state it was given, overwritten, or a new one; see `written_in_place`."""
    return state.copy_(new) if state is not None and written_in_place() else new


def on_host(t: Tensor) -> bool:
    """Whether Python may look at the values of t: without waiting for a device, and where these are values at all, not
    those of a graph, of a mode that has shapes alone, or of a transform, for which there may be several."""
    if type(t) is not Tensor or t.device.type != "cpu" or torch.compiler.is_compiling() or _transforms.active():
        return False
    kinds = torch._C._TorchDispatchModeKey
    return all(torch._C._get_dispatch_mode(kind) is None for kind in (kinds.FAKE, kinds.PROXY))
