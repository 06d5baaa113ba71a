"""What a layer remembers between calls: constant in size, whatever the length of the context."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MMATEState(NamedTuple):
    """Decode state of one `MMATE` layer. Fields are None where the option they serve is off.

    Attributes:
        ssm: (B, H, P, N) float32 (float64 for a float64 model). State of the forward scan; with a normaliser of P + 8,
            with `feature_dim` of that N.
        conv: (B, K - 1, channels). The last inputs of the convolution, oldest first.
        keys, values: (B, G, s + w, P), keys rotated. The first s tokens of the row, then the last w of `text_window`,
            token i at s + i % w, so that a step writes one place and moves nothing.
        sinks: (B, s) bool. Which of the first s are text, and have come.
        seen: (B,) int64. Tokens so far, with `text_window` or `mix="softmax"`.
    """

    ssm: Tensor | None = None
    conv: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    sinks: Tensor | None = None
    seen: Tensor | None = None

    def reorder(self, index: Tensor) -> MMATEState:
        """The rows `index` (int64) of every tensor, as a new state (beam search)."""
        return MMATEState(*(None if t is None else t.index_select(0, index) for t in self))

    def repeat(self, n: int) -> MMATEState:
        """Each row n times in a row, as a new state."""
        return MMATEState(*(None if t is None else t.repeat_interleave(n, dim=0) for t in self))

    def copy_(self, other: MMATEState) -> MMATEState:
        """Overwrite this state in place, keeping the addresses of its tensors."""
        for mine, new in zip(self, other, strict=True):
            if mine is not None and new is not None and mine is not new:
                mine.copy_(new)
        return self


def check_state(op: str, state: MMATEState, batch: int, kept: int) -> None:
    """Before anything of a state is written, find out whether it is of this module and of so many rows.

    kept: tokens whose keys it has, if it has any.
    """
    for name, tensor in zip(state._fields, state, strict=True):
        if tensor is not None and tensor.shape[0] != batch:
            raise ValueError(f"{op}: state.{name} must have B={batch} rows, got {tensor.shape[0]}")
    if state.keys is not None and state.keys.shape[2] != kept:
        raise ValueError(
            f"{op}: state.keys must be of sink_tokens + text_window = {kept} tokens, got {state.keys.shape[2]}"
        )


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
