"""Definition of the layout planner behind `linmu_ops.TokenLayout`, in numpy.

`csrc/linmu/token_layout.h` is the same class compiled; both check first, with the same words.
"""

from __future__ import annotations

import itertools

import numpy as np

# Raised whenever a plan changes meaning; a compiled planner that says otherwise is refused as stale.
VERSION = 1
# Axes of a (T, H, W) block from slowest to fastest in the major scan of layer l, by l mod 4.
MAJOR_AXES = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0))


def _name(i: int) -> str:
    return f"blocks[{i}]"


class Plan:
    """A checked table of blocks: blocks (num_blocks, 4) int64 rows (batch row, T, H, W); positions (num_visual,) int64.

    Raises ValueError for a table that does not describe disjoint blocks inside (batch_size, length).
    """

    def __init__(self, blocks: np.ndarray, positions: np.ndarray, batch_size: int, length: int) -> None:
        self.shape = (batch_size, length)
        self.blocks = [tuple(int(v) for v in b) for b in blocks]
        ends = [0]
        for i, (row, *sizes) in enumerate(self.blocks):
            if not 0 <= row < batch_size:
                raise ValueError(f"TokenLayout: {_name(i)} must be in a row of 0..{batch_size - 1}, got row {row}")
            t, h, w = sizes
            if min(sizes) < 1:
                raise ValueError(f"TokenLayout: {_name(i)} must have sizes (T, H, W) >= 1, got ({t}, {h}, {w})")
            if t * h * w > length:
                raise ValueError(
                    f"TokenLayout: {_name(i)} must fit in length {length}, got (T, H, W) = ({t}, {h}, {w})"
                )
            ends.append(ends[-1] + t * h * w)
        if len(positions) != ends[-1]:
            raise ValueError(
                f"TokenLayout: positions must have {ends[-1]} entries, T*H*W per block, got {len(positions)}"
            )
        for i in np.flatnonzero((positions < 0) | (positions >= length))[:1]:
            raise ValueError(f"TokenLayout: positions must be in 0..{length - 1}, got {positions[i]} at index {i}")
        self.positions = [positions[a:b] for a, b in itertools.pairwise(ends)]
        self.slots = [np.sort(p) for p in self.positions]
        for i, slots in enumerate(self.slots):
            for p in slots[1:][slots[1:] == slots[:-1]][:1]:
                raise ValueError(f"TokenLayout: {_name(i)} must name each position once, got position {p} twice")
        spans = sorted(
            (b[0], int(s[0]), i, int(s[-1])) for i, (b, s) in enumerate(zip(self.blocks, self.slots, strict=True))
        )
        for (row, first, i, last), (row2, first2, j, last2) in itertools.pairwise(spans):
            if row == row2 and first2 <= last:
                raise ValueError(
                    f"TokenLayout: blocks of a row must not overlap, got {_name(i)} at {first}..{last} and "
                    f"{_name(j)} at {first2}..{last2} in row {row}"
                )

    def segments(self) -> tuple[np.ndarray, np.ndarray]:
        """(mask (B, L) bool: True at visual tokens, index (B, L) int32: 1 + block from first to last token, else 0)."""
        mask, index = np.zeros(self.shape, bool), np.zeros(self.shape, np.int32)
        for i, (block, slots) in enumerate(zip(self.blocks, self.slots, strict=True)):
            mask[block[0], slots] = True
            index[block[0], slots[0] : slots[-1] + 1] = i + 1
        return mask, index

    def scan_order(self, mode: int) -> np.ndarray:
        """(B, L) int32, the position visited at t: a block's tokens in major order, in the block's sorted slots."""
        order = np.tile(np.arange(self.shape[1], dtype=np.int32), (self.shape[0], 1))
        for block, positions, slots in zip(self.blocks, self.positions, self.slots, strict=True):
            order[block[0], slots] = positions.reshape(block[1:]).transpose(MAJOR_AXES[mode]).ravel()
        return order

    def window_table(
        self,
        window: tuple[int, ...],
        shift: tuple[int, ...],
        image_window: tuple[int, ...],
        image_shift: tuple[int, ...],
        wrap_mask: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """(tokens, offsets, coords, max_tokens) of `linmu_ops.WindowTable`, as int32 arrays."""
        tokens, coords, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
        for block, positions in zip(self.blocks, self.positions, strict=True):
            sizes = block[1:]
            full, shifts = (image_window, image_shift) if sizes[0] == 1 else (window, shift)
            number = np.zeros(sizes, np.int64)  # of the window, row-major over the block
            rolled, inside = [], np.zeros(sizes, np.int64)
            for axis, c in enumerate(np.indices(sizes)):
                s, w = sizes[axis], min(full[axis], sizes[axis])
                h = 0 if w == s else shifts[axis] % s
                d = (c - h) % s
                part = d // w
                if wrap_mask and (s - h) % w:  # tokens that wrapped (c < h) sit at the end: one cut more
                    part = part + (c < h)
                number = number * (part.max() + 1) + part
                inside = inside * (2 * full[axis] - 1) + d % w
                rolled.append(d)
            visit = np.lexsort([d.ravel() for d in (*rolled[::-1], number)])
            tokens.append(block[0] * self.shape[1] + positions[visit])
            coords.append(inside.ravel()[visit])
            counts.append(np.bincount(number.ravel()))
        flat = np.concatenate(counts)
        offsets = np.cumsum(flat)
        return (
            np.concatenate(tokens).astype(np.int32),
            offsets.astype(np.int32),
            np.concatenate(coords).astype(np.int32),
            int(flat.max()),
        )
