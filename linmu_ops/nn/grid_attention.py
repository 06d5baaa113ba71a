"""Puts a block behind the call of a vision transformer's attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._inputs import grid_layout
from .block import Block


class GridAttention(nn.Module):
    """Mixes the tokens of a vision transformer: first prefix tokens, then the patches of a (T, H, W) grid.

    Prefix tokens (CLS, registers) are text to the block, which sees only what is visited before it. So they are visited
    last. They read every patch through the forward scan, and no patch reads them.

    Args:
        block: an `MMATE` or an `ExactMMATE`.
        grid: (T, H, W) of the patches; T = 1 for an image.
        prefix_tokens: how many tokens come before the patches.
        return_weights: return (out, None), as the attention modules of transformers do.

    Example:
        >>> for i, layer in enumerate(vit.layers):  # a transformers ViTModel, 224 x 224, patches of 16
        ...     block = linmu_ops.MMATE.from_attention(layer.attention, layer_idx=i)
        ...     layer.attention = GridAttention(block, grid=(1, 14, 14), prefix_tokens=1, return_weights=True)
    """

    def __init__(
        self, block: Block, grid: Sequence[int], *, prefix_tokens: int = 0, return_weights: bool = False
    ) -> None:
        super().__init__()
        self.block, self.grid = block, tuple(grid)
        self.prefix_tokens, self.return_weights = prefix_tokens, return_weights

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """hidden_states (B, prefix_tokens + T*H*W, D) to out, of the same shape. Other arguments are not read."""
        n = self.prefix_tokens
        if n == 0:
            out = self.block(hidden_states, grid=self.grid)
        else:
            last = torch.cat((hidden_states[:, n:], hidden_states[:, :n]), dim=1)
            layout = grid_layout(
                self.grid, n, last.shape[0], last.device, self.block.layer_idx, self.block.layer_windows
            )
            out = self.block(last, layout=layout)
            out = torch.cat((out[:, -n:], out[:, :-n]), dim=1)
        return (out, None) if self.return_weights else out
