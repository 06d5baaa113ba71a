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


def continue_state(state: MMATEState | None, new: MMATEState) -> MMATEState:
    """What a call leaves behind: with gradients off, the state it was given, overwritten in place."""
    return new if state is None or torch.is_grad_enabled() else state.copy_(new)
