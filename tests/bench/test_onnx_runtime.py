"""ONNX Runtime's operator computes what our scans do, where it is installed."""

from __future__ import annotations

import pytest
import torch

from bench import measure, run
from bench.onnx_runtime import linear_attention
from bench.peers import Missing

QUICK = dict(seconds=0.0, warmup=0.0, rounds=(1, 1))
NAME = "ONNX Runtime"


def row_of(op, dtype=torch.float32, **options):
    rows = measure.measure(run.load(op), "tiny", dtype, "cpu", wanted=(NAME,), **QUICK, **options)
    (row,) = (r for r in rows if r["impl"] == NAME)
    return row


@pytest.mark.parametrize("op", ["ssd_scan", "gated_delta_scan"])
def test_its_results_are_ours(op):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    assert row_of(op)["status"] == "ok"
    assert row_of(op, torch.bfloat16)["status"] == "missing: float32 on a CPU is what is asked of it"
    assert row_of(op, backward=True)["status"] == "missing: LinearAttention has no backward"


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_what_is_not_installed_is_said(package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(Missing, match=r"^onnx"):
        linear_attention("gated", 4)
    assert row_of("ssd_scan")["status"].startswith("missing: onnx")
