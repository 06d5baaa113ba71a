"""The check of a decoder layer on a GPU, in its dry form: every step runs to its end, and a wrong one is told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from bench import check, layer
from bench.models.shapes import SHAPES
from bench.provenance import ROOT
from linmu_ops import _registry

TINY = SHAPES["tiny"].with_layers(layer.LAYERS)
SIZES = layer.Sizes(TINY, (320,), 0.0, TINY, 320)
ROWS = ("first token, 320 tokens", f"decode, batch {layer.BATCH}, 320 tokens")


def judge(rows):
    by_name = {row["what"]: row for row in rows}
    assert not [row for row in rows if "failed" in str(row.get("result"))]
    assert by_name["a small student: correct"]["result"].startswith("right: steps")
    for name in [
        *(f"{part}, 320 tokens" for part in layer.WANT_PARTS),
        *(f"{layer.LAYERS} layers, {row}{end}" for row in ROWS for end in ("", ", compiled")),
    ]:
        row = by_name[name]
        assert row["ms"] > 0 and row["peer_ms"] > 0 and row["peer"].startswith("transformers"), name
        assert row["result"] == "no GPU" and row["emulated"]


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(layer, "as_on_a_gpu", lambda session: contextlib.nullcontext())
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    return check.Session("layer", tmp_path, 1000, emulated=True)


def test_every_step_runs(session):
    layer.run_all(session, SIZES)
    judge([json.loads(line) for line in session.file.read_text().splitlines()])


def test_a_student_that_is_wrong_is_told(session, monkeypatch):
    """Not where it is as wrong as plain PyTorch."""
    exact, error = torch.zeros(1, 9, 4), torch.full((1, 9, 4), 0.01)
    for factor, result in ((1.5, "right: steps"), (2.5, "failed: AssertionError: prompt")):
        given = iter((exact + 1, exact + 1 + error, exact + 1 + factor * error))
        monkeypatch.setattr(layer, "_hidden", lambda student, tokens, given=given: next(given))
        session.step("correct", 1, lambda: layer.correct(session, SIZES))
        assert session.rows[-1]["result"].startswith(result)


@pytest.mark.sweep
def test_the_dry_form_runs_to_its_end(tmp_path):
    if shutil.which("cmake") is None or not _registry.binaries()["cpu"].loaded:
        pytest.skip("needs cmake, and liblinmu_cpu.so")
    command = [sys.executable, "-m", "bench.layer", "--emulate", "--seconds", "3000", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "layer.jsonl").read_text().splitlines()]
    judge(rows)
    assert done.stdout.rstrip().splitlines()[-len(rows)].startswith("machine")  # the table comes last


def test_the_shape_is_that_of_7b():
    text, small = layer.SHAPE.text, layer.SMALL.text
    assert text["num_hidden_layers"] == layer.LAYERS and text["hidden_size"] == 3584
    heads = {t["hidden_size"] // t["num_attention_heads"] for t in (text, small)}
    assert heads == {128}  # the same kernels


def test_a_step_ends_at_the_deadline(tmp_path):
    session = check.Session("layer", tmp_path, 0.2, emulated=True)

    def long():
        time.sleep(60)
        yield {}

    session.step("long", 0, long)
    assert session.rows[0]["result"] == "failed: TimeoutError: no time left"
