"""Training, validation and test: no sample of one can occur in another."""

import itertools

import numpy as np
import pytest

from linmu_distill.data import CLASSES, SPLITS, TASKS, assets, generate
from linmu_distill.data.assets import BLANK, LETTERS, is_letter
from linmu_distill.data.drawing import unlike_held_out

FAMILIES = {"train": "train", "val": "val", "val_font": "val", "test": "test", "test_font": "test"}
# The first sample of each group, as it was before there were three splits.
EXPECTED = (
    (("how many u", "u1"),),
    (("read", "1 drooping\n2 --begun-\n3 gilded--\n4 -rubbish"),),
    (("digit", "3"),),
)
SMALL = {"needle": {"frames": (3, 5)}, "needles": {"frames": (3, 5)}, "tracking": {"frames": (4, 6)}}


def _tiles(split):
    return {tile.tobytes() for tile in assets.digit_table(split)[0]}


def test_splits_share_no_word():
    words = {split: set(assets.words(split)) for split in SPLITS}
    assert {split: len(found) for split, found in words.items()} == {
        "train": 4781, "val": 1219, "val_font": 1219, "test": 1200, "test_font": 1200
    }  # fmt: skip
    for one, other in itertools.combinations(SPLITS, 2):
        assert (words[one] == words[other]) == (FAMILIES[one] == FAMILIES[other])
        assert words[one] == words[other] or not words[one] & words[other]
    assert assets.held_out_words() == words["val"] | words["test"]


def test_splits_share_no_picture_of_a_digit():
    train, val = set(assets.digit_ids("train")), set(assets.digit_ids("val"))
    assert not train & val and len(train) + len(val) == 1797 and val == set(assets.digit_ids("test"))
    tiles = {split: _tiles(split) for split in ("train", "val", "test")}
    for one, other in itertools.combinations(tiles, 2):
        assert not tiles[one] & tiles[other]
    for digit in range(10):  # and every split has some of each
        assert all(len(assets.digit_table(split)[1][digit]) > 100 for split in tiles)


def test_one_family_of_fonts_is_held_out():
    seen = {assets.glyph_faces()[i][0] for i in assets.face_indices("train")}
    for split in SPLITS:
        families = {assets.glyph_faces()[i][0] for i in assets.face_indices(split)}
        assert families == ({"liberation"} if split.endswith("_font") else seen)
    assert len(seen) == 11 and "liberation" not in seen
    glyphs = assets.glyph_table()
    for letter in range(26):
        shown = {tile.tobytes() for face in assets.face_indices("train") for tile in glyphs[face, :, 0, letter]}
        held_out = {tile.tobytes() for face in assets.face_indices("val_font") for tile in glyphs[face, :, 0, letter]}
        assert not shown & held_out


def test_a_line_of_training_is_never_a_held_out_word():
    for word in assets.held_out_words():
        for line in (word, word.ljust(8, BLANK), word.rjust(9, BLANK)):
            changed = unlike_held_out(line)
            assert changed.strip(BLANK) not in assets.held_out_words() and len(changed) == len(line)
            assert changed.strip(BLANK)[1:] == word[1:]
    for word in (*assets.words("train")[::50], "--", "a-b", ""):
        assert unlike_held_out(word) == word


def _marks(sample, split):
    """What of a sample only this split can show: its words, and whether it has digits."""
    words = set()
    for row in sample.cells.reshape(-1, sample.cells.shape[-1]):
        text = "".join(CLASSES[c] if is_letter(np.array(c)) else BLANK for c in row).strip(BLANK)
        if text in assets.words(split):
            words.add(text)
    return words, bool((sample.cells > len(LETTERS)).any())


@pytest.mark.parametrize("group", TASKS)
def test_each_held_out_sample_shows_what_no_other_split_can(group):
    """A digit's picture, which other splits do not have, or a word, which none of their lines is."""
    for split in SPLITS[1:]:
        for sample in generate(group, 20, 3, split, turns=2, **SMALL.get(group, {})):
            words, digits = _marks(sample, split)
            assert words or digits
    for sample in generate(group, 60, 3, "train", turns=2, **SMALL.get(group, {})):
        assert not _marks(sample, "val")[0] and not _marks(sample, "test")[0]


def test_training_avoids_words_it_draws_by_chance(monkeypatch):
    """Random lines that would be held-out words are others: here all strings of three letters are words."""
    every = frozenset("".join(three) for three in itertools.product(LETTERS[1:], repeat=3))
    monkeypatch.setattr(assets, "held_out_words", lambda: every)
    monkeypatch.setattr(assets, "words", lambda split: ("abc",))
    assets.words_up_to.cache_clear()
    try:
        seen = generate("needle", 30, 0, "train", frames=(2, 3))
        lines = {"".join(CLASSES[c] for c in row[is_letter(row)]) for s in seen for row in s.cells.reshape(-1, 8)}
    finally:
        assets.words_up_to.cache_clear()
    assert len(lines - {""}) > 10 and not lines & every


def test_a_blank_page_is_none_of_the_held_out_ones(monkeypatch):
    from linmu_distill.data import tasks

    monkeypatch.setattr(tasks, "_digit_page", lambda rng, sizes: [BLANK * 8] * 2)
    held_out = generate("where", 20, 0, "val")
    assert any((s.cells > len(LETTERS)).any() for s in held_out)
    assert all((s.cells > 0).any() for s in held_out)
    assert not all((s.cells > 0).any() for s in generate("where", 20, 0, "train"))


def test_validation_is_what_results_on_file_were_measured_on():
    """Files from before there was a validation split call it test."""
    (sample,) = generate("where", 1, 2024, "val")
    (page,) = generate("read", 1, 2024, "val")
    (needle,) = generate("needle", 1, 2024, "val")
    assert (sample.turns, page.turns, needle.turns) == EXPECTED
    assert len({generate("read", 1, 2024, split)[0].turns for split in SPLITS}) == len(SPLITS)
