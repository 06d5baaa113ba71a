"""From what a transformers processor passes (ids, grids, image sizes) to a `TokenLayout`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from linmu_ops import TokenLayout
from linmu_ops.context_parallel import ContextParallel

Grid = tuple[int, int, int]


class Block(NamedTuple):
    """A (T, H, W) grid of a unit. `offsets[i]` is the unit's placeholder of the i-th token in t, y, x order."""

    grid: Grid
    offsets: np.ndarray


@dataclass(frozen=True)
class VisualUnit:
    """What one image or video puts into the sequence: `tokens` placeholders, some of which are blocks.

    Placeholders of no block are treated as text: a newline after a row of patches, or a class token.
    """

    tokens: int
    blocks: tuple[Block, ...]

    @classmethod
    def of_grid(cls, t: int, h: int, w: int) -> VisualUnit:
        """A plain grid, one placeholder per cell, in t, y, x order."""
        return cls(t * h * w, (Block((t, h, w), np.arange(t * h * w)),))

    @classmethod
    def of_square(cls, tokens: int) -> VisualUnit:
        """A square image, perhaps after one class token; one row of tokens where it is neither."""
        for skip in (0, 1):
            side = math.isqrt(tokens - skip)
            if side * side == tokens - skip:
                return cls(tokens, (Block((1, side, side), skip + np.arange(side * side)),))
        return cls.of_grid(1, 1, tokens)

    @classmethod
    def joined(cls, parts: Sequence[VisualUnit]) -> VisualUnit:
        """Several units, one after the other, as one."""
        starts = np.cumsum([0, *(p.tokens for p in parts)])
        blocks = [
            Block(b.grid, b.offsets + start) for part, start in zip(parts, starts, strict=False) for b in part.blocks
        ]
        return cls(int(starts[-1]), tuple(blocks))


class Placeholders(NamedTuple):
    """One modality: where its placeholders are, (B, L) bool, and its units in order of appearance."""

    mask: np.ndarray
    units: Sequence[VisualUnit]


def to_numpy(values: Any) -> np.ndarray:
    """A host array of any integer-like input."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def grids_to_units(grid_thw: Any, merge: int | Iterable[int]) -> list[VisualUnit]:
    """Units of (T, H, W) grids counted in patches, of which merge x merge make a token."""
    rows = to_numpy(grid_thw).reshape(-1, 3).tolist()
    merges = [merge] * len(rows) if isinstance(merge, int) else [int(m) for m in to_numpy(merge)]
    return [VisualUnit.of_grid(t, h // m, w // m) for (t, h, w), m in zip(rows, merges, strict=True)]


def repeat_units(placeholders: Placeholders) -> Placeholders:
    """Repeat the units of each row as often as the row was repeated in place, as beam search does."""
    mask, units = placeholders
    tokens = sum(unit.tokens for unit in units)
    times = int(mask.sum()) // tokens if tokens else 1
    repeated: list[VisualUnit] = []
    left = list(units)
    for row in mask[::times] if times > 1 else ():
        count = int(row.sum())
        mine: list[VisualUnit] = []
        while left and sum(unit.tokens for unit in mine) < count:
            mine.append(left.pop(0))
        repeated += mine * times
    return Placeholders(mask, repeated or list(units))


def build_layout(modalities: Iterable[Placeholders], batch_size: int, length: int) -> TokenLayout | None:
    """Lay every modality's units on its placeholders; None without any.

    Units are given for the whole conversation, row after row. Where a part of it is already in the cache, the ids hold
    only the last placeholders, and the last units serve.

    Raises:
        ValueError: the placeholders are not those of whole units.
    """
    found: list[tuple[int, int, Grid, np.ndarray]] = []
    for mask, units in modalities:
        rows, positions = np.nonzero(mask)
        start = 0
        for unit in _last_units(units, len(rows), batch_size):
            mine = slice(start, start + unit.tokens)
            if rows[mine][0] != rows[mine][-1]:
                raise ValueError(
                    f"linmu: an image or video of {unit.tokens} tokens must lie in one row of input_ids, "
                    f"got rows {rows[mine][0]} to {rows[mine][-1]}"
                )
            for block in unit.blocks:
                at = positions[mine][block.offsets]
                found.append((int(rows[start]), int(at.min()), block.grid, at))
            start += unit.tokens
    if not found:
        return None
    found.sort(key=lambda entry: entry[:2])
    blocks = np.array([(row, *grid) for row, _, grid, _ in found])
    return TokenLayout(blocks, np.concatenate([at for *_, at in found]), batch_size, length)


def _last_units(units: Sequence[VisualUnit], tokens: int, batch_size: int) -> Sequence[VisualUnit]:
    total = sum(u.tokens for u in units)
    first = 0
    # In a batch, which row's first units are gone cannot be told.
    if batch_size == 1 or tokens == 0:
        while first < len(units) and total > tokens:
            total -= units[first].tokens
            first += 1
    if total != tokens:
        sizes = [u.tokens for u in units]
        raise ValueError(
            f"linmu: the placeholder tokens in input_ids must be those of whole images and videos of {sizes} tokens, "
            f"got {tokens}; an image may not be split between two calls"
        )
    return units[first:]


@dataclass(frozen=True)
class LinmuInputs:
    """What every linear layer of one forward call shares; passed down as the keyword `linmu`.

    layout: where the visual tokens of these input tokens are; None: there are none.
    padding: (B, L) bool, False at padding; None: there is none.
    seq_idx: (B, L) int32, the number of each token's sequence; None: each row is one.
    context: how rows are split over processes: padding and seq_idx are then of this one's slab, and layout is a
        `SlabLayout`. None: they are whole.
    """

    layout: Any = None
    padding: Tensor | None = None
    seq_idx: Tensor | None = None
    context: ContextParallel | None = None


def token_mask(inputs: Mapping[str, Any], token_id: int, embedding: torch.nn.Module) -> np.ndarray | None:
    """(B, L) bool, where `input_ids` (or, without ids, `inputs_embeds`) hold the placeholder `token_id`."""
    ids = inputs.get("input_ids")
    if ids is not None:
        return to_numpy(ids) == token_id
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        return None
    wanted = embedding(torch.full((), token_id, dtype=torch.long, device=embeds.device)).to(embeds)
    return to_numpy((embeds == wanted).all(-1))
