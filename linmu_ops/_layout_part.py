"""Layouts of a part of their rows: an image or video that is cut lies in several calls.

`TokenLayout` plans a part as a row that has the missing tokens too, before and behind the call's own, and then leaves
these out. So windows and slabs fall where the whole image or video puts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Spans = list[tuple[int, int]]


class Margins(NamedTuple):
    """How many places a planned row has before and behind those of the call."""

    before: int
    behind: int


def whole_spans(blocks: np.ndarray) -> Spans:
    """(first, count) of each block: all of its tokens."""
    return [(0, t * h * w) for _, t, h, w in blocks.tolist()]


def checked_spans(blocks: np.ndarray, positions: np.ndarray, spans: np.ndarray) -> Spans:
    """The spans of a part, each within its block; only a row's first block began before, only its last one goes on."""
    sizes = [t * h * w for _, t, h, w in blocks.tolist()]
    out = [(int(first), int(count)) for first, count in spans.tolist()]
    if len(out) != len(sizes):
        raise ValueError(f"TokenLayout: spans must be {len(sizes)}, one for each block, got {len(out)}")
    if sum(count for _, count in out) != len(positions):
        raise ValueError(
            f"TokenLayout: positions must have {sum(count for _, count in out)} entries, as spans say, got "
            f"{len(positions)}"
        )
    parts, rows = split(positions, out), blocks[:, 0]
    for i, ((first, count), size) in enumerate(zip(out, sizes, strict=True)):
        if not (min(first, count) >= 0 and first + count <= size and (count or 0 < first < size)):
            raise ValueError(
                f"TokenLayout: spans[{i}] must be (first, count) of a block's {size} tokens, got {(first, count)}"
            )
        if count == size:
            continue
        own = parts[i]
        others = np.concatenate([own[:0], *(p for j, p in enumerate(parts) if j != i and rows[j] == rows[i])])
        early = first and others.size and (not count or others.min() < own.max())
        late = first + count < size and others.size and (not count or others.max() > own.min())
        if early or late:
            raise ValueError(
                f"TokenLayout: spans[{i}] must be all of its block, as another of its row comes "
                f"{'before' if early else 'after'} it, got {(first, count)} of {size}"
            )
    for i, own in enumerate(parts):
        if len(own) < sizes[i] and (own[1:] <= own[:-1]).any():
            raise ValueError(
                f"TokenLayout: blocks[{i}] must have its tokens in the order of their positions to be cut, got others"
            )
    return out


def split(positions: np.ndarray, spans: Spans) -> list[np.ndarray]:
    """The positions of each block."""
    return np.split(positions, np.cumsum([count for _, count in spans])[:-1]) if spans else []


def planned(blocks: np.ndarray, positions: np.ndarray, spans: Spans, length: int) -> tuple[np.ndarray, int, Margins]:
    """Positions and length of rows that have the missing tokens too, and their margins."""
    sizes = [t * h * w for _, t, h, w in blocks.tolist()]
    before = max((first for first, _ in spans), default=0)
    behind = max((size - first - count for size, (first, count) in zip(sizes, spans, strict=True)), default=0)
    every = [
        part
        for own, size, (first, count) in zip(split(positions, spans), sizes, spans, strict=True)
        for part in (
            np.arange(before - first, before),
            before + own,
            np.arange(size - first - count) + before + length,
        )
    ]
    return np.concatenate([np.zeros(0, np.int64), *every]), before + length + behind, Margins(before, behind)


def table_of_part(
    table: tuple[np.ndarray, np.ndarray, np.ndarray, int], length: int, margins: Margins
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of a table of windows of planned rows: that of the call's own tokens."""
    tokens, offsets, coords, _ = table
    row, place = np.divmod(tokens.astype(np.int64), margins.before + length + margins.behind)
    own = (place >= margins.before) & (place < margins.before + length)
    window = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    counts = np.bincount(window[own], minlength=len(offsets) - 1)
    counts = counts[counts > 0]
    flat = row * length + place - margins.before
    ends = np.concatenate((np.zeros(1, np.int64), counts.cumsum()))
    return flat[own].astype(np.int32), ends.astype(np.int32), coords[own], int(counts.max(initial=0))


def axis_parts(size: int, window: int, shift: int, mask: bool) -> np.ndarray:
    """(size,) int64: along one dimension, the number of each coordinate's window."""
    w = min(window, size)
    h = 0 if w == size else shift % size
    c = np.arange(size)
    part = (c - h) % size // w
    return part + (c < h) * size if mask and (size - h) % w else part


def part_of(blocks: np.ndarray, positions: np.ndarray, spans: Spans, start: int, stop: int) -> tuple[Any, ...]:
    """Blocks, positions and spans of the places from `start` to `stop`, of a layout of these."""
    found, places, kept = [], [np.zeros(0, np.int64)], []
    for block, own, (first, _) in zip(blocks.tolist(), split(positions, spans), spans, strict=True):
        size = block[1] * block[2] * block[3]
        inside = (own >= start) & (own < stop)
        before = own < start
        begins, many = first + int(before.sum()), int(inside.sum())
        cut = (inside.any() and not inside.all()) or (before.any() and not before.all())
        if cut and (own[1:] <= own[:-1]).any():
            raise ValueError(
                "TokenLayout: an image or video must have its tokens in the order of their positions to be cut, "
                f"got {tuple(block[1:])} of row {block[0]}"
            )
        if many or 0 < begins < size:
            found.append(block)
            kept.append((begins, many))
            places.append(own[inside] - start)
    return np.array(found, np.int64).reshape(-1, 4), np.concatenate(places), kept


def cut_tables(
    blocks: np.ndarray, positions: np.ndarray, spans: Spans, shape: tuple[int, int], windows: Any, chunk: int
) -> tuple[Any, ...]:
    """What `TokenLayout.cut` returns; windows as its planner takes them."""
    window, shift, image_window, image_shift, mask = windows
    batch, length = shape
    begin, first, before = np.full(batch, length), np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    inverse, text = np.full(batch * length, -1), np.ones(shape, dtype=bool)
    text[np.repeat(blocks[:, 0], [count for _, count in spans]), positions] = False
    queries, keys = [np.zeros((0, chunk), np.int64)], []
    for (row, *sizes), own, (came, count) in zip(blocks.tolist(), split(positions, spans), spans, strict=True):
        if count == sizes[0] * sizes[1] * sizes[2]:
            continue
        full, moved = (image_window, image_shift) if sizes[0] == 1 else (window, shift)
        t, y, x = (axis_parts(*axis, mask) for axis in zip(sizes, full, moved, strict=True))
        each, now = sizes[1] * sizes[2], came + count
        slab = np.repeat(t, each)
        if now < len(slab) and slab[now - 1] == slab[now]:
            starts = int(np.flatnonzero(slab == slab[now])[0])
            begin[row] = -1 if starts < came else own[starts - came]
        if not (0 < came < len(slab) and slab[came - 1] == slab[came]):
            continue
        members = np.flatnonzero(slab == slab[came])
        first[row], before[row] = members[0], came - members[0]
        box = np.tile((y[:, None] * (sizes[2] + 1) * 2 + x).ravel(), sizes[0])[members]
        earlier, new = members < came, (members >= came) & (members < now)
        for one in np.unique(box[new]):
            mine = row * length + own[members[new & (box == one)] - came]
            many = -(-mine.size // chunk)
            inverse[mine] = sum(map(len, queries)) * chunk + np.arange(mine.size)
            queries.append(np.pad(mine, (0, many * chunk - mine.size), mode="edge").reshape(many, chunk))
            keys += [np.flatnonzero(earlier & (box == one))] * many
    filled = np.full((len(keys), max(map(len, keys), default=0)), -1, np.int64)
    for at, mine in zip(filled, keys, strict=True):
        at[: len(mine)] = mine
    counts = [int(row[max(at, 0) :].sum()) for row, at in zip(text, begin.tolist(), strict=True)]
    rows = tuple(zip(begin.tolist(), before.tolist(), counts, strict=True))
    return begin, first, before, np.concatenate(queries), filled, inverse.reshape(batch, length), rows


def whole_frames(frames: int, window: int, shifts: Sequence[int], mask: bool) -> list[int]:
    """Before which frames a video of so many ends a slab under every one of the shifts: where no window looks ahead."""
    parts = [axis_parts(frames, window, shift, mask) for shift in shifts]
    return [t for t in range(1, frames) if all(part[t - 1] != part[t] for part in parts)]
