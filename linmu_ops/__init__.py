"""Linear-attention ops for PyTorch, and the blocks made of them.

Ops         `ssd_scan`, `ssd_step`, `exact_step`, `gated_delta_scan`, `gated_delta_step`, `window_attention`,
            `near_attention`, `far_attention`, `causal_conv1d`, `causal_conv1d_step`, `branch_mix_norm`, `gated_norm`
Blocks      `MMATE`, `ExactMMATE`: they take the place of an attention layer
Layouts     `TokenLayout` says where the visual tokens of a batch are
Kernels     `explain` says which implementation serves an op; `use_impl` forces one

Shapes use the same letters everywhere: B batch, L tokens, H heads, G groups of heads, P head size, N state size,
D model size, K width of a convolution. Of the gated delta rule, K and V are the sizes of a key and of a value.
"""

from __future__ import annotations

from . import _registry
from ._directions import DeltaReverse, Reverse
from ._registry import LinmuWarning, explain, use_impl
from .branch_mix_norm import branch_mix_norm
from .causal_conv1d import causal_conv1d
from .causal_conv1d_step import causal_conv1d_step
from .exact_step import exact_step
from .far_attention import far_attention
from .gated_delta_scan import gated_delta_scan
from .gated_delta_step import gated_delta_step
from .gated_norm import gated_norm
from .near_attention import near_attention
from .nn import MMATE, ExactConfig, ExactMMATE, GridAttention, MMATEConfig, MMATEState
from .ssd_scan import ssd_scan
from .ssd_step import ssd_step
from .token_layout import TokenLayout, WindowTable, major_scan_order
from .window_attention import window_attention

_registry.load_binaries()

__version__ = "0.1.0"
__all__ = [
    "MMATE",
    "DeltaReverse",
    "ExactConfig",
    "ExactMMATE",
    "GridAttention",
    "LinmuWarning",
    "MMATEConfig",
    "MMATEState",
    "Reverse",
    "TokenLayout",
    "WindowTable",
    "branch_mix_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "exact_step",
    "explain",
    "far_attention",
    "gated_delta_scan",
    "gated_delta_step",
    "gated_norm",
    "major_scan_order",
    "near_attention",
    "ssd_scan",
    "ssd_step",
    "use_impl",
    "window_attention",
]
