"""Definition of `linmu_ops.branch_mix_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dims import accumulate_dtype


def branch_mix_norm(
    a: Tensor, b: Tensor, mix: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: str,
    eps: float,
) -> Tensor:  # fmt: skip
    acc = accumulate_dtype(a.dtype)
    m, other = a.to(acc), b.to(acc)
    lam = mix.to(acc)[..., None] if mix.dim() == 2 else mix.to(acc)
    if mask is None:
        m = lam * m + (1 - lam) * other
    else:
        on = mask[..., None]
        # Neither b nor mix is looked at where the mask is off, NaN or not, and mix gets no gradient from there.
        lam, other, seen = torch.where(on, lam, 1.0), torch.where(on, other, 0.0), torch.where(on, m, 0.0)
        m = torch.where(on, lam * seen + (1 - lam) * other, m)
    if norm == "layer":
        m = m - m.mean(-1, keepdim=True)
    if norm != "none":
        m = m * torch.rsqrt(m.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        m = m * weight.to(acc)
    if bias is not None:
        m = m + bias.to(acc)
    return m.to(a.dtype).contiguous()
