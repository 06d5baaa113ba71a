"""A table of two rows and two seeds on a random teacher: cut short, gone on with, its page; the intervals; mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_run import save_teacher
from typer.testing import CliRunner

from bench.runs.page import Page, accuracy, difference, draw
from bench.runs.run import app, run_table
from bench.runs.table import Results, Table, merged
from linmu_distill.config import ConfigError
from linmu_distill.evaluation import wilson_interval
from linmu_distill.run import RunError
from linmu_distill.train import StageTrainer
from linmu_models.saving import locked

SHIPPED = Path(__file__).parents[2] / "bench/runs/tables"
BASE = """
output = "{output}/base"
preset = "paper"
teacher = "{teacher}"
max_new_tokens = 3
data = {{batch_size = 2, mixture = {{where = 1}}}}
evaluation = {{samples = {{where = 3}}}}
checkpoint_every = 1
stage1 = {{steps = 1}}
stage2 = {{steps = 0}}
stage3 = {{steps = 2}}
"""
TABLE = """
title = "Two rows"
base = "base.toml"
seeds = 2
held_out = 2
results = "{output}/results"
reports = "{output}/reports"

[[rows]]
name = "first"

[[rows]]
name = "start"
of = "first"
after = 0

[[rows]]
name = "other"
about = "causal"
set.student.reverse = false

[curves.pages]
group = "where"
option = "sizes"
values = [[[2, 8]], [[4, 8]]]
samples = 2
trained = 2
"""


def _write(folder, table=TABLE, teacher="none"):
    (folder / "base.toml").write_text(BASE.format(output=folder / "runs", teacher=teacher))
    path = folder / "two.toml"
    path.write_text(table.format(output=folder))
    return path


def test_a_table_is_gone_on_with_and_has_a_page(tmp_path, monkeypatch):
    path = _write(tmp_path, teacher=save_teacher(tmp_path / "teacher"))
    steps, original = [], StageTrainer._step

    def step(self, objective, optimizer, number):
        steps.append((self.folder.parent.parent.name, self.folder.parent.name, self.stage.number, number))
        if len(steps) == 6:
            raise KeyboardInterrupt
        return original(self, objective, optimizer, number)

    monkeypatch.setattr(StageTrainer, "_step", step)
    runner = CliRunner()
    done = runner.invoke(app, [str(path)])
    assert done.exit_code == 130 and "goes on" in done.output
    results, page = tmp_path / "results/two.jsonl", tmp_path / "reports/two.md"
    assert [json.loads(line)["row"] for line in results.read_text().splitlines()] == ["teacher", "first", "start"]
    assert "| other | causal | `student.reverse = false` | 0 |" in page.read_text()
    done = runner.invoke(app, [str(path)])
    assert done.exit_code == 0, done.output
    # Two rows, two seeds, three steps; the one that was cut short is the only one begun twice.
    assert len(steps) == 13 and len(set(steps)) == 12
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["row"], r["seed"]) for r in records] == [
        ("teacher", None), *((row, seed) for seed in (0, 1) for row in ("first", "start", "other"))
    ]  # fmt: skip
    assert {r["commit"] for r in records} and all(r["versions"]["torch"] for r in records)
    assert all(len(r["scores"]["where"]["right"]) == r["scores"]["where"]["n"] == 3 for r in records)
    first, start, other = records[1:4]
    assert (first["steps"], start["steps"], other["set"]) == (3, 0, {"student": {"reverse": False}})
    assert first["losses"].keys() == {"stage1", "stage3"} and first["losses"]["stage1"]["hidden"] > 0
    assert abs(records[0]["scores"]["where"]["kl"]) < 1e-6 < first["scores"]["where"]["kl"]
    assert [point["value"] for point in first["curves"]["pages"]] == [[[2, 8]], [[4, 8]]]
    text = page.read_text()
    assert "| other | causal | `student.reverse = false` | 2 |" in text and "against first" in text
    assert all((page.parent / name).stat().st_size > 500 for name in ("two.svg", "two_pages.svg"))
    assert "| sizes | 2 | 4 |" in text
    before = results.read_text()
    run_table(path)
    assert results.read_text() == before and len(steps) == 13
    # The same runs under another table and other names are not made again.
    again = tmp_path / "again.toml"
    again.write_text(path.read_text().replace('"other"', '"causal"'))
    run_table(again)
    others = [json.loads(line) for line in (results.parent / "again.jsonl").read_text().splitlines()]
    assert len(steps) == 13 and others == [
        {**record, "from": "two", "row": record["row"].replace("other", "causal")} for record in records
    ]
    # A row that is not what it was: its lines are not shown, and its folder is not taken for its own.
    path.write_text(path.read_text().replace("reverse = false", "z_gate = true"))
    with pytest.raises(RunError, match=r"other/0 holds a run with other options; delete it, or rename the row"):
        run_table(path, ["other"])
    assert "2 lines of" in run_table(path, ["first"]).read_text()


@pytest.mark.sweep
def test_processes_share_a_table(tmp_path, capsys):
    """What another process holds is passed over; when it is free again and has a result, there is nothing to do."""
    path = _write(tmp_path, teacher=save_teacher(tmp_path / "teacher"))
    table, results = Table(path), tmp_path / "results/two.jsonl"

    def done():
        return [(r["row"], r["seed"]) for r in map(json.loads, results.read_text().splitlines())]

    with locked(table.run_config(table.row("first"), 0).folder) as mine, locked(tmp_path / "runs/two/teacher"):
        assert mine
        run_table(path, seeds=1)
    assert done() == [("other", 0)]
    assert "other processes are at: first 0, start 0" in capsys.readouterr().err
    run_table(path, seeds=1)
    assert done() == [("other", 0), ("teacher", None), ("first", 0), ("start", 0)]


@pytest.mark.parametrize(
    "old, new, line",
    [
        ("held_out = 2", "heldout = 2", "two.toml: heldout: unknown key"),
        ("after = 0", "", "two.toml: rows.1: of and after belong together, without set"),
        ('about = "causal"', 'lora_alone = "("', "two.toml: rows.2: lora_alone must be a regular expression, got '('"),
        ('of = "first"', 'of = "none"', "two.toml: rows.start.of must name a row that is run, got none"),
        ('name = "other"', 'name = "first"', "two.toml: rows: a name must occur once"),
        ("set.student.reverse = false", "set.stage2.steps = 4", "as many steps in all, got first 3, other 7"),
        ("set.student.reverse = false", "set.stage9.steps = 4", "two.toml: other: stage9: unknown key"),
        ("set.student.reverse = false", "set.evaluation.samples = 4", "rows.other must be scored as the first"),
        ('base = "base.toml"', 'base = "base.tml"', "No such file"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, old, new, line):
    assert old in TABLE
    with pytest.raises(ConfigError) as error:
        Table(_write(tmp_path, TABLE.replace(old, new)))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_of_another_project_is_part_of_its_rows_key(tmp_path):
    plain = Table(_write(tmp_path))
    other = Table(_write(tmp_path, TABLE.replace('about = "causal"', r"lora_alone = '.*c_proj'")))
    assert plain.key(plain.row("first"), 0) == other.key(other.row("first"), 0)
    assert plain.key(plain.row("other"), 0) != other.key(other.row("other"), 0)
    page = Page(other, Results(tmp_path / "none.jsonl"))
    assert r"`lora_alone = '.*c_proj'`" in page.row_table()


def test_rows_may_differ_in_compute_where_the_table_says_why(tmp_path):
    table = TABLE.replace("set.student.reverse = false", "set.stage2.steps = 4")
    assert Table(_write(tmp_path, 'unequal_compute = "to see what more buys"\n' + table)).runs[1].set


def test_options_of_the_command(tmp_path):
    done = CliRunner().invoke(app, ["--row", "none", str(_write(tmp_path))])
    assert done.exit_code == 1 and done.stderr == "linmu: --row must be among first, start, other, got none\n"
    assert CliRunner().invoke(app, [str(tmp_path / "two.toml"), "--seeds", "0"]).exit_code == 2


@pytest.mark.parametrize("text", [None, b"name = \xe9", b"name ="])
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "x.toml").write_bytes(text)
    for path in (tmp_path / "x.toml", tmp_path, ""):
        done = CliRunner().invoke(app, [str(path)])
        assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("linmu: ")


TABLES = sorted(path for path in SHIPPED.glob("*.toml") if not path.stem.endswith("base"))


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_shipped_tables_are_valid(path):
    table = Table(path)
    # What training has to beat.
    untrained = [row for row in table.config.rows if row.of and row.after == 0]
    parts = {row.alone for row in untrained}
    assert {None, "equal-memory"} <= parts
    is_exact = any(table.run_config(table.row(row.of), 0).preset == "exact" for row in untrained)
    assert ({"windows", "near-kept"} <= parts) == is_exact
    assert table.config.seeds == 3 and not table.config.unequal_compute
    for row in table.runs:
        assert table.run_config(row, 0).block


def test_plots_of_a_page_are_drawn_from_its_rows(tmp_path):
    """Also where the options of its rows have changed since."""
    table = Table(SHIPPED / "breaking.toml")
    results = Results(SHIPPED.parents[1] / "results" / "ablations" / "breaking.jsonl")
    drawn = draw(table, results, tmp_path)
    assert [path.name for path in drawn] == ["breaking.svg", "breaking_needle.svg", "breaking_read.svg"]
    text = (SHIPPED.parents[1] / "reports" / "breaking.md").read_text()
    for path in drawn:
        assert path.stat().st_size > 10_000 and f"draws `{path.name}`" in text


def test_tables_are_merged_and_all_else_is_replaced():
    assert merged({"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "d": 1}


def test_seeds_that_agree_are_one_sample():
    right = (np.arange(100) < 30).astype(float)
    mean, low, high = accuracy([np.stack([right] * 3)])
    assert (mean, low, high) == pytest.approx((0.3, *wilson_interval(30, 100)), abs=2e-3)
    mean, low, high = accuracy([np.zeros((3, 50))])
    assert (mean, low) == (0, 0) and 0.05 < high < 0.1
    mean, low, high = difference([np.zeros((3, 50))], [np.zeros((3, 50))])
    assert mean == 0 and -0.1 < low < 0 < high < 0.1


def test_intervals_hold_what_they_promise():
    """Students whose skill depends on the seed, on samples of unlike difficulty: 95 % of intervals hold the truth."""
    rng = np.random.default_rng(0)

    def runs(skill, difficulty):
        own = skill + rng.normal(0, 0.4, (3, 1))
        return (own - difficulty + rng.logistic(size=(3, len(difficulty))) > 0).astype(float)

    truths = {skill: np.mean([runs(skill, rng.normal(0, 1, 1000)).mean() for _ in range(300)]) for skill in (0.0, 0.5)}
    held = np.zeros(2)
    for _ in range(400):
        difficulty = rng.normal(0, 1, 100)
        ours, theirs = [runs(0.5, difficulty)], [runs(0.0, difficulty)]
        _, low, high = accuracy(ours)
        held[0] += low <= truths[0.5] <= high
        _, low, high = difference(ours, theirs)
        held[1] += low <= truths[0.5] - truths[0.0] <= high
    assert (held / 400 > 0.93).all()


def test_recall_counts_right_answers(tmp_path, monkeypatch):
    from bench.runs import recall

    keys, values, asked, answers = recall.sequences(3, 8, 0)
    held = [dict(zip(k, v, strict=True)) for k, v in zip(keys.tolist(), values.tolist(), strict=True)]
    assert all(len(pairs) == 8 for pairs in held)
    assert [[pairs[k] for k in row] for pairs, row in zip(held, asked.tolist(), strict=True)] == answers.tolist()
    monkeypatch.setattr(recall, "MIXERS", {"attention": (False, 4), "scan": (True, 4)})
    results = recall.Results(tmp_path / "recall.jsonl")
    page = recall.run((2, 4), 1, 10, results, tmp_path)
    before = results.path.read_text()
    assert len(before.splitlines()) == 4 and "| pairs | 2 | 4 |" in page.read_text()
    recall.run((2, 4), 1, 10, results, tmp_path)
    assert results.path.read_text() == before and (tmp_path / "recall.svg").exists()
