"""Task groups whose answer lies beyond any window: many keys, chains of assignments, long pages.

The shipped teacher was trained on none of them.
"""

import numpy as np

from .assets import LETTERS
from .drawing import Sample, Sizes, add_clutter, class_indices, draw_cells, line_turns, page_sample, paint, text_page

NEEDLE_SIZE = (4, 8)
NEEDLE_FRAMES = (64, 64)
LONG_PAGES: Sizes = ((48, 8),)
DEPTHS = (0.0, 1.0)
MOST_KEYS = len(LETTERS) ** 2  # names of two letters


def needles(
    rng: np.random.Generator,
    split: str,
    turns: int,
    frames: tuple[int, int] = NEEDLE_FRAMES,
    keys: int = 4,
    depth: tuple[float, float] = DEPTHS,
) -> Sample:
    """A long cluttered video with `keys` handwritten digits, each after its key: which digit is by one of the keys.

    The question, `q digit`, ends as that after a needle does, so that who knows needles can answer where there is one.

    A key is a letter, or two where there are more keys than letters. No key occurs twice, digits do. Keys are spread
    over rows of frames.

    Args:
        depth: (least, most), the part of the video in which the first key that is asked about is.
    """
    length = int(rng.integers(frames[0], frames[1] + 1))
    slots = _slots(rng, length, keys, "keys")
    asked = _frame_within(rng, length, depth)
    if asked not in slots[:, 0]:
        slots[0, 0] = asked
    # The one asked about is first; the others stay in a random order.
    first = int(rng.permutation(np.flatnonzero(slots[:, 0] == asked))[0])
    slots[[0, first]] = slots[[first, 0]]
    single = keys <= len(LETTERS)
    drawn = rng.choice(len(LETTERS) ** (1 if single else 2), size=keys, replace=False)
    names = [LETTERS[i] if single else LETTERS[i // len(LETTERS)] + LETTERS[i % len(LETTERS)] for i in drawn]
    digits = rng.integers(10, size=keys)
    cells = _written(rng, length, slots, [f"{name}{digit}" for name, digit in zip(names, digits, strict=True)])
    asked_about = [(f"{name} digit", str(digit)) for name, digit in zip(names, digits, strict=True)][:turns]
    return _video(rng, "needles", split, cells, asked_about, asked)


def tracking(
    rng: np.random.Generator,
    split: str,
    turns: int,
    frames: tuple[int, int] = NEEDLE_FRAMES,
    chains: int = 4,
    hops: int = 2,
) -> Sample:
    """A long cluttered video of assignments: `b7` gives b a handwritten digit, a later `cb` gives c the value of b.

    There are `chains` of them, each with `hops` assignments after its digit, in turns; the value of a chain's last
    letter is asked for. No letter is assigned to twice. `Sample.depth` is that of the digit.
    """
    length = int(rng.integers(frames[0], frames[1] + 1))
    count = chains * (hops + 1)
    if count > len(LETTERS):
        raise ValueError(f"chains x (hops + 1) must be at most {len(LETTERS)}, got {chains} x {hops + 1}")
    slots = _slots(rng, length, count, "chains x (hops + 1)")
    slots = slots[np.lexsort((slots[:, 1], slots[:, 0]))]
    letters = [LETTERS[i] for i in rng.permutation(len(LETTERS))[:count]]
    digits = rng.integers(10, size=chains)
    names: list[list[str]] = [[] for _ in range(chains)]
    starts, shown = np.zeros(chains, dtype=np.int64), []
    for slot, chain, letter in zip(
        slots, rng.permutation(np.repeat(np.arange(chains), hops + 1)), letters, strict=True
    ):
        if not names[chain]:
            starts[chain] = slot[0]
        shown.append(letter + (names[chain][-1] if names[chain] else str(digits[chain])))
        names[chain].append(letter)
    cells = _written(rng, length, slots, shown)
    asked = [(f"value of {names[chain][-1]}", str(digits[chain])) for chain in range(chains)][:turns]
    return _video(rng, "tracking", split, cells, asked, int(starts[0]))


def page(rng: np.random.Generator, split: str, turns: int, sizes: Sizes = LONG_PAGES) -> Sample:
    """Transcribe line k of a page that is longer than any window."""
    lines = text_page(rng, split, sizes)
    return page_sample(rng, "page", split, lines, *line_turns(rng, lines, turns))


def _slots(rng: np.random.Generator, length: int, count: int, name: str) -> np.ndarray:
    """(count, 2) frame and row of each thing to show, no two in one row of a frame."""
    room = length * NEEDLE_SIZE[0]
    if count > room:
        raise ValueError(f"{name} must be at most {room} in {length} frames of {NEEDLE_SIZE[0]} rows, got {count}")
    return np.stack(np.divmod(rng.choice(room, size=count, replace=False), NEEDLE_SIZE[0]), axis=1)


def _frame_within(rng: np.random.Generator, length: int, depth: tuple[float, float]) -> int:
    """A frame whose place in the video is within `depth`; the nearest one where none is."""
    places = np.arange(length) / (length - 1)
    within = np.flatnonzero((places >= depth[0]) & (places <= depth[1]))
    if not len(within):
        return round(sum(depth) / 2 * (length - 1))
    return int(within[rng.integers(len(within))])


def _written(rng: np.random.Generator, length: int, slots: np.ndarray, texts: list[str]) -> np.ndarray:
    """Cells with each text in its frame and row, at a random column."""
    cells = np.zeros((length, *NEEDLE_SIZE), dtype=np.int64)
    for (frame, row), text in zip(slots, texts, strict=True):
        start = rng.integers(NEEDLE_SIZE[1] - len(text) + 1)
        cells[frame, row, start : start + len(text)] = class_indices(text)
    return cells


def _video(
    rng: np.random.Generator, group: str, split: str, cells: np.ndarray, turns: list[tuple[str, str]], frame: int
) -> Sample:
    coverage = draw_cells(rng, cells, split)
    add_clutter(rng, cells, coverage)
    return Sample(group, paint(rng, coverage), tuple(turns), cells, is_video=True, depth=frame / (len(cells) - 1))
