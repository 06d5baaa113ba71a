"""Visiting orders and segments, shared by the references of ops that walk along the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

# A mass below it is no mass: float32 could not hold what is divided by it, nor the gradient.
LEAST_MASS = 2.0**-100


def visiting_order(op: str, token_order: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(order, inverse), both int64 (B, L): the position visited at t, and the visit of each position."""
    batch, length = like.shape[:2]
    in_place = torch.arange(length, device=like.device).expand(batch, length)
    if token_order is None:
        return in_place, in_place
    order = token_order.long()
    if not torch.equal(order.sort(1).values, in_place):
        raise ValueError(f"{op}: token_order must hold every position 0..L-1 once per row")
    return order, order.argsort(1)


def visited(t: Tensor, order: Tensor) -> Tensor:
    """t[b, order[b, i]] for (B, L, ...) t."""
    return torch.gather(t, 1, order.view(*order.shape, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:]))


def restarts(index: Tensor | None, like: Tensor) -> Tensor:
    """True at visits whose segment differs from the visit before: (B, L) bool."""
    out = torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
    if index is not None:
        out[:, 1:] = index[:, 1:] != index[:, :-1]
    return out


def by_head(t: Tensor, heads: int) -> Tensor:
    """(B, L, G, .) -> (B, L, H, .)."""
    return t.repeat_interleave(heads // t.shape[2], dim=2)


def both_directions(y: Tensor, r: Tensor, gate: Tensor | None, mask: Tensor | None, order: Tensor) -> Tensor:
    """y, of the forward direction, and r, of the reverse one, (B, L, H, .) in visiting order, together: their sum
    without a gate, else g y + (1 - g) r where the mask is True, and y elsewhere. gate and mask are in positions."""
    if gate is None:
        return y + r
    g = (gate.to(y.dtype).expand(y.shape[:3]) if gate.dim() == 1 else visited(gate.to(y.dtype), order))[..., None]
    everywhere = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
    on = (everywhere if mask is None else visited(mask, order))[..., None, None]
    blend = torch.where(on, g, 1.0) * torch.where(on, y, 0.0) + (1 - torch.where(on, g, 1.0)) * r
    return torch.where(on, blend, y)


def normalized(sums: Tensor) -> tuple[Tensor, Tensor]:
    """(..., P + 1), weighted sums of x and last of ones: the mean of x, (..., P), and its mass, (...)."""
    mass = sums[..., -1]
    empty = mass < LEAST_MASS
    mean = sums[..., :-1] / torch.where(empty, 1.0, mass)[..., None]
    return torch.where(empty[..., None], 0.0, mean), torch.where(empty, 0.0, mass)
