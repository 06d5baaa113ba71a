"""The layout of a grid inside an exported graph, whose number of rows, and sizes, may be symbols."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference.token_layout import MAJOR_AXES
from .token_layout import WindowTable


class TracedGrid:
    """As `TokenLayout`, of rows that are one (T, H, W) block and then `num_text` tokens: what a block reads of it, made
    of operations that go into the graph, so that the graph serves every number of rows and every grid."""

    has_visual = True

    def __init__(self, grid: Sequence[int], num_text: int, batch_size: int) -> None:
        self.grid, self.batch_size = tuple(grid), batch_size
        self.size = math.prod(self.grid)
        self.length = self.size + num_text

    def visual_mask(self, device: Any = None) -> Tensor:
        return (torch.arange(self.length, device=device) < self.size).expand(self.batch_size, -1)

    def reverse_seq_idx(self, device: Any = None) -> Tensor:
        rows = torch.arange(1, self.batch_size + 1, device=device, dtype=torch.int32)
        return self.visual_mask(device) * rows[:, None]

    def scan_order(self, layer: int, device: Any = None) -> Tensor:
        positions = torch.arange(self.length, device=device, dtype=torch.int32)
        block = positions[: self.size].view(self.grid).permute(MAJOR_AXES[layer % 4]).reshape(-1)
        return torch.cat((block, positions[self.size :])).expand(self.batch_size, -1)

    def window_table(
        self,
        window: Sequence[int],
        shift: Sequence[int] = (0, 0, 0),
        wrap: str = "join",
        image_window: Sequence[int] | None = None,
        image_shift: Sequence[int] | None = None,
        device: Any = None,
    ) -> WindowTable:
        visit, number, windows, inside, largest = self._windows(window, shift, wrap, image_window, image_shift, device)
        rows = torch.arange(self.batch_size, device=device)[:, None]
        counts = torch.zeros(windows, dtype=torch.int64, device=device)
        counts = counts.scatter_add(0, number, torch.ones_like(number)).expand(self.batch_size, -1).reshape(-1)
        return WindowTable(
            tokens=(rows * self.length + visit).reshape(-1).int(),
            offsets=torch.cat((counts.new_zeros(1), counts.cumsum(0))).int(),
            coords=inside[visit].expand(self.batch_size, -1).reshape(-1).int(),
            max_tokens=largest,
        )

    def window_rank(self, *windows: Any) -> Tensor:
        number, device = self._windows(*windows)[1], windows[-1]
        # Positions rise within a window's own tokens once these are sorted by window alone, stably.
        order = torch.argsort(number, stable=True)
        first = torch.searchsorted(number[order], number[order])
        place = torch.arange(1, self.size + 1, device=device) - first
        ranks = torch.zeros(self.length, dtype=torch.int32, device=device)
        return ranks.index_copy(0, order, place.int()).expand(self.batch_size, -1)

    def _windows(
        self,
        window: Sequence[int],
        shift: Sequence[int],
        wrap: str,
        image_window: Sequence[int] | None,
        image_shift: Sequence[int] | None,
        device: Any,
    ) -> tuple[Tensor, Tensor, int, Tensor, int]:
        """The tokens of a block in window order, each token's window, how many windows, each token's coordinate in its
        window, tokens of the largest window. As the reference planner, without a branch on what may be a symbol."""
        image = self.grid[0] == 1
        full = image_window if image and image_window is not None else window
        shifts = image_shift if image and image_shift is not None else shift
        number = inside = key = torch.zeros(self.grid, dtype=torch.int64, device=device)
        windows = largest = 1
        rolled = []
        for axis, s in enumerate(self.grid):
            shape = [1, 1, 1]
            shape[axis] = s
            c = torch.arange(s, device=device).view(shape)
            w = torch.sym_min(full[axis], s)
            h = shifts[axis] % s * torch.sym_min(torch.sym_max(s - full[axis], 0), 1)
            d = (c - h) % s
            count, part = (s + full[axis] - 1) // full[axis], d // w
            if wrap == "mask":
                cut = torch.sym_min((s - h) % w, 1)
                part = part + (c < h) * cut
                count = count + cut * torch.sym_min(h, 1)
            number = number * count + part
            inside = inside * (2 * full[axis] - 1) + d % w
            windows, largest = windows * count, largest * w
            rolled.append(d)
        key = number
        for axis, d in enumerate(rolled):
            key = key * self.grid[axis] + d
        return key.reshape(-1).argsort(), number.reshape(-1), windows, inside.reshape(-1), largest
