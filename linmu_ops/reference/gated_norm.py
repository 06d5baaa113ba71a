"""Definition of `linmu_ops.gated_norm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dims import accumulate_dtype


def gated_norm(
    x: Tensor, z: Tensor, weight: Tensor | None, group_size: int, norm_before_gate: bool, eps: float
) -> Tensor:  # fmt: skip
    acc = accumulate_dtype(x.dtype)
    y, gate = x.to(acc), F.silu(z.to(acc))
    if not norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (y.shape[-1] // group_size, group_size))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * weight.to(acc)
    if norm_before_gate:
        y = y * gate
    return y.to(x.dtype).contiguous()
