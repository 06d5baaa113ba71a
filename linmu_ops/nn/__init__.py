"""Modules made of the ops. A module holds parameters, reshapes tensors and calls ops.

MMATE           the paper's block; it takes the place of an attention layer
ExactMMATE      exact near a token, linear far from it; for the decoder of a pretrained model
GridAttention   puts a block in the place of a vision transformer's attention, CLS token included
Scan, Windows   the parts of `MMATE`; those of `ExactMMATE` are FarAttention and NearAttention
"""

from __future__ import annotations

from .block import Block
from .config import EXACT, LITERAL, PAPER, PRESETS, ExactConfig, MMATEConfig
from .exact import ExactMMATE
from .grid_attention import GridAttention
from .mmate import MMATE
from .scan import Scan
from .shape import AttentionShape
from .state import MMATEState
from .transfer import TransferRow
from .windows import Windows

__all__ = [
    "EXACT",
    "LITERAL",
    "MMATE",
    "PAPER",
    "PRESETS",
    "AttentionShape",
    "Block",
    "ExactConfig",
    "ExactMMATE",
    "GridAttention",
    "MMATEConfig",
    "MMATEState",
    "Scan",
    "TransferRow",
    "Windows",
]
