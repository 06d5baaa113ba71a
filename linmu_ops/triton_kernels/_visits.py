"""Visiting order and segments, shared by the kernels that walk tokens in an order of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


def checked_order(op: str, token_order: Tensor | None) -> Tensor | None:
    """`token_order` as int64 indices.

    On the host a row that is no permutation raises. On a device that would make every call wait for it, so there the
    kernels clamp positions instead: a wrong order gives wrong numbers, never an access out of bounds.
    """
    if token_order is None:
        return None
    order = token_order.long()
    if order.device.type != "cpu":
        return order.clamp(0, max(order.shape[1] - 1, 0))
    if not bool((order.sort(1).values == torch.arange(order.shape[1], device=order.device)).all()):
        raise ValueError(f"{op}: token_order must hold every position 0..L-1 once per row")
    return order


def segment_ids(index: Tensor | None, order: Tensor | None, reverse: bool = False) -> Tensor | None:
    """Number of restarts before each visit, counted from where the scan starts: (B, L) int32."""
    if index is None:
        return None
    visited = index if order is None else index.gather(1, order)
    changes = F.pad((visited[:, 1:] != visited[:, :-1]).int(), (0, 1) if reverse else (1, 0))[:, : index.shape[1]]
    count = changes.flip(1).cumsum(1).flip(1) if reverse else changes.cumsum(1)
    return count.int().contiguous()


@triton.jit
def token_rows(order_ptr, b, t, valid, length, HAS_ORDER: tl.constexpr):
    """Rows of a (B L)-row matrix visited at t, as int64."""
    base = b.to(tl.int64) * length
    if HAS_ORDER:
        position = tl.load(order_ptr + base + t, mask=valid, other=0).to(tl.int64)
        return base + tl.minimum(tl.maximum(position, 0), length - 1)
    return base + t.to(tl.int64)
