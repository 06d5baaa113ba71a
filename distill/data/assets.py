"""What the task generators draw: printed glyphs, handwritten digits, words and clutter, each with its splits."""

from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

CELL = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
BLANK = "-"
# The class of a cell is the index of its character here; a letter is always printed, a digit always handwritten.
CLASSES = BLANK + LETTERS + DIGITS

SPLITS = ("train", "val", "val_font", "test", "test_font")
HELD_OUT_FAMILY = "liberation"

_HELD_OUT_DIGITS = 360
_GLYPH_SHIFTS_Y = (-1, 0, 1)
_GLYPH_SHIFTS_X = (-3, -2, -1, 0, 1, 2, 3)
_CLUTTER = 96


def is_letter(cells: np.ndarray) -> np.ndarray:
    """Which cells, given by their classes, show a letter."""
    return (cells > 0) & (cells <= len(LETTERS))


def check_split(split: str) -> str:
    """Return `split`, or raise when it is none of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return split


@cache
def glyph_faces() -> tuple[tuple[str, str], ...]:
    """(family, face) of every font of `glyphs.npz`, in its order."""
    with np.load(Path(__file__).parent / "glyphs.npz") as file:
        return tuple(zip(file["families"].tolist(), file["faces"].tolist(), strict=True))


@cache
def face_indices(split: str) -> tuple[int, ...]:
    """Fonts that `split` draws with: the held-out family in `"val_font"` and `"test_font"`, all others elsewhere."""
    held_out = check_split(split).endswith("_font")
    return tuple(i for i, (family, _) in enumerate(glyph_faces()) if (family == HELD_OUT_FAMILY) == held_out)


@cache
def glyph_table() -> np.ndarray:
    """Letters in every face, size and shift: `(faces, sizes, shifts, 26, CELL, CELL)` uint8 coverage."""
    with np.load(Path(__file__).parent / "glyphs.npz") as file:
        packed, characters = file["packed"], str(file["characters"])
    bitmaps = np.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], CELL) * np.uint8(17)
    bitmaps = bitmaps[:, :, [characters.index(c) for c in LETTERS]]
    shifted = [np.roll(bitmaps, (y, x), axis=(-2, -1)) for y in _GLYPH_SHIFTS_Y for x in _GLYPH_SHIFTS_X]
    return np.stack(shifted, axis=2)


@cache
def words(split: str) -> tuple[str, ...]:
    """The words of `split`: a list of its own for test; of the other list a word's checksum decides."""
    if check_split(split).startswith("test"):
        return _listed("test_words.txt")
    val = split != "train"
    return tuple(word for word in _listed("words.txt") if (crc32(word.encode()) % 5 == 0) == val)


def _listed(name: str) -> tuple[str, ...]:
    return tuple((Path(__file__).parent / name).read_text("utf-8").split())


@cache
def held_out_words() -> frozenset[str]:
    """The words that no picture of training may show."""
    return frozenset((*words("val"), *words("test")))


@cache
def words_up_to(split: str, length: int) -> tuple[str, ...]:
    """The words of `split` with at most `length` letters."""
    return tuple(word for word in words(split) if len(word) <= length)


def load_digits() -> Any:
    """scikit-learn's, which pages without digits do not need."""
    from sklearn.datasets import load_digits as found

    return found()


@cache
def digit_ids(split: str) -> np.ndarray:
    """Indices into scikit-learn's `load_digits` that `split` draws from: `(n,)` int64."""
    order = np.random.default_rng(0).permutation(len(load_digits().target))
    return order[_HELD_OUT_DIGITS:] if check_split(split) == "train" else order[:_HELD_OUT_DIGITS]


@cache
def digit_table(split: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Handwritten digits, each in several random placements (rotated and sheared too, for training).

    Validation and test draw the same images, but no placement of one is one of the other.

    Returns:
        coverage `(images * variants, CELL, CELL)` uint8, and for each of the ten digits the rows that show it.
    """
    train = check_split(split) == "train"
    ids = digit_ids(split)
    variants = 24 if train else 8
    data = load_digits()
    images = torch.tensor(data.images[ids] / 16.0, dtype=torch.float32).repeat_interleave(variants, 0)
    rng = torch.Generator().manual_seed(2 if split.startswith("test") else 1)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(len(images)).uniform_(low, high, generator=rng)

    # grid_sample maps the cell to the 8x8 source: a scale of 1.3 draws the digit about 12 pixels wide.
    spread = 0.15 if train else 0.05
    zoom = uniform(1.3 - spread, 1.3 + spread)
    angle = uniform(-0.25, 0.25) if train else torch.zeros(len(images))
    shear = uniform(-0.2, 0.2) if train else torch.zeros(len(images))
    theta = torch.stack(
        [
            torch.stack([zoom * angle.cos(), zoom * (shear - angle.sin()), uniform(-0.25, 0.25)], -1),
            torch.stack([zoom * angle.sin(), zoom * angle.cos(), uniform(-0.25, 0.25)], -1),
        ],
        dim=1,
    )
    grid = torch.nn.functional.affine_grid(theta, [len(images), 1, CELL, CELL], align_corners=False)
    drawn = torch.nn.functional.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)[:, 0]
    labels = data.target[ids].repeat(variants)
    coverage = (drawn.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return coverage, tuple(np.flatnonzero(labels == digit) for digit in range(10))


@cache
def clutter_table() -> np.ndarray:
    """Gratings and blobs that are neither letter nor digit: `(n, CELL, CELL)` uint8 coverage."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[0:CELL, 0:CELL] - (CELL - 1) / 2
    tiles = []
    for i in range(_CLUTTER):
        angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        if i % 2:
            period = rng.uniform(3, 6)
            tile = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase) > 0
        else:
            along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
            tile = (along / rng.uniform(4, 8)) ** 2 + (across / rng.uniform(3, 6)) ** 2 < 1
        tiles.append(tile * rng.uniform(0.3, 1.0))
    return (np.stack(tiles) * 255).astype(np.uint8)
