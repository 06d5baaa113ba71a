"""The bench of prompts that are reopened."""

from __future__ import annotations

import json

import torch

from bench.models import reopen
from bench.models.shapes import SHAPES, build


def test_rows_of_a_prompt_that_is_reopened(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert not reopen.main(["--shape", "tiny", "--tokens", "90", "700", "--repeats", "1", "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [90, 700]
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"] < rows[0]["file_bytes"]
    assert abs(rows[0]["file_bytes"] - rows[1]["file_bytes"]) < 64  # digits of the count of tokens
    assert all(row[name] > 0 for row in rows for name in reopen._TIMES) and rows[0]["device"]


def test_the_student_of_a_teacher_on_disk(tmp_path):
    build(SHAPES["tiny"], torch.float32, "cpu")[0].save_pretrained(tmp_path / "teacher")
    path, teacher = tmp_path / "rows.jsonl", str(tmp_path / "teacher")
    assert not reopen.main(["--teacher", teacher, "--tokens", "40", "--repeats", "1", "--json", str(path)])
    row = json.loads(path.read_text())
    assert row["shape"] == teacher and row["layers"] == 2 and row["load_seconds"] > 0
