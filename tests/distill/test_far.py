"""`python -m bench.runs.far`: each row is asked the same questions, once, and the page tells them with intervals."""

import json

import numpy as np
import pytest
import torch
import typer
from small_run import run_values, save_teacher
from typer.testing import CliRunner

from bench.runs import far
from bench.runs.far_page import NEAR_KEPT, ZERO, ratio
from bench.runs.table import Results
from linmu_distill.config import parse_config
from linmu_distill.evaluation import Result, evaluate
from linmu_distill.limited import EQUAL_MEMORY
from linmu_distill.student import exact_alone
from linmu_ops.nn import exact

BLOCK = {"window": [1, 2, 2], "image_window": [1, 2, 2], "text_window": 4, "sink_tokens": 1, "kept_tokens": 4}


@pytest.fixture
def config(tmp_path):
    values = run_values(tmp_path, save_teacher(tmp_path / "teacher"), preset="exact", student=BLOCK)
    return parse_config(values)


def test_questions_are_every_length_of_every_number_of_keys():
    labels = [one.label for one in far.questions(["needle", "needles", "tracking", "page"], [8, 64], [1, 32])]
    assert len(labels) == len(set(labels)) == 2 + 4 + 6 + 2
    assert {
        "needle, 8 frames",
        "needles, 1 key, 8 frames",
        "needles, 32 keys, 64 frames",
        "tracking, 4 hops, 64 frames",
        "page, 96 lines",
    } <= {*labels}


def test_rows_are_asked_once_and_told(config, tmp_path, monkeypatch):
    asked, calls = far.questions(["needles"], [2, 3], [1, 4]), []
    results = Results(tmp_path / "far.jsonl")

    def evaluate(model, tokenizer, group, n, seed, *, split, first, **options):
        calls.append((model, split))
        assert first == 0
        alone = isinstance(model, far.linmu_models.modeling.LinmuModel)
        return Result(
            group, split, n, n - alone, 0.1, (True,) * (n - alone) + (False,) * alone, {}, (0.0, 1.0, 0.5, 0.6)
        )

    monkeypatch.setattr(far, "evaluate", evaluate)
    models = far.Models(config, [])
    for _ in range(2):
        for line in far.missing(models, list(far.ROWS), asked, 4, 2, "val", results):
            results.append(line)
    lines = [json.loads(line) for line in (tmp_path / "far.jsonl").read_text().splitlines()]
    # Two rows of the teacher and windows alone with one seed, two of students with two.
    assert len(lines) == len(calls) == 4 * (3 + 2 * 2)
    assert len({id(model) for model, _ in calls}) >= 3 and {split for _, split in calls} == {"val"}
    text = far.write_page(results, tmp_path).read_text()
    assert "| teacher | 100% (51%-100%) | 100% (51%-100%) |" in text
    shares = [line for line in text.splitlines() if line.startswith("| zero steps | 75%") and "2 seeds" in line]
    assert len(shares) == 2 and all(line.count(", 2 seeds)") == 2 for line in shares)
    assert "| zero steps | +0.0" in text and "| needles, 4 keys, 3 frames | zero steps | 2 of 2 |" in text
    assert "1 key:" in text and "4 keys:" in text and "val" in text


def test_each_row_is_what_it_says(config):
    models = far.Models(config, [])
    student, blocks = models._start(0)
    for row in ("windows alone", "near + kept", ZERO):
        model, context = models.of(row, 0)
        with context:
            assert model is student
            assert all((block.share.bias == -1e4).all() == (row != ZERO) for block in blocks)
            assert all(block.windows.sizes.kept == (0 if row == "windows alone" else 4) for block in blocks)
    before = [block.share.bias.clone() for block in blocks]
    for block in blocks:
        block.far_limit.fill_(9)
    models._trained[0] = student
    for row, kept, less in zip(
        far.VARIANTS, (256, 1024, 256, 128, 128, 128), (1e4 - exact._CLOSED,) * 2 + (0, 2, -2, 0), strict=True
    ):
        model, context = models.of(row, 0)
        with context:
            assert model is student and all(block.windows.sizes.kept == kept for block in blocks)
            for block, bias in zip(blocks, before, strict=True):
                torch.testing.assert_close(block.share.bias, bias - less)
            assert all((block.far_limit == exact.NO_LIMIT) == (row == "trained, no far_limit") for block in blocks)
    model, context = models.of(EQUAL_MEMORY, 0)
    with context:
        assert model is models.teacher and model.get_decoder().config._attn_implementation == "linmu_limited"
    assert exact_alone is far.exact_alone and models._start(0)[0] is student
    assert models._start(1)[0] is not student


def test_parts_are_asked_of_all_rows_in_turn_and_make_one_whole(config, tmp_path, monkeypatch):
    """More questions go on after those there are; of long videos fewer are asked; parts give what one call gives."""
    monkeypatch.setattr(far, "PART", 3)
    monkeypatch.setattr(far, "FULL", 4)
    asked, rows = far.questions(["needle"], [2, 8], []), [far.TEACHER, NEAR_KEPT]
    results, models = Results(tmp_path / "far.jsonl"), far.Models(config, [])
    order = []
    for samples in (3, 8):
        for line in far.missing(models, rows, asked, samples, 1, "test", results):
            results.append(line)
            order.append((line["row"], line["options"]["frames"][0], line["first"], line["samples"]))
    spans = [(2, 0, 3), (8, 0, 1), (2, 3, 3), (8, 1, 2), (2, 6, 2), (8, 3, 1)]
    assert order == [(row, *span) for span in spans for row in rows]
    model, context = models.of(NEAR_KEPT, 0)
    with context:
        whole = [evaluate(model, models.tokenizer, "needle", 8, 2024, split="test", frames=[2, 2])]
        whole += [evaluate(model, models.tokenizer, "needle", 4, 2024, split="test", frames=[8, 8])]
    for frames, one in zip((2, 8), whole, strict=True):
        parts = [
            line
            for line in results.read().values()
            if line["row"] == NEAR_KEPT and line["options"]["frames"][0] == frames
        ]
        assert "".join(line["right"] for line in parts) == "".join(str(int(hit)) for hit in one.hits)
    text = far.write_page(results, tmp_path).read_text()
    assert "| row | 2 frames (n = 8) | 8 frames (n = 4) |" in text and "split `test`" in text


def test_a_tower_sees_the_same_numbers_once():
    seen = []

    class Tower(torch.nn.Linear):
        def forward(self, numbers, grid=None):
            seen.append(numbers)
            return super().forward(numbers)

    tower = Tower(3, 2)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    with torch.no_grad(), far.remembered(tower):
        first = tower(a, grid=torch.tensor([4]))
        again = tower(a.clone(), grid=torch.tensor([4]))
        assert torch.equal(again, first) and again is not first and len(seen) == 1
        assert torch.allclose(tower(b, grid=torch.tensor([4])), b @ tower.weight.T + tower.bias) and len(seen) == 2
        tower(a, grid=torch.tensor([2, 2]))
        assert len(seen) == 3
    tower(a)
    assert len(seen) == 4


def test_a_ratio_is_paired_with_the_teachers_answers():
    theirs = np.array([[1.0] * 90 + [0.0] * 10])
    same = ratio(theirs, theirs)
    assert same[0] == 1 and 0.95 < same[1] < 1 < same[2] < 1.05  # never without doubt
    fewer = theirs.copy()
    fewer[0, :9] = 0
    mean, low, high = ratio(np.concatenate([theirs, fewer]), theirs)
    assert mean == pytest.approx(0.95) and low < 0.95 < high
    independent = ratio(theirs[:, ::-1], theirs)
    assert independent[0] == 1 and independent[2] - independent[1] > 2 * (same[2] - same[1])
    assert ratio(theirs, 0 * theirs) is None


def test_a_trained_row_is_told_by_seed_and_beside_near_and_kept(tmp_path):
    results = Results(tmp_path / "far.jsonl")
    facts = {"key": "", "group": "needle", "options": {"frames": [64, 64]}, "split": "test", "by_depth": [[1, 2]] * 4,
             "samples": 4, "commit": "abc", "device": "a CPU", "isa": "avx2"}  # fmt: skip
    for row, seed, right in ((far.TEACHER, 0, "11111111"), (far.TRAINED, 0, "11110000"), (far.TRAINED, 1, "11111111"),
                             (NEAR_KEPT, 0, "1100"), (NEAR_KEPT, 1, "1111")):  # fmt: skip
        for first in range(0, len(right), 4):
            line = {**facts, "row": row, "seed": seed, "first": first, "right": right[first : first + 4]}
            results.append({**line, "key": f"{seed} {first}"})
    text = far.write_page(results, tmp_path).read_text()
    assert "| trained, seed 0 | 50% (" in text and "| trained, seed 1 | 100% (" in text
    assert "| near + kept | 75% (" in text and ", 2 seeds, n = 4) |" in text
    assert "| trained | +25.0 (" in text  # of the four questions that both were asked
    assert "at abc, on a CPU, avx2." in text


def test_what_cannot_be_asked_is_said(tmp_path):
    app = typer.Typer()
    app.command()(far.main)
    for wrong, line in (
        (["--row", "x"], "--row must be among"),
        (["--group", "x"], "--group must be among"),
        (["--split", "train"], "--split must be among val"),
        (["--run", str(tmp_path)], "--run must be the folder of a finished run"),
        (["--frames", "2", "--keys", "9", "--group", "needles"], "keys must be at most 8 in 2 frames"),
    ):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2 and line in " ".join(done.output.replace("│", " ").split())
