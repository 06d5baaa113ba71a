"""Modules over the ops: parameters, reshapes and op calls.

MMATE           the paper's block in the place of an attention layer
ExactMMATE      near exact, far linear: the block that a pretrained causal decoder becomes
GridAttention   a block in the place of a vision transformer's attention, CLS token included
Scan, Windows   their parts
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
