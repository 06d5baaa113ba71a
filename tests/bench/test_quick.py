"""The quick check of a GPU, in its dry form: every step runs to its end, and a step that fails says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types

import pytest

from bench import check, quick
from bench.provenance import ROOT
from linmu_ops import _registry


@pytest.mark.sweep
def test_the_dry_form_runs_to_its_end(tmp_path):
    if shutil.which("cmake") is None or not _registry.binaries()["cpu"].loaded:
        pytest.skip("needs cmake, and liblinmu_cpu.so")
    command = [sys.executable, "-m", "bench.quick", "--emulate", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "quick.jsonl").read_text().splitlines()]
    assert all(row["emulated"] for row in rows)
    by_name = {row["what"]: row for row in rows}
    for target in quick.TARGETS:
        assert by_name[f"{target.name}: correct"]["result"].startswith("right, the same bits twice")
    for target in (*quick.TARGETS, *quick.SMALL_OPS):
        assert by_name[target.name]["ms"] > 0
    assert by_name["machine"]["result"].startswith("copy_tbps")
    assert by_name["tests"]["result"].startswith("ok")
    assert done.stdout.rstrip().splitlines()[-len(rows)].startswith("machine")  # the table comes last


def test_targets_are_cases_of_their_benches():
    for target in (*quick.TARGETS, *quick.SMALL_OPS):
        bench, name = quick.bench_of(target, emulated=False)
        assert bench.cases[name].sizes.keys() >= target.changed.keys()
    assert len({t.name for t in quick.TARGETS}) == len(quick.TARGETS)


def test_a_step_that_fails_or_has_no_time_left_is_a_row(tmp_path):
    session = check.Session("quick", tmp_path, 100, emulated=True)

    def broken():
        yield dict(result="begun")
        raise ValueError("of a reason\nand more")

    session.step("broken", 1, broken)
    session.step("long", 1000, broken)
    assert [row["result"] for row in session.rows] == ["begun", "failed: ValueError: of a reason", "left out: no time"]
    lines = check.table(session.rows).splitlines()
    assert lines[0].split() == ["what", "ms", "%", "of", "roof", "best", "peer", "its", "ms", "want", "result"]
    assert lines[-1].split()[0] == "long" and lines[-1].endswith("no time")


def test_a_peer_that_tunes_itself_tries_two_configurations(monkeypatch):
    package, utils, tuner = (types.ModuleType(f"mamba_ssm{end}") for end in ("", ".utils", ".utils.determinism"))
    package.__path__ = utils.__path__ = []
    tuner.autotune_configs = list
    for module in (package, utils, tuner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    quick.few_configurations()
    assert tuner.autotune_configs(range(9)) == [0, 1]
