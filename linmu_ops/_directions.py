"""What each direction of a scan scans with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Reverse(NamedTuple):
    """What the reverse direction of `ssd_scan` has of its own. What it leaves out (None) is the forward direction's.

    Args:
        dt: (B, L, H) float. Step size; gets the same softplus as the forward one.
        A: (H,) float, <= 0. Decay rate.
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

    def with_own(self, own: Reverse) -> Direction:
        """The reverse direction beside this forward one."""
        chosen = [f if r is None else r for f, r in zip(self, own, strict=True)]
        return Direction(*chosen)  # type: ignore[arg-type]  # what is None has a forward one


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

    def with_own(self, own: DeltaReverse) -> DeltaDirection:
        """The reverse direction beside this forward one."""
        chosen = [f if r is None else r for f, r in zip(self, own, strict=True)]
        return DeltaDirection(*chosen)  # type: ignore[arg-type]  # what is None has a forward one
