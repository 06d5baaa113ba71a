"""`python -m bench.runs.far`: each row is asked the same questions, once, and the page tells them with intervals."""

import json

import pytest
import typer
from small_run import run_values, save_teacher
from typer.testing import CliRunner

from bench.runs import far
from bench.runs.table import Results
from linmu_distill.config import parse_config
from linmu_distill.evaluation import Result
from linmu_distill.limited import EQUAL_MEMORY
from linmu_distill.student import exact_alone

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

    def evaluate(model, tokenizer, group, n, seed, *, split, **options):
        calls.append((model, split))
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
    assert len(lines) == len(calls) == 4 * (2 + 3 * 2)  # two rows of the teacher, three of students with two seeds
    assert len({id(model) for model, _ in calls}) >= 3 and {split for _, split in calls} == {"val"}
    text = far.write_page(results, tmp_path, 4, "val").read_text()
    assert "| teacher | 100% (51%-100%) | 100% (51%-100%) |" in text
    assert text.count(", 2 seeds)") == 12 and "| needles, 4 keys, 3 frames | zero steps | 2 of 2 |" in text
    assert "1 key:" in text and "4 keys:" in text and "val" in text


def test_each_row_is_what_it_says(config):
    models = far.Models(config, [])
    student, blocks = models._start(0)
    for row in ("windows alone", "near + kept", far.ZERO):
        model, context = models.of(row, 0)
        with context:
            assert model is student
            assert all((block.share.bias == -1e4).all() == (row != far.ZERO) for block in blocks)
            assert all(block.windows.sizes.kept == (0 if row == "windows alone" else 4) for block in blocks)
    model, context = models.of(EQUAL_MEMORY, 0)
    with context:
        assert model is models.teacher and model.get_decoder().config._attn_implementation == "linmu_limited"
    assert exact_alone is far.exact_alone and models._start(0)[0] is student
    assert models._start(1)[0] is not student


def test_what_cannot_be_asked_is_said():
    app = typer.Typer()
    app.command()(far.main)
    for wrong, line in (
        (["--row", "x"], "--row must be among"),
        (["--group", "read"], "--group must be among"),
        (["--split", "train"], "--split must be among val"),
        (["--frames", "2", "--keys", "9", "--group", "needles"], "keys must be at most 8 in 2 frames"),
    ):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2 and line in " ".join(done.output.replace("│", " ").split())
