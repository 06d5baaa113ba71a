"""Ops over rows that are split over ranks: each rank holds a part of every row, and of every layer's activations.

`ContextParallel` says how rows are split, and moves slabs. `ssd_scan`, `causal_conv1d` and `window_attention` are the
ops of these names, of whole rows, given and giving slabs.
"""

from __future__ import annotations

from ._context import ContextParallel, MovedOrder
from ._layout import SlabLayout
from .causal_conv1d import causal_conv1d
from .ssd_scan import ssd_scan
from .window_attention import window_attention

__all__ = ["ContextParallel", "MovedOrder", "SlabLayout", "causal_conv1d", "ssd_scan", "window_attention"]
