"""Modules over the ops: parameters, reshapes and op calls.

MMATE       the block that replaces an attention layer: FlexMA and LocalSwin, mixed
FlexMA      masked bidirectional scan
LocalSwin   window attention on visual tokens
GridAttention   an MMATE that takes the place of a vision transformer's attention, CLS token included
"""

from __future__ import annotations

from .config import EXACT, PAPER, MMATEConfig
from .flex_ma import FlexMA
from .grid_attention import GridAttention
from .local_swin import LocalSwin
from .mmate import MMATE
from .state import MMATEState
from .transfer import TransferRow

__all__ = [
    "EXACT",
    "MMATE",
    "PAPER",
    "FlexMA",
    "GridAttention",
    "LocalSwin",
    "MMATEConfig",
    "MMATEState",
    "TransferRow",
]
