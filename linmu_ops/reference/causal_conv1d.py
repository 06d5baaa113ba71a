"""Definition of `linmu_ops.causal_conv1d`: one shifted product per tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dims import accumulate_dtype
from ._visits import restarts, visited, visiting_order


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, seq_idx: Tensor | None, token_order: Tensor | None,
    initial_state: Tensor | None, return_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = accumulate_dtype(x.dtype)
    batch, length, dim = x.shape
    before = weight.shape[1] - 1  # K - 1
    order, inverse = visiting_order("causal_conv1d", token_order, x)
    past = x.new_zeros(batch, before, dim) if initial_state is None else initial_state
    line = torch.cat([past, visited(x, order)], dim=1)  # (B, K-1+L, D), in visiting order
    index = None if seq_idx is None else visited(seq_idx, order)
    # The past belongs to the first segment, where there is one.
    segment = F.pad(restarts(index, x).cumsum(1), (before, 0), value=0 if initial_state is not None else -1)
    y = x.new_zeros(x.shape, dtype=acc) if bias is None else bias.to(acc).expand(x.shape)
    for j in range(before, -1, -1):
        start = before - j
        same = (segment[:, start : start + length] == segment[:, before:])[..., None]
        tap = torch.where(same, line[:, start : start + length].to(acc), 0.0)
        y = y + torch.where(same, weight[:, start].to(acc) * tap, 0.0)  # a tap that is cut gets no gradient, NaN or not
    y = visited(F.silu(y) if silu else y, inverse).to(x.dtype)
    if not return_final_state:
        return y, x.new_empty(0)
    last = torch.where((segment[:, length:] == segment[:, -1:])[..., None], line[:, length:], 0.0)
    return y, last.to(x.dtype).contiguous()
