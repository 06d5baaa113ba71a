"""Every op's bench at its tiny case, and what the harness does when something is wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess

import pytest
import torch

from bench import measure, page, report, roofs, run, timing
from bench.peers import Missing, Peer
from bench.provenance import where
from linmu_ops import _registry

QUICK = dict(seconds=0.0, warmup=0.0, rounds=(1, 1))


def rows_of(op, **options):
    return measure.measure(run.load(op), "tiny", torch.float32, "cpu", **QUICK, **options)


def test_every_op_has_a_bench():
    assert set(run.OPS) == {*_registry.OPS, "token_layout", "mmate"}
    assert all(any(c.quick for c in run.load(op).cases.values()) for op in run.OPS)


def names(op, *options):
    args = run._arguments(["--op", op, *options])
    return {n for n, c in run.load(op).cases.items() if run._included(n, c, args)}


def test_what_the_targets_on_a_gpu_name_is_measured_there_alone():
    targets = {op: names(op, "--targets", "--device", "cuda") for op in run.OPS}
    named = {
        "ssd_scan": {"7b-forward", "7b-both", "mamba-2"},
        "window_attention": {"7b", "swin, 7x7", "swin, 8x8", "swin, 12x12"},
        "ssd_step": {f"7b, batch {b}" for b in (1, 2, 4, 8, 16, 32, 64)},
        "mmate": {"7b"},
    }
    assert {op: targets[op] for op in named} == named
    for op, t in targets.items():
        assert not t & names(op)
    scan = run.load("ssd_scan").cases
    for name in ("7b-forward", "7b-both"):
        assert scan[name].sizes | dict(direction=None) == dict(
            B=1, L=32768, H=28, Gx=4, Gb=4, Gc=28, P=128, N=128, direction=None
        )
    peers = {op: " ".join(run.load(op).peers) for op in run.OPS}
    assert "mamba_ssm" in peers["ssd_scan"] and "fla" in peers["ssd_scan"] and "mamba_ssm" in peers["ssd_step"]
    assert all(p in peers["window_attention"] for p in ("flash-attn", "SDPA, compiled", "roll + partition + SDPA"))


def test_the_check_on_a_gpu_has_a_step_for_every_target():
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    script = run.ROOT / "bench" / "gpu_check.sh"
    done = subprocess.run(["bash", script, "list"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    steps = done.stdout.split()
    assert steps[0] == "build" and len(set(steps)) == len(steps)
    for op in run.OPS:
        if names(op, "--targets"):
            assert [s for s in steps if s.startswith(f"bench_target_{op}")], op
    for case in names("ssd_scan", "--targets"):
        assert f"bench_target_ssd_scan_{case}" in steps


def test_rows_of_the_same_case_are_replaced(tmp_path):
    file = tmp_path / "rows.jsonl"
    first, second = ({"op": "o", "case": c, "dtype": "float32", "backward": False, "us": 1} for c in "ab")
    run._append(file, [first, second], replace=False)
    run._append(file, [first | {"us": 2}], replace=True)
    run._append(file, [second], replace=False)
    assert [json.loads(r) for r in file.read_text().splitlines()] == [second, first | {"us": 2}, second]


def test_every_peer_has_a_row_also_where_it_is_missing():
    bench = run.load("ssd_scan")
    names = {r["impl"] for r in measure.measure(bench, "tiny", torch.float32, "cpu", **QUICK, wanted=("auto",))}
    assert names >= {"transformers, chunk 64", "mamba_ssm", "fla simple_gla", "forward scan, flipped twice"}
    assert {"FlexAttention", "NATTEN"} <= {r["impl"] for r in rows_of("window_attention")}


@pytest.mark.parametrize("op", run.OPS)
def test_tiny(op):
    rows = rows_of(op)
    ours = [r for r in rows if r["impl"].startswith(measure.OURS)]
    assert ours and all(r["status"] == "ok" and r["us"] > 0 for r in ours)
    assert [r for r in rows if r["status"].startswith(("failed", "not timed"))] == []
    json.dumps(rows)
    assert op in report.table(rows)


# The peer of far_attention is another op of ours, which no compiler makes faster.
COMPILED = [
    pytest.param(o, marks=() if o == "branch_mix_norm" else pytest.mark.sweep)
    for o in _registry.OPS
    if o != "far_attention"
]


@pytest.mark.parametrize("op", COMPILED)
def test_compiled_peers_are_equal(op):
    rows = rows_of(op, wanted=("auto", "compiled"))
    compiled = [r for r in rows if r["impl"].endswith(", compiled")]
    assert compiled and {r["status"] for r in compiled} == {"ok"}


@pytest.mark.parametrize("op", [o for o in run.OPS if run.load(o).differentiable])
def test_tiny_backward(op):
    rows = rows_of(op, backward=True)
    assert [r for r in rows if r["status"].startswith(("failed", "not timed"))] == []


@pytest.mark.parametrize("op", run.OPS)
def test_costs_grow_with_the_backward_pass(op):
    bench = run.load(op)
    for case in bench.cases.values():
        assert bench.bytes(case, 4, False) > 0
        if bench.differentiable:
            assert bench.bytes(case, 4, True) > bench.bytes(case, 4, False) > bench.bytes(case, 2, False)
            assert bench.flops(case, True) > bench.flops(case, False) > 0


def missing(case):
    raise Missing("it is not installed")


def with_peer(build):
    return dataclasses.replace(run.load("causal_conv1d"), peers={"other": build})


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda c: Peer(lambda x, **rest: x), "not timed: output 0 differs from ours by"),
        (lambda c: Peer(lambda x, **rest: x[:, 1:]), "not timed: output 0 has shape"),
        (lambda c: Peer(lambda x, **rest: x * float("nan")), "not timed: output 0 differs from ours by nan"),
        (lambda c: Peer(lambda x: x), "failed: TypeError"),
        (missing, "missing: it is not installed"),
    ],
)
def test_a_peer_that_cannot_be_timed_is_a_row_that_says_so(build, words):
    rows = measure.measure(with_peer(build), "tiny", torch.float32, "cpu", **QUICK)
    assert rows[1]["status"].startswith(words) and "us" not in rows[1]
    assert rows[0]["times_best_peer"] is None
    assert words in report.table(rows)


def test_in_place_state_is_not_shared():
    bench = run.load("ssd_step")
    inputs = bench.make(bench.cases["tiny"], torch.float32, "cpu")
    before = inputs["state"].clone()
    measure.Variant(bench, Peer(lambda state, **rest: state.zero_()), inputs, False)()
    assert torch.equal(inputs["state"], before)


def test_refuses_while_tests_fail(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "gate", lambda op: "1 failed")
    out = tmp_path / "rows.jsonl"
    assert run.main(["--op", "causal_conv1d", "--case", "tiny", "--json", str(out)]) == 1
    assert "causal_conv1d: refused, its tests fail" in capsys.readouterr().err
    assert not out.exists()


def test_command_writes_rows(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ["--op", "causal_conv1d", "--case", "tiny", "--device", "cpu", "--no-gate"]
    monkeypatch.setattr(measure, "measure", functools.partial(measure.measure, **QUICK))
    assert run.main([*options, "--json", str(out)]) == 0
    assert "UNVERIFIED" in capsys.readouterr().out
    row = json.loads(out.read_text().splitlines()[0])
    assert row["verified"] is False and row["threads"] == torch.get_num_threads() and row["versions"]["torch"]
    assert {"commit", "dirty", "device", "clock", "us", "us_p20", "us_p80", "roof_percent"} <= set(row)


def test_report(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "HERE", tmp_path)
    rows = [
        row | where("cpu") | dict(case=f"L={n}", sizes=dict(L=n), verified=n == 64)
        for n in (64, 128)
        for row in rows_of("causal_conv1d")
    ]
    target = report.results_file("cpu", "causal_conv1d")
    target.parent.mkdir(parents=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page.write("cpu").read_text()
    assert (
        "## causal_conv1d" in text
        and measure.OURS in text
        and "`python -m bench.page cpu` draws `cpu_causal_conv1d.svg`" in text
        and (tmp_path / "reports" / "cpu_causal_conv1d.svg").exists()
    )
    assert text.count("tests were not run") == 1


def test_summary():
    t = timing.summarise([float(i) for i in range(11)])
    assert (t.median, t.p20, t.p80, t.rounds) == (5.0, 2.0, 8.0, 11)


def test_copy_moves_what_it_says():
    f, moved = roofs.copy(1e6, "cpu")
    assert abs(moved - 1e6) < 16 and f().numel() * 8 == moved
