"""Who serves an op: explain, force, warn."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings

import pytest
import torch

import linmu_ops
from linmu_ops import _native, _registry
from linmu_ops._testing import run_small, small_inputs


def step():
    return linmu_ops.ssd_step(**small_inputs("ssd_step"))


@pytest.fixture
def without_binary(monkeypatch):
    """As if liblinmu_cpu.so were not built."""
    monkeypatch.setitem(_registry._binaries, "cpu", _native.Binary("liblinmu_cpu.so", error="not built: run make"))
    monkeypatch.setitem(_registry._default, ("ssd_step", "cpu", False), "reference")
    monkeypatch.setattr(_registry, "_warned", set())


@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_explain_has_one_row_per_implementation_and_one_choice(op):
    for device in ("cpu", "cuda"):
        rows = linmu_ops.explain(op, device=device)
        assert [r.impl for r in rows] == ["cpu", "cuda", "triton", "reference"]
        chosen = [r for r in rows if r.chosen]
        assert len(chosen) == 1 and chosen[0].why_not is None
        assert all(r.why_not is None or r.why_not for r in rows)
        assert rows[-1].why_not is None  # the reference serves anywhere


def test_explain_takes_the_device_of_the_tensors():
    rows = linmu_ops.explain("ssd_step", torch.empty(1, device="meta"))
    assert rows[0].why_not == "the tensors are on meta" and rows[-1].chosen


def test_explain_says_what_is_missing(without_binary):
    rows = {r.impl: r for r in linmu_ops.explain("ssd_step")}
    assert rows["cpu"].why_not == "liblinmu_cpu.so: not built: run make"
    assert rows["cuda"].why_not == "the tensors are on cpu"
    assert rows["reference"].chosen


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["sdd_scan:cpu"], r"use_impl: op must be \* or one of .*ssd_scan.*, got 'sdd_scan'"),
        (["ssd_scan:numpy"], "use_impl: implementation must be one of cpu, cuda, triton, reference, got 'numpy'"),
        (["ssd_scan"], "use_impl: implementation must be one of .*, got ''"),
        (["ssd_step:reference", "nothing:reference"], "use_impl: op must be"),
    ],
)
def test_unknown_names(items, message):
    with pytest.raises(ValueError, match=message), linmu_ops.use_impl(*items):
        pass
    assert not _registry._uses.get()


def test_explain_unknown_op():
    with pytest.raises(ValueError, match=r"explain: op must be one of .*, got 'scan'"):
        linmu_ops.explain("scan")


def test_use_impl_forces_nests_and_restores():
    def chosen():
        return next(r.impl for r in linmu_ops.explain("ssd_step") if r.chosen)

    usual = chosen()
    with linmu_ops.use_impl("ssd_step:reference"):
        assert chosen() == "reference"
        with linmu_ops.use_impl("*:triton"):
            assert chosen() == "triton"
        assert chosen() == "reference"
    assert chosen() == usual
    with pytest.raises(KeyError), linmu_ops.use_impl("ssd_step:triton"):
        raise KeyError
    assert chosen() == usual


@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_forced_but_unusable_raises(op):
    with pytest.raises(RuntimeError, match=f"{op}: implementation 'cuda' is forced but cannot serve: the tensors are"):
        run_small(op, "cuda")


def test_reference_by_itself_warns_once(without_binary):
    with pytest.warns(linmu_ops.LinmuWarning) as caught:
        [step() for _ in range(3)]
    assert len(caught) == 1
    message = "linmu_ops.ssd_step runs the slow reference on cpu (cpu: liblinmu_cpu.so: not built: run make)"
    assert str(caught[0].message) == message
    assert caught[0].filename == __file__  # points at the caller


def test_reference_by_request_does_not_warn(without_binary):
    with warnings.catch_warnings(), linmu_ops.use_impl("ssd_step:reference"):
        warnings.simplefilter("error")
        step()


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_variable_forces():
    code = "import linmu_ops as l; print([r.impl for r in l.explain('ssd_step') if r.chosen])"
    assert run(code, LINMU_IMPL="*:triton,ssd_step:reference") == (0, "['reference']\n")


def test_variable_with_an_unknown_name_fails_at_import():
    code, text = run("import linmu_ops", LINMU_IMPL="ssd_stp:cpu")
    assert code == 1 and "LINMU_IMPL: op must be * or one of" in text


def test_variable_that_cannot_be_met_fails_at_the_call():
    code, text = run(
        "import linmu_ops; from linmu_ops._testing import *; linmu_ops.ssd_step(**small_inputs('ssd_step'))",
        LINMU_IMPL="ssd_step:cpu",
        LINMU_NO_BINARY="1",
    )
    assert code == 1 and "'cpu' is forced but cannot serve: liblinmu_cpu.so: LINMU_NO_BINARY is set" in text


def test_less_exact_kernels_say_so_once(monkeypatch):
    monkeypatch.setattr(_registry, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for impl, device in (("cuda", "cuda"), ("triton", "cpu"), ("triton", "cuda"), ("triton", "cuda")):
            _registry._warn_of_inexact("ssd_scan", impl, device)
    assert [("triton may be less exact than cuda" in str(w.message)) for w in caught] == [True]


def test_float64_is_not_for_triton():
    rows = {r.impl: r for r in linmu_ops.explain("ssd_scan", torch.empty(0, dtype=torch.float64), device="cuda")}
    assert rows["triton"].why_not == "the Triton kernels take no float64"
    assert not rows["triton"].chosen


def test_sizes_beyond_a_limit_fall_to_the_next_implementation_and_warn_once(monkeypatch):
    monkeypatch.setattr(_registry, "_warned", set())
    inputs, op = small_inputs("ssd_step"), _registry.OPS["ssd_step"]

    def run():
        return linmu_ops.ssd_step(**inputs | dict(state=inputs["state"].clone()))

    want = run()
    limited = dataclasses.replace(op, limits={"cpu": lambda asked: f"at most N=4, got N={asked['B'].shape[-1]}"})
    monkeypatch.setitem(_registry.OPS, "ssd_step", limited)
    reason = f"at most N=4, got N={inputs['B'].shape[-1]}"
    with pytest.warns(linmu_ops.LinmuWarning) as caught:
        got = [run() for _ in range(3)]
    assert [str(w.message) for w in caught] == [f"linmu_ops.ssd_step: reference serves in place of cpu: {reason}"]
    assert caught[0].filename == __file__ and all(torch.allclose(g, want, atol=1e-5) for g in got)
    with pytest.raises(RuntimeError, match=f"'cpu' is forced but cannot serve: {reason}"), linmu_ops.use_impl("*:cpu"):
        run()
    rows = {r.impl: r for r in linmu_ops.explain("ssd_step", *(inputs[k] for k in ("state", "x", "dt", "A", "B")))}
    assert rows["cpu"].why_not == reason and not rows["cpu"].chosen and rows["reference"].chosen


CHIPS = {"sm_86": 99 * 1024, "sm_80": 163 * 1024, "sm_90": 227 * 1024}


@pytest.fixture
def cuda_of(monkeypatch):
    """`explain`'s word on the CUDA kernels, as if they were built and a block had so much shared memory."""
    monkeypatch.setattr(_registry, "why_not", lambda op, impl, device, dtype=None: None)

    def explain(chip, op, *tensors, **named):
        monkeypatch.setattr(_registry, "_shared_memory", lambda device: CHIPS[chip])
        rows = linmu_ops.explain(op, *tensors, device="cuda", **named)
        return next(r.why_not for r in rows if r.impl == "cuda")

    return explain


def row(size, dtype):
    return torch.empty(1, 1, 1, size, dtype=dtype, requires_grad=True)


def test_window_attention_says_what_its_cuda_kernels_do_not_take(cuda_of):
    for chip in CHIPS:
        q = row(257, torch.bfloat16)
        assert cuda_of(chip, "window_attention", q) == "the CUDA kernels take at most P=256, got P=257"
        for P, dtype in ((256, torch.bfloat16), (224, torch.float32)):
            q = row(P, dtype)
            assert cuda_of(chip, "window_attention", q, q, q, bias=torch.empty(1)) is None
    q = row(256, torch.float32)
    reason = cuda_of("sm_86", "window_attention", q, q, q, bias=torch.empty(1))
    assert reason == "its gradient of bias needs 102400 bytes of shared memory per block, the GPU has 101376"
    assert cuda_of("sm_86", "window_attention", q, q, q) is None
    with torch.no_grad():
        assert cuda_of("sm_86", "window_attention", q, q, q, bias=torch.empty(1)) is None
    assert cuda_of("sm_80", "window_attention", q, q, q, bias=torch.empty(1)) is None


def test_ssd_scan_says_what_its_cuda_kernels_do_not_take(cuda_of):
    def scan(chip, size, dtype):
        x = row(size, dtype)
        return cuda_of(chip, "ssd_scan", x, torch.empty(1, 1, 1), torch.empty(1), x, x)

    for chip in CHIPS:
        assert scan(chip, 128, torch.bfloat16) is None
    assert scan("sm_80", 128, torch.float32) is None and scan("sm_90", 256, torch.float32) is None
    assert scan("sm_80", 256, torch.float32) == (
        "its backward needs 188480 bytes of shared memory per block, the GPU has 166912"
    )
