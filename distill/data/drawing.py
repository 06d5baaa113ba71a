"""What all task groups draw with: samples, ink on cells, pages of words."""

from dataclasses import dataclass

import numpy as np

from . import assets
from .assets import BLANK, CELL, CLASSES, LETTERS

Sizes = tuple[tuple[int, int], ...]
RANDOM_LINES = 0.6
CLUTTER = 0.15


@dataclass(frozen=True)
class Sample:
    """One image (`frames` holds a single frame) or video, with questions and answers about it."""

    group: str
    frames: np.ndarray
    """Grey pixels, `(T, H, W)` uint8."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs, in the order they are asked."""
    cells: np.ndarray
    """What each visual token shows, `(T, H / CELL, W / CELL)` int64 index into `CLASSES`."""
    is_video: bool
    depth: float | None = None
    """Where what is asked first is, from 0 (the first frame or line) to 1 (the last); None where it is in no one."""


def paint(rng: np.random.Generator, coverage: np.ndarray) -> np.ndarray:
    """Turn coverage `(T, R, C, CELL, CELL)` uint8 into frames `(T, R * CELL, C * CELL)` uint8: tones and noise."""
    frames, rows, columns = coverage.shape[:3]
    ink, paper = rng.integers(0, 90), rng.integers(170, 240)
    if rng.random() < 0.3:
        ink, paper = paper, ink
    plane = coverage.transpose(0, 1, 3, 2, 4).reshape(frames, rows * CELL, columns * CELL)
    tones = (np.arange(256) * (int(ink) - int(paper)) // 255 + int(paper)).astype(np.uint8)[plane]
    # Tones stay below 240, so uint8 cannot wrap.
    return tones + rng.integers(0, rng.integers(2, 16), size=tones.shape, dtype=np.uint8)


def draw_cells(rng: np.random.Generator, cells: np.ndarray, split: str, keep_image: bool = False) -> np.ndarray:
    """Coverage `(T, R, C, CELL, CELL)` uint8 of `cells` `(T, R, C)`; each line of letters has a shift of its own.

    `keep_image` draws a digit with the same handwritten image wherever it occurs.
    """
    coverage = np.zeros((*cells.shape, CELL, CELL), dtype=np.uint8)
    glyphs = assets.glyph_table()
    face = rng.choice(assets.face_indices(split))
    size = rng.integers(glyphs.shape[1])
    shifts = np.broadcast_to(rng.integers(glyphs.shape[2], size=(*cells.shape[:2], 1)), cells.shape)
    letters = assets.is_letter(cells)
    coverage[letters] = glyphs[face, size, shifts[letters], cells[letters] - 1]
    for digit in np.unique(cells[cells > len(LETTERS)]):
        images, rows = assets.digit_table(split)
        shown = cells == digit
        coverage[shown] = images[rng.choice(rows[digit - len(LETTERS) - 1], size=1 if keep_image else shown.sum())]
    return coverage


def class_indices(text: str) -> np.ndarray:
    return np.array([CLASSES.index(c) for c in text], dtype=np.int64)


def unlike_held_out(line: str) -> str:
    """The line, with another first letter if it is a held-out word: no picture of training may show one."""
    word = line.strip(BLANK)
    while word in assets.held_out_words():
        first = LETTERS[(LETTERS.index(word[0]) + 1) % len(LETTERS)]
        line = line.replace(word, first + word[1:])
        word = line.strip(BLANK)
    return line


def text_line(rng: np.random.Generator, split: str, columns: int) -> str:
    if split == "train" and rng.random() < RANDOM_LINES:
        blanks = rng.random(columns) < rng.uniform(0.0, 0.5)
        return unlike_held_out("".join(BLANK if blank else LETTERS[rng.integers(26)] for blank in blanks))
    listed = assets.words_up_to(split, columns)
    word = listed[rng.integers(len(listed))]
    return word.rjust(len(word) + rng.integers(columns - len(word) + 1), BLANK).ljust(columns, BLANK)


def text_page(rng: np.random.Generator, split: str, sizes: Sizes) -> list[str]:
    rows, columns = sizes[rng.integers(len(sizes))]
    return [text_line(rng, split, columns) for _ in range(rows)]


def page_sample(
    rng: np.random.Generator,
    group: str,
    split: str,
    page: list[str],
    turns: list[tuple[str, str]],
    depth: float | None = None,
) -> Sample:
    """A picture of a page, and what is asked about it."""
    cells = np.stack([class_indices(line) for line in page])[None]
    return Sample(group, paint(rng, draw_cells(rng, cells, split)), tuple(turns), cells, is_video=False, depth=depth)


def line_turns(rng: np.random.Generator, page: list[str], turns: int) -> tuple[list[tuple[str, str]], float]:
    """Questions after lines of a page, and how far down the first of them is."""
    chosen = rng.permutation(len(page))[:turns]
    return [(f"line {k + 1}", page[k]) for k in chosen], float(chosen[0]) / max(len(page) - 1, 1)


def add_clutter(rng: np.random.Generator, cells: np.ndarray, coverage: np.ndarray) -> None:
    """Put gratings and blobs into some of the blank cells, in place."""
    cluttered = (rng.random(cells.shape) < CLUTTER) & (cells == 0)
    tiles = assets.clutter_table()
    coverage[cluttered] = tiles[rng.integers(len(tiles), size=cluttered.sum())]
