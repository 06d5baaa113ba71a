"""The layout of a grid inside an exported graph, whose number of rows, and sizes, may be symbols."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference.token_layout import MAJOR_AXES
from .token_layout import SLAB_CHUNK, Partition, WindowTable


class TracedGrid:
    """As `TokenLayout`, of rows that are one (T, H, W) block and then `num_text` tokens: what a block reads of it, made
    of operations that go into the graph, so that the graph serves every number of rows and every grid."""

    has_visual = True
    is_part = False

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
        given = Partition(window, shift, wrap, image_window, image_shift)
        visit, number, windows, inside, largest = self._windows(given, device)
        rows = torch.arange(self.batch_size, device=device)[:, None]
        counts = torch.zeros(windows, dtype=torch.int64, device=device)
        counts = counts.scatter_add(0, number, torch.ones_like(number)).expand(self.batch_size, -1).reshape(-1)
        return WindowTable(
            tokens=(rows * self.length + visit).reshape(-1).int(),
            offsets=torch.cat((counts.new_zeros(1), counts.cumsum(0))).int(),
            coords=inside[visit].expand(self.batch_size, -1).reshape(-1).int(),
            max_tokens=largest,
        )

    def slab_chunks(
        self,
        window: Sequence[int],
        shift: Sequence[int] = (0, 0, 0),
        wrap: str = "join",
        image_window: Sequence[int] | None = None,
        image_shift: Sequence[int] | None = None,
        device: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Chunks of frames, of which each lies in one slab."""
        frames, each = self.grid[0], self.grid[1] * self.grid[2]
        many = (each + SLAB_CHUNK - 1) // SLAB_CHUNK
        part = self._part(0, Partition(window, shift, wrap, image_window, image_shift), device)[0].reshape(-1)
        same = part[:, None] == part
        first = torch.where(same, torch.arange(frames, device=device), frames).amin(1)
        place = torch.arange(many * SLAB_CHUNK, device=device)
        tokens = torch.arange(frames, device=device)[:, None] * each + place.clamp(max=each - 1)
        rows = torch.arange(self.batch_size, device=device)[:, None] * self.length
        tokens = (rows[..., None] + tokens).reshape(-1, SLAB_CHUNK)
        begin = (rows + (first * each).repeat_interleave(many)).reshape(-1)
        at = torch.arange(self.length, device=device)
        slots = torch.where(at < self.size, at // each * many * SLAB_CHUNK + at % each, 0)
        slots = torch.where(at < self.size, slots + rows // self.length * frames * many * SLAB_CHUNK, 0)
        return tokens, begin, slots, begin.new_zeros(begin.shape[0], 0)

    def _windows(self, windows: Partition, device: Any) -> tuple[Tensor, Tensor, int, Tensor, int]:
        """The tokens of a block in window order, each token's window, how many windows, each token's coordinate in its
        window, tokens of the largest window. As the reference planner, without a branch on what may be a symbol."""
        full, _ = windows.of(image=self.grid[0] == 1)
        number = inside = key = torch.zeros(self.grid, dtype=torch.int64, device=device)
        count_all = largest = 1
        rolled = []
        for axis in range(3):
            part, count, d, w = self._part(axis, windows, device)
            number = number * count + part
            inside = inside * (2 * full[axis] - 1) + d % w
            count_all, largest = count_all * count, largest * w
            rolled.append(d)
        key = number
        for axis, d in enumerate(rolled):
            key = key * self.grid[axis] + d
        return key.reshape(-1).argsort(), number.reshape(-1), count_all, inside.reshape(-1), largest

    def _part(self, axis: int, windows: Partition, device: Any) -> tuple[Tensor, int, Tensor, int]:
        """Along one axis, shaped to be broadcast: each token's window, how many windows, its place after the shift, the
        size of a window."""
        s = self.grid[axis]
        full, moved = (given[axis] for given in windows.of(image=self.grid[0] == 1))
        shape = [1, 1, 1]
        shape[axis] = s
        c = torch.arange(s, device=device).view(shape)
        w = torch.sym_min(full, s)
        h = moved % s * torch.sym_min(torch.sym_max(s - full, 0), 1)
        d = (c - h) % s
        count, part = (s + full - 1) // full, d // w
        if windows.wrap == "mask":
            cut = torch.sym_min((s - h) % w, 1)
            part = part + (c < h) * cut
            count = count + cut * torch.sym_min(h, 1)
        return part, count, d, w
