"""From what processors pass to blocks: arrangement of tiles, newlines, conversations in parts, errors."""

from __future__ import annotations

import numpy as np
import pytest

from linmu_models.adapters._anyres import rows_with_newline
from linmu_models.adapters.smolvlm import tiles_to_units
from linmu_models.adapters.video_llama_3 import _compressed
from linmu_models.layout import Placeholders, VisualUnit, build_layout, grids_to_units


def grids(units):
    return [block.grid for unit in units for block in unit.blocks]


def tiles(*gaps, tokens=4):
    """Positions of tiles with that many tokens of text before each."""
    at, out = 0, []
    for gap in gaps:
        at += gap
        out += range(at, at + tokens)
        at += tokens
    return np.array(out)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ((2,), [(1, 2, 2)]),
        ((5, 2, 2, 3, 2, 2, 4), [(1, 4, 6), (1, 2, 2)]),
        ((5, 2, 2, 3, 2, 2, 3), [(1, 4, 6), (1, 2, 2)]),  # both line breaks before the whole image as one token
        ((5, 2, 3, 5, 2, 3, 2, 4), [(1, 2, 4), (1, 2, 2), (1, 4, 4), (1, 2, 2)]),
        ((9, 9, 9), [(1, 2, 2)] * 3),  # frames of a video
        ((5, 3, 3, 4), [(1, 2, 2)] * 4),  # one column: nothing to join
    ],
)
def test_tiles_are_joined_as_they_were_split(gaps, expected):
    assert grids(tiles_to_units(tiles(*gaps), 2)) == expected


def test_joined_tiles_are_read_row_by_row():
    unit = tiles_to_units(tiles(5, 2, 4), 2)[0]
    # Two tiles side by side: the first row of the grid is the first row of tile 0, then of tile 1.
    assert unit.blocks[0].offsets.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    with pytest.raises(ValueError, match="whole tiles of 4 tokens, got 7"):
        tiles_to_units(np.arange(7), 2)


def test_newlines_and_class_tokens_are_text():
    assert rows_with_newline(2, 3).blocks[0].offsets.tolist() == [0, 1, 2, 4, 5, 6]
    assert VisualUnit.of_square(10).blocks[0].offsets.tolist() == list(range(1, 10))
    assert VisualUnit.of_square(7).blocks[0].grid == (1, 1, 7)
    unit = VisualUnit.joined([VisualUnit.of_grid(1, 1, 2), rows_with_newline(1, 2)])
    assert (unit.tokens, unit.blocks[1].offsets.tolist()) == (5, [2, 3])


def test_frames_that_lost_tokens_are_rows():
    units = grids_to_units([[2, 4, 6]], 2)
    kept = np.ones(12, bool)
    assert grids(_compressed(units, kept)) == [(2, 2, 3)]
    kept[1] = False
    (unit,) = _compressed(units, kept)
    assert grids([unit]) == [(1, 1, 5), (1, 1, 6)] and unit.tokens == 11


def test_units_of_a_conversation():
    units = grids_to_units([[1, 2, 2], [1, 2, 4], [2, 2, 2]], 2)
    mask = np.zeros((1, 8), bool)
    mask[0, [1, 3, 4, 6, 7]] = True
    layout = build_layout([Placeholders(mask, units)], 1, 8)
    assert layout.blocks.tolist() == [[0, 1, 1, 1], [0, 1, 1, 2], [0, 2, 1, 1]]
    assert layout.positions.tolist() == [1, 3, 4, 6, 7]
    # The last part of it: what came before is in the cache.
    assert build_layout([Placeholders(mask[:, 5:], units)], 1, 3).blocks.tolist() == [[0, 2, 1, 1]]
    assert build_layout([Placeholders(mask[:, :1], units)], 1, 1) is None
    with pytest.raises(ValueError, match=r"of whole images and videos of \[1, 2, 2\] tokens, got 1"):
        build_layout([Placeholders(mask[:, 7:], units)], 1, 1)
    with pytest.raises(ValueError, match=r"of whole images and videos of \[1, 2, 2\] tokens, got 3"):
        build_layout([Placeholders(mask[:, :5].repeat(1, 0), units)], 1, 5)
    # In a batch it cannot be told which rows the last images belong to.
    with pytest.raises(ValueError, match="got 4"):
        build_layout([Placeholders(mask[:, 5:].repeat(2, 0), [*units, *units])], 2, 3)
    with pytest.raises(ValueError, match="must lie in one row of input_ids, got rows 0 to 1"):
        build_layout([Placeholders(np.array([[0, 1], [1, 0]], bool), grids_to_units([[2, 2, 2]], 2))], 2, 2)


def test_two_modalities_are_sorted_by_place():
    images, videos = np.zeros((2, 6), bool), np.zeros((2, 6), bool)
    images[0, 4] = images[1, 0] = True
    videos[0, 1:3] = True
    given = [
        Placeholders(images, grids_to_units([[1, 2, 2], [1, 2, 2]], 2)),
        Placeholders(videos, grids_to_units([[2, 2, 2]], 2)),
    ]
    layout = build_layout(given, 2, 6)
    assert layout.blocks.tolist() == [[0, 2, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    assert layout.positions.tolist() == [1, 2, 4, 0]
