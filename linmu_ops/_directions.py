"""What each direction of a scan scans with."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._dims import FLOATS, Dims, check_size

DIRECTIONS = ("forward", "reverse", "both")
Own = TypeVar("Own", bound=tuple[Any, ...])


class Reverse(NamedTuple):
    """What the reverse direction of `ssd_scan` has of its own. What it leaves out (None) is the forward direction's.

    Args:
        dt: (B, L, H) float. Step size; gets the same softplus as the forward one.
        A: (H,) float, <= 0 (not checked). Decay rate.
        B: (B, L, Gb, N) dtype of x. Input projection.
        C: (B, L, Gc, N) dtype of x. Output projection.
        dt_bias: (H,) float. Added to dt before softplus.
        mask: (B, L) bool. Tokens that take part in the reverse scan, True where they do; all if None.
        seq_idx: (B, L) int32. Segments of the reverse scan; those of the forward one if None.
    """

    dt: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    C: Tensor | None = None
    dt_bias: Tensor | None = None
    mask: Tensor | None = None
    seq_idx: Tensor | None = None


class Direction(NamedTuple):
    """What one direction scans with; the fields are those of `Reverse`, and of SsdScanDirection in csrc."""

    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None
    mask: Tensor | None
    seq_idx: Tensor | None


class DeltaReverse(NamedTuple):
    """What the reverse direction of `gated_delta_scan` has of its own. What it leaves out (None) is the forward one's.

    Args:
        q: (B, L, Gq, K) dtype of q. Query; scaled, and normalised, as the forward one.
        k: (B, L, Gk, K) dtype of q. Key; normalised as the forward one.
        g: (B, L, H) float, <= 0. Log of the decay.
        beta: (B, L, H) float in [0, 1]. Share of what is stored under the key that is replaced.
        mask: (B, L) bool. Tokens that take part in the reverse scan, True where they do; all if None.
        seq_idx: (B, L) int32. Segments of the reverse scan; those of the forward one if None.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    g: Tensor | None = None
    beta: Tensor | None = None
    mask: Tensor | None = None
    seq_idx: Tensor | None = None


class DeltaDirection(NamedTuple):
    """What one direction scans with; the fields are those of `DeltaReverse`."""

    q: Tensor
    k: Tensor
    g: Tensor
    beta: Tensor
    mask: Tensor | None
    seq_idx: Tensor | None


Way = TypeVar("Way", Direction, DeltaDirection)


def with_own(forward: Way, own: Reverse | DeltaReverse) -> Way:
    """The reverse direction beside a forward one."""
    chosen = [f if r is None else r for f, r in zip(forward, own, strict=True)]
    return type(forward)(*chosen)  # type: ignore[arg-type]  # what is None has a forward one


def check_directions(op: str, direction: str, reverse: Own | None, kind: type[Own], gate: Tensor | None) -> Own:
    """Raise unless reverse, of that kind, and gate go with the direction; what the reverse direction has of its own."""
    if direction not in DIRECTIONS:
        raise ValueError(f"{op}: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if reverse is not None and not isinstance(reverse, kind):
        raise TypeError(f"{op}: reverse must be a linmu_ops.{kind.__name__}, got {type(reverse).__name__}")
    if reverse is not None and direction == "forward":
        raise ValueError(f"{op}: reverse needs direction='reverse' or 'both', got direction='forward'")
    if gate is not None and direction != "both":
        raise ValueError(f"{op}: gate needs direction='both', got direction={direction!r}")
    return kind() if reverse is None else reverse


def check_visits(
    d: Dims, own: Reverse | DeltaReverse, gate: Tensor | None, seq_idx: Tensor | None, token_order: Tensor | None
) -> None:
    """Raise unless what says how tokens are visited, and how directions are mixed, has the shapes of a scan."""
    d.optional("reverse.mask", own.mask, "B L", torch.bool)
    d.optional("reverse.seq_idx", own.seq_idx, "B L", torch.int32)
    d.optional("gate", gate, "H" if isinstance(gate, Tensor) and gate.dim() == 1 else "B L H", FLOATS)
    d.optional("seq_idx", seq_idx, "B L", torch.int32)
    d.optional("token_order", token_order, "B L", torch.int32)


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    if chunk_size is not None:
        check_size(op, "chunk_size", chunk_size)
