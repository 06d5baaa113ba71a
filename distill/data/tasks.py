"""Generators of the five task groups that the shipped teacher knows, and samples of all groups by name.

A sample is one image or one video and one or more question-answer turns about it. Everything is drawn from a seed:
the same arguments give the same samples, byte for byte.
"""

from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from itertools import islice, repeat
from math import inf
from numbers import Integral, Real
from zlib import crc32

import numpy as np

from . import assets
from .assets import BLANK, DIGITS, LETTERS
from .drawing import (
    RANDOM_LINES,
    Sample,
    Sizes,
    add_clutter,
    class_indices,
    draw_cells,
    line_turns,
    page_sample,
    paint,
    text_page,
    unlike_held_out,
)
from .long_tasks import DEPTHS, MOST_KEYS, NEEDLE_FRAMES, NEEDLE_SIZE, needles, page, tracking

PAGE_SIZES: Sizes = ((4, 8), (3, 8), (2, 8))
VIDEO_SIZE = (4, 4)
VIDEO_FRAMES = (4, 8)
MAX_COUNT = 5
MOST_CELLS = 2**21  # of one sample: half a gigabyte of pixels, and twelve times that where a model takes it
MOST_FRAMES = MOST_CELLS // (NEEDLE_SIZE[0] * NEEDLE_SIZE[1])

_DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
_THIN_PAGES = 0.5


def _digit_page(rng: np.random.Generator, sizes: Sizes) -> list[str]:
    rows, columns = sizes[rng.integers(len(sizes))]
    # A skewed draw, so that some digits occur often and some once.
    weights = rng.dirichlet(np.full(10, 0.7))
    digits = rng.choice(10, size=(rows, columns), p=weights)
    blanks = rng.random((rows, columns)) < rng.uniform(0.2, 0.6)
    return [
        "".join(BLANK if b else DIGITS[d] for d, b in zip(*line, strict=True))
        for line in zip(digits, blanks, strict=True)
    ]


def read(rng: np.random.Generator, split: str, turns: int, sizes: Sizes = PAGE_SIZES) -> Sample:
    """Transcribe a page: every line with its number, blanks as `-`. There is only one question to ask."""
    page = text_page(rng, split, sizes)
    return page_sample(
        rng, "read", split, page, [("read", "\n".join(f"{k + 1} {text}" for k, text in enumerate(page)))]
    )


def line(rng: np.random.Generator, split: str, turns: int, sizes: Sizes = PAGE_SIZES) -> Sample:
    """Transcribe line k of a page."""
    page = text_page(rng, split, sizes)
    return page_sample(rng, "line", split, page, *line_turns(rng, page, turns))


def _where_turn(rng: np.random.Generator, page: list[str], symbols: str) -> tuple[str, str] | None:
    text = "".join(page)
    once = [c for c in symbols if text.count(c) == 1]
    if not once:
        return None
    symbol = once[rng.integers(len(once))]
    row = next(i for i, row in enumerate(page) if symbol in row)
    return f"where is {symbol}", f"{symbol}{row + 1}{page[row].index(symbol) + 1}"


def _count_turn(rng: np.random.Generator, page: list[str], symbols: str) -> tuple[str, str]:
    text = "".join(page)
    # The count is drawn before the symbol: otherwise most answers would be 0.
    counts = sorted({text.count(c) for c in symbols if text.count(c) <= MAX_COUNT})
    count = counts[rng.integers(len(counts))]
    candidates = [c for c in symbols if text.count(c) == count]
    symbol = candidates[rng.integers(len(candidates))]
    return f"how many {symbol}", f"{symbol}{count}"


def where(rng: np.random.Generator, split: str, turns: int, sizes: Sizes = PAGE_SIZES) -> Sample:
    """Where is a symbol that occurs once (row and column), and how many there are of a symbol; letters or digits."""
    digits = rng.random() < 0.5
    page, symbols = (_digit_page(rng, sizes), DIGITS) if digits else (text_page(rng, split, sizes), LETTERS)
    if split == "train" and rng.random() < _THIN_PAGES:
        # A page with little on it teaches where cells are before symbols have to be told apart as well.
        kept = rng.uniform(0.05, 0.6)
        page = [unlike_held_out("".join(c if rng.random() < kept else BLANK for c in text)) for text in page]
    if split != "train" and digits and not any(c in DIGITS for c in "".join(page)):
        page[0] = DIGITS[0] + page[0][1:]  # a blank page could be one of training
    asked: dict[str, str] = {}
    for _ in range(turns):
        turn = _where_turn(rng, page, symbols) if rng.random() < 0.5 else None
        question, answer = turn or _count_turn(rng, page, symbols)
        asked[question] = answer
    return page_sample(rng, "where", split, page, list(asked.items()))


def _cell_names(path: list[tuple[int, int]]) -> str:
    return " ".join(f"{row + 1}{column + 1}" for row, column in path)


def video(rng: np.random.Generator, split: str, turns: int) -> Sample:
    """One of several handwritten digits moves along a row or a column: which, which way, how far; and their tracks."""
    rows, columns = VIDEO_SIZE
    frames = int(rng.integers(VIDEO_FRAMES[0], VIDEO_FRAMES[1] + 1))
    name = list(_DIRECTIONS)[rng.integers(4)]
    dy, dx = _DIRECTIONS[name]
    steps = int(rng.integers(1, 4))
    starts = [
        (y, x)
        for y in range(rows)
        for x in range(columns)
        if 0 <= y + dy * steps < rows and 0 <= x + dx * steps < columns
    ]
    y, x = starts[rng.integers(len(starts))]
    moves = np.zeros(frames, dtype=np.int64)
    moves[1 + rng.permutation(frames - 1)[:steps]] = 1
    track = [(y + dy * int(n), x + dx * int(n)) for n in moves.cumsum()]
    free = [(r, c) for r in range(rows) for c in range(columns) if (r, c) not in track]
    still = [free[i] for i in rng.permutation(len(free))[: rng.integers(1, 4)]]
    names = rng.permutation(10)[: len(still) + 1]
    tracks = {int(names[0]): track} | {int(d): [cell] * frames for d, cell in zip(names[1:], still, strict=True)}
    cells = np.zeros((frames, rows, columns), dtype=np.int64)
    for digit, path in tracks.items():
        for t, (row, column) in enumerate(path):
            cells[t, row, column] = 1 + len(LETTERS) + digit
    asked = [("what moved", f"{names[0]} {_cell_names([track[0], track[-1]])} {name} {steps}")]
    asked += [(f"track {digit}", f"{digit} {_cell_names(path)}") for digit, path in tracks.items()]
    # Half of single questions are about the motion: a still digit's track needs no comparison of frames.
    chosen = [0] if turns == 1 and rng.random() < 0.5 else rng.permutation(len(asked))[:turns]
    coverage = draw_cells(rng, cells, split, keep_image=True)
    return Sample("video", paint(rng, coverage), tuple(asked[i] for i in chosen), cells, is_video=True)


def needle(rng: np.random.Generator, split: str, turns: int, frames: tuple[int, int] = NEEDLE_FRAMES) -> Sample:
    """A long cluttered video: one frame shows a handwritten digit, another one a word; one of them is asked for."""
    rows, columns = NEEDLE_SIZE
    length = int(rng.integers(frames[0], frames[1] + 1))
    cells = np.zeros((length, rows, columns), dtype=np.int64)
    digit_frame, word_frame = rng.permutation(length)[:2]
    digit = int(rng.integers(10))
    listed = assets.words_up_to(split, 6)
    word = listed[rng.integers(len(listed))]
    if split == "train" and rng.random() < RANDOM_LINES:
        word = unlike_held_out("".join(LETTERS[i] for i in rng.integers(26, size=len(word))))
    start = rng.integers(columns - len(word) + 1)
    cells[digit_frame, rng.integers(rows), rng.integers(columns)] = 1 + len(LETTERS) + digit
    cells[word_frame, rng.integers(rows), start : start + len(word)] = class_indices(word)
    coverage = draw_cells(rng, cells, split)
    add_clutter(rng, cells, coverage)
    asked = [("digit", str(digit)), ("word", word)]
    chosen = rng.permutation(2)[:turns]
    depth = float((digit_frame, word_frame)[chosen[0]]) / (length - 1)
    return Sample("needle", paint(rng, coverage), tuple(asked[i] for i in chosen), cells, is_video=True, depth=depth)


GROUPS: dict[str, Callable[..., Sample]] = {
    "read": read,
    "line": line,
    "where": where,
    "video": video,
    "needle": needle,
}
LONG_GROUPS: dict[str, Callable[..., Sample]] = {"needles": needles, "tracking": tracking, "page": page}
TASKS = GROUPS | LONG_GROUPS
# Validation draws what was called "test" before there was a test that no option was chosen on.
_STREAMS = {"val": "test", "val_font": "test_font", "test": "unseen", "test_font": "unseen_font"}


def _check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def _check_options(group: str, options: Mapping[str, object]) -> None:
    known = task_options(group)
    if unknown := [name for name in options if name not in known]:
        told = f"must be of {', '.join(known)}" if known else "must be left out"
        raise ValueError(f"options of {group} {told}, got {unknown[0]}")
    if "frames" in options and not _is_pair(options["frames"], 2, MOST_FRAMES, rising=True):
        rule = f"(least, most) with 2 <= least <= most <= {MOST_FRAMES}"
        raise ValueError(f"frames must be {rule}, got {options['frames']!r}")
    if "sizes" in options:
        sizes = options["sizes"]
        if not isinstance(sizes, tuple | list) or not sizes or not all(_is_pair(size, 1) for size in sizes):
            raise ValueError(f"sizes must be a list of (rows, columns), each at least 1, got {sizes!r}")
        if large := next((size for size in sizes if size[0] * size[1] > MOST_CELLS), None):
            raise ValueError(f"sizes must be of at most {MOST_CELLS} cells, rows x columns, got {large!r}")
    for name, most in (("keys", MOST_KEYS), ("chains", len(LETTERS)), ("hops", len(LETTERS))):
        if name in options:
            _check_whole(name, options[name], 1, most)
    if "depth" in options and not _is_band(options["depth"]):
        raise ValueError(f"depth must be (least, most) with 0 <= least <= most <= 1, got {options['depth']!r}")


def task_options(group: str) -> list[str]:
    """The options that a group takes."""
    return list(signature(TASKS[group]).parameters)[3:]


def _is_band(value: object) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    if not all(isinstance(one, Real) and not isinstance(one, bool) for one in value):
        return False
    return DEPTHS[0] <= value[0] <= value[1] <= DEPTHS[1]


def _is_pair(value: object, least: int, most: float = inf, rising: bool = False) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    if not all(isinstance(one, Integral) and not isinstance(one, bool) and least <= int(one) <= most for one in value):
        return False
    return not rising or value[0] <= value[1]


def generate(
    group: str, n: int, seed: int | tuple[int, ...], split: str = "train", turns: int = 1, **options: object
) -> list[Sample]:
    """The first `n` samples of `draw`, which has the other arguments.

    Raises:
        ValueError, TypeError: as `draw`; or `n` is no number of samples.
    """
    samples = draw(group, seed, split, turns, **options)
    _check_whole("n", n, 0)
    return list(islice(samples, n))


def draw(
    group: str, seed: int | tuple[int, ...], split: str = "train", turns: int = 1, **options: object
) -> Iterator[Sample]:
    """Samples of a task group without end, a function of the arguments alone.

    Args:
        group: a key of `TASKS`.
        seed: an int, or several, such as (run, step).
        split: `"train"`; `"val"`, words and digit images never seen in training, on which options are chosen;
            `"test"`, others, on which none is; or `"val_font"` and `"test_font"`, the same two in a font family never
            seen in training.
        turns: the most questions to ask about one image or video; evaluation asks one.
        options: passed to the generator: `sizes`, (rows, columns) of pages; `frames`, (least, most) of long videos;
            `keys`, `chains`, `hops` and `depth`: see `long_tasks`.

    Raises:
        ValueError: the group or the split is unknown, a number or an option is not what the group takes, or a video has
            no room for what it should show.
        TypeError: a number is none.
    """
    if not isinstance(group, str) or group not in TASKS:
        raise ValueError(f"group must be one of {tuple(TASKS)}, got {group!r}")
    _check_whole("turns", turns, 1)
    seeds = (seed,) if isinstance(seed, Integral) else seed
    if not isinstance(seeds, tuple | list):
        raise TypeError(f"seed must be a whole number or several, got {seed!r}")
    for one in seeds:
        _check_whole("seed", one, 0)
    _check_options(group, options)
    stream = _STREAMS.get(assets.check_split(split), split)
    rng = np.random.default_rng([crc32(f"{group}/{stream}".encode()), *seeds])
    return (TASKS[group](rng, split, turns, **options) for _ in repeat(None))
