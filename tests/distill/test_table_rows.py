"""What training has to beat, as rows of a table: they look at the untrained student, and at a teacher that forgets."""

import json

import pytest
from small_run import save_teacher

from bench.runs.run import run_table
from bench.runs.table import Table
from linmu_distill.config import ConfigError

BASE = """
output = "{output}/base"
preset = "{preset}"
teacher = "{teacher}"
max_new_tokens = 3
data = {{batch_size = 2, mixture = {{where = 1}}}}
evaluation = {{samples = {{needle = 3}}}}
{student}
stage1 = {{steps = 1}}
stage2 = {{steps = 0}}
stage3 = {{steps = 0}}
"""
STUDENT = "student = {window = [1, 2, 2], image_window = [1, 2, 2], text_window = 4, sink_tokens = 1, kept_tokens = 4}"
TABLE = """
title = "Rows"
base = "base.toml"
seeds = 1
needle_frames = 4
held_out = 2
results = "{output}/results"
reports = "{output}/reports"
[[rows]]
name = "first"
"""
LOOKS = {"equal-memory": "equal-memory", "windows-alone": "windows", "near-kept": "near-kept", "zero-steps": ""}


def _write(folder, preset="exact", student=STUDENT, teacher="none", looks=LOOKS):
    (folder / "base.toml").write_text(
        BASE.format(output=folder / "runs", preset=preset, student=student, teacher=teacher)
    )
    rows = "".join(
        f'[[rows]]\nname = "{name}"\nof = "first"\nafter = 0\n' + (f'alone = "{part}"\n' if part else "")
        for name, part in looks.items()
    )
    path = folder / "rows.toml"
    path.write_text(TABLE.format(output=folder) + rows)
    return path


def test_rows_are_scored_beside_the_run(tmp_path):
    path = _write(tmp_path, teacher=save_teacher(tmp_path / "teacher"))
    text = run_table(path).read_text()
    records = [json.loads(line) for line in (tmp_path / "results/rows.jsonl").read_text().splitlines()]
    assert [(r["row"], r["seed"]) for r in records] == [
        ("teacher", None), *((row, 0) for row in ("first", *LOOKS))
    ]  # fmt: skip
    kl = {r["row"]: r["scores"]["needle"]["kl"] for r in records}
    assert kl["teacher"] == pytest.approx(0, abs=1e-6) and len(set(kl.values())) == 6
    assert all(value > 1e-4 for row, value in kl.items() if row != "teacher")
    assert "| near-kept |  | `first` after stage 0, windows and kept tokens alone | 1 |" in text
    assert "`first` after stage 0: its teacher with as many bytes of cache" in text


def test_a_part_needs_a_block_that_has_it(tmp_path):
    paper = dict(preset="paper", student='student = {branches = "flex"}')
    assert Table(_write(tmp_path, **paper, looks={"e": "equal-memory", "z": ""}))
    with pytest.raises(ConfigError, match=r"rows\.w\.of must be of preset `exact`, got first"):
        Table(_write(tmp_path, **paper, looks={"w": "windows"}))
    path = _write(tmp_path)
    path.write_text(path.read_text().replace('name = "first"\n', 'name = "first"\nalone = "windows"\n'))
    with pytest.raises(ConfigError, match="alone must stand beside of and after"):
        Table(path)
