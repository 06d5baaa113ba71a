"""Definition of `linmu_ops.near_attention`: gather what each token sees, softmax(scale q k^T) v."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dims import accumulate_dtype

QUERIES = 256  # at a time


def _check(total: int, low: Tensor, high: Tensor, which: Tensor, listed: Tensor) -> None:
    bounds = dict(low=(low, 0, total), high=(high, 0, total), which=(which, -1, len(listed) - 1))
    for name, (t, least, most) in (bounds | dict(listed=(listed, -1, total - 1))).items():
        wrong = t[(t < least) | (t > most)]
        if len(wrong):
            raise ValueError(f"near_attention: {name} must be in {least}..{most}, got {int(wrong[0])}")


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (I, r, P), k and v (I, J, P), seen (I, J): y (I, r, P) and lse (I, r); 0 and -inf of a token that sees nothing.

    What is not seen is 0: its weight of 0 would not hide what is not finite.
    """
    k, v = (torch.where(seen[..., None], t, 0.0) for t in (k, v))
    scores = (torch.einsum("irp,ijp->irj", q, k) * scale).masked_fill(~seen[:, None], -math.inf)
    nothing = ~seen.any(1)[:, None]
    weights = scores.masked_fill(nothing[..., None], 0.0).softmax(-1).masked_fill(~seen[:, None], 0.0)
    lse = scores.masked_fill(nothing[..., None], 0.0).logsumexp(-1).masked_fill(nothing, -math.inf)
    return torch.einsum("irj,ijp->irp", weights, v), lse


def near_attention(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, which: Tensor, listed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    acc, total, groups = accumulate_dtype(q.dtype), k.shape[1], k.shape[2]
    _check(total, low, high, which, listed)
    tokens = torch.arange(q.shape[1], device=q.device)
    # A column of places for each, of which some are none: -1.
    none = listed.new_full((1, listed.shape[1]), -1)
    lists = torch.cat((listed, none)).long()[which.long()]  # (B, G, L, m)
    width = int((high - low).amax()) if low.numel() else 0
    place = low.long()[..., None] + torch.arange(max(width, 0), device=q.device)
    ranges = torch.where(place < high[..., None], place, -1)
    q_, k_, v_ = (t.to(acc) for t in (q.unflatten(2, (groups, q.shape[2] // groups)), k, v))
    ys, norms = [], []
    for b in range(q.shape[0]):
        for g in range(groups):
            for rows in tokens.split(QUERIES):
                places = torch.cat((lists[b, g, rows], ranges[b, rows]), 1)
                seen, places = (places >= 0) & (places <= total - q.shape[1] + rows[:, None]), places.clamp(min=0)
                y, lse = _attend(q_[b, rows, g], k_[b, :, g][places], v_[b, :, g][places], seen, scale)
                ys.append(y)
                norms.append(lse)

    def together(parts: list[Tensor], *shape: int) -> Tensor:
        """(B, L, H, ...) of parts in the order of rows, groups and tokens."""
        every = torch.cat(parts) if parts else q_.new_zeros(0)
        return every.reshape(*q_.shape[:1], groups, q_.shape[1], q_.shape[3], *shape).transpose(1, 2).flatten(2, 3)

    return together(ys, q.shape[3]).to(q.dtype), together(norms)
