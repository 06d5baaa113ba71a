"""Definition of `linmu_ops.gated_delta_step`: one visit of the scan, in place on the state."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dims import accumulate_dtype
from .gated_delta_scan import delta_step, l2norm


def gated_delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    use_qk_l2norm_in_kernel: bool,
) -> Tensor:  # fmt: skip
    acc = accumulate_dtype(q.dtype)
    heads = g.shape[1]
    q_, k_, v_ = (t.to(acc).repeat_interleave(heads // t.shape[1], dim=1) for t in (q, k, v))  # (B, H, .)
    if use_qk_l2norm_in_kernel:
        q_, k_ = l2norm(q_), l2norm(k_)
    moved, y = delta_step(state, scale * q_, k_, v_, torch.exp(g), beta)
    state.copy_(moved)
    return y.to(q.dtype)
