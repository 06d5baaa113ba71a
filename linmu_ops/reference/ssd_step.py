"""Definition of `linmu_ops.ssd_step`: one visit of the scan, in place on the state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dims import accumulate_dtype
from ._visits import normalized


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = accumulate_dtype(x.dtype)
    if normalize:
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
    heads = dt.shape[1]
    x_, B_, C_ = (t.to(acc).repeat_interleave(heads // t.shape[1], dim=1) for t in (x, B, C))  # (B, H, .)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    state.mul_(torch.exp(dt * A)[..., None, None]).add_(torch.einsum("bh,bhp,bhn->bhpn", dt, x_, B_))
    y = torch.einsum("bhpn,bhn->bhp", state, C_)
    if D is not None:
        y = y + D[:, None] * x_
    y, mass = normalized(y) if normalize else (y, x.new_empty(0, dtype=acc))
    return y.to(x.dtype), mass.log()
