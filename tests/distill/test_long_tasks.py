"""Groups whose answer lies beyond any window: what is drawn, what is asked, and that guessing does not pay."""

from collections import Counter

import numpy as np
import pytest

from linmu_distill.data import CLASSES, LONG_GROUPS, generate
from linmu_distill.data.assets import is_letter
from linmu_distill.evaluation import blind_baseline


def _texts(sample):
    """(frame, row, what is written there), in reading order."""
    found = []
    for frame, rows in enumerate(sample.cells):
        for row, cells in enumerate(rows):
            text = "".join(CLASSES[c] for c in cells).strip("-")
            found += [(frame, row, text)] if text else []
    return found


@pytest.mark.parametrize("frames, keys", [(2, 8), (8, 1), (8, 4), (8, 16), (8, 32), (64, 32)])
def test_each_key_stands_once_before_its_digit(frames, keys):
    for sample in generate("needles", 12, 0, "val", turns=3, frames=(frames, frames), keys=keys):
        texts = _texts(sample)
        names, digits = [text[:-1] for *_, text in texts], [text[-1] for *_, text in texts]
        assert len(texts) == len(set(names)) == keys and sample.cells.shape == (frames, 4, 8)
        assert {len(name) for name in names} == {1 if keys <= 26 else 2} and all(digit.isdigit() for digit in digits)
        for question, answer in sample.turns:
            assert digits[names.index(question.removesuffix(" digit"))] == answer
        first = names.index(sample.turns[0][0].removesuffix(" digit"))
        assert sample.depth == texts[first][0] / (frames - 1) and len(sample.turns) == min(3, keys)


def test_what_is_asked_lies_at_the_depth_that_is_wanted():
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.75, 1.0), (0.5, 0.5)):
        options = {"frames": (9, 9), "keys": 6, "depth": (low, high)}
        depths = [sample.depth for sample in generate("needles", 40, 0, "val", **options)]
        assert all(low <= depth <= high for depth in depths) and len(set(depths)) == round((high - low) * 8) + 1
    even = [sample.depth for sample in generate("needles", 900, 0, "val", frames=(9, 9), keys=6)]
    counts = np.array(list(Counter(even).values()))
    assert len(counts) == 9 and counts.min() > 60 and counts.max() < 140


def test_guessing_finds_one_in_ten_and_a_digit_of_the_video_little_more():
    short = {"frames": (2, 2)}
    assert blind_baseline("needles", 400, 1, **short) < 0.2
    samples = generate("needles", 400, 1, "val", frames=(4, 4), keys=16)
    assert 0.05 < np.mean([s.turns[0][1] == _texts(s)[0][2][-1] for s in samples]) < 0.25


@pytest.mark.parametrize("chains, hops, frames", [(1, 1, 2), (4, 2, 8), (3, 5, 12), (2, 12, 64)])
def test_values_follow_from_assignments_in_reading_order(chains, hops, frames):
    for sample in generate("tracking", 20, 0, "val", turns=9, chains=chains, hops=hops, frames=(frames, frames)):
        values, lengths, starts = {}, {}, {}
        for frame, _, (name, given) in _texts(sample):
            assert name not in values
            values[name] = given if given.isdigit() else values[given]
            lengths[name] = 0 if given.isdigit() else lengths[given] + 1
            starts[name] = frame if given.isdigit() else starts[given]
        assert len(values) == chains * (hops + 1) and len(sample.turns) == chains
        for question, answer in sample.turns:
            name = question.removeprefix("value of ")
            assert values[name] == answer and lengths[name] == hops
        assert sample.depth == starts[sample.turns[0][0][-1]] / (frames - 1)


def test_a_page_is_longer_than_a_window_of_text():
    for sample in generate("page", 20, 0, "val"):
        ((question, answer),) = sample.turns
        k = int(question.removeprefix("line ")) - 1
        assert "".join(CLASSES[c] for c in sample.cells[0, k]) == answer and sample.depth == k / 47
        assert sample.cells.size == 384 and not sample.is_video and is_letter(sample.cells[0, k]).any()
    (longer,) = generate("page", 1, 0, "val", sizes=[(100, 8)])
    assert longer.cells.shape == (1, 100, 8)


@pytest.mark.parametrize(
    "group, options, line",
    [
        ("needles", {"keys": 0}, "keys must be at least 1"),
        ("needles", {"keys": 9, "frames": (2, 2)}, "keys must be at most 8 in 2 frames of 4 rows, got 9"),
        ("needles", {"depth": (0.5, 0.25)}, "depth must be"),
        ("needles", {"depth": (0, 1.5)}, "depth must be"),
        ("needles", {"depth": 0.5}, "depth must be"),
        ("needles", {"chains": 2}, "options of needles must be of frames, keys, depth"),
        ("tracking", {"chains": 9, "hops": 2}, r"chains x \(hops \+ 1\) must be at most 26, got 9 x 3"),
        ("tracking", {"hops": 0}, "hops must be at least 1"),
        ("tracking", {"frames": (2, 2), "chains": 3, "hops": 2}, "must be at most 8 in 2 frames"),
        ("page", {"keys": 1}, "options of page must be of sizes"),
        ("needle", {"keys": 1}, "options of needle must be of frames"),
    ],
)
def test_what_cannot_be_drawn_is_said(group, options, line):
    with pytest.raises(ValueError, match=line):
        generate(group, 1, 0, "val", **options)
    with pytest.raises(TypeError, match="keys must be a whole number"):
        generate("needles", 1, 0, "val", keys=2.5)


def test_groups_that_the_teacher_knows_are_as_they_were():
    assert list(LONG_GROUPS) == ["needles", "tracking", "page"]
