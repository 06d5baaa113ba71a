"""Definition of `linmu_ops.causal_conv1d_step`: one visit of the convolution, in place on the state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dims import accumulate_dtype


def causal_conv1d_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    line = torch.cat([state, x[:, None]], dim=1)  # (B, n+1, D), oldest first
    seen = line[:, line.shape[1] - weight.shape[1] :]
    y = (seen.to(accumulate_dtype(x.dtype)) * weight.t()).sum(1)
    if bias is not None:
        y = y + bias
    state.copy_(line[:, 1:])
    return (F.silu(y) if silu else y).to(x.dtype)
