"""`linmu env`: it runs, says what is so, and fails when something that should work does not."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from linmu_models.cli import app
from linmu_ops import _native, _registry, env


@pytest.fixture(autouse=True)
def _without_the_triton_interpreter(monkeypatch):
    """It takes minutes, and Triton has tests of its own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_json(capsys):
    code = env.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["failures"] == [] and code == 0
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"] == sys.version.split()[0]
    assert set(found["binaries"]) == {"liblinmu_cpu.so", "liblinmu_cuda.so", "layout planner"}
    evidence = found["binaries"]["liblinmu_cuda.so"]["evidence"]
    assert "for sm_80 and sm_100 they have not run on a GPU" in evidence
    assert "no GPU has run the scans by slices" in evidence
    rows = [r for r in found["ops"] if r["device"] == "cpu"]
    assert sorted((r["op"], r["implementation"]) for r in rows) == sorted(
        (op, impl) for op in _registry.OPS for impl in _registry.NAMESPACE
    )
    assert all(r["result"].startswith(("ok", "no: ")) for r in rows)
    assert all(r["result"].startswith("ok") for r in rows if r["serves"] or r["implementation"] == "reference")


def test_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = CliRunner().invoke(app, ["env"])
    assert found.exit_code == 0, found.output
    for word in ("torch", torch.__version__, "liblinmu_cpu.so", "ssd_scan", "reference", "the tensors are on cpu"):
        assert word in found.output


def test_plain_table_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    rows = [{"op": "a", "device": "cpu", "implementation": "reference", "serves": True, "result": "ok, error 0e+00"}]
    env._print_rows(rows)
    assert capsys.readouterr().out.splitlines() == [
        "op  device  implementation  serves  result", "a   cpu     reference       yes     ok, error 0e+00",
    ]  # fmt: skip


def test_a_wrong_implementation_is_a_failure(monkeypatch, capsys):
    compare = env._compare

    def wrong(op, impl, device):
        if op == "ssd_step" and impl == "reference":
            raise AssertionError("output 0 is off by 1e+00")
        return compare(op, impl, device)

    monkeypatch.setattr(env, "_compare", wrong)
    assert env.main([]) == 1
    printed = capsys.readouterr()
    assert "FAILED  ssd_step by reference on cpu: output 0 is off by 1e+00" in printed.err
    assert "FAILED: AssertionError" in printed.out


@pytest.mark.parametrize("value", [float("nan"), 2.0])
def test_compare_sees_wrong_values(monkeypatch, value):
    from linmu_ops import _testing

    run = _testing.run_small

    def spoiled(op, impl, device="cpu"):
        found = run(op, "reference", device)
        if impl == "cpu":
            found["output 0"].flatten()[3] = value
        return found

    monkeypatch.setattr(_testing, "run_small", spoiled)
    with pytest.raises(AssertionError, match="output 0 is off by"):
        env._compare("ssd_step", "cpu", "cpu")


def test_an_unloadable_library_is_a_failure(monkeypatch):
    broken = _native.Binary("liblinmu_cpu.so", path=_native.HERE, error="cannot be loaded by this torch: symbol")
    monkeypatch.setitem(_registry._binaries, "cpu", broken)
    failures = []
    assert env._binaries(failures)["liblinmu_cpu.so"]["state"].startswith("cannot be loaded")
    assert failures == ["liblinmu_cpu.so: cannot be loaded by this torch: symbol"]


def test_describes_an_installation_without_torch():
    code = (
        f"import runpy, sys; sys.modules['torch'] = None;sys.exit(runpy.run_path({env.__file__!r})['main'](['--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__  # installed, and yet
    assert any(f.startswith("torch: ModuleNotFoundError") for f in found["failures"])


class FakeRuntime:
    """cuda.bindings.runtime, as far as `linmu env` asks it."""

    class cudaDeviceAttr:
        cudaDevAttrMultiProcessorCount, cudaDevAttrClockRate, cudaDevAttrMemoryClockRate = 132, 1980000, 2619000
        cudaDevAttrGlobalMemoryBusWidth, cudaDevAttrL2CacheSize = 5120, 50 * 2**20
        cudaDevAttrMaxSharedMemoryPerBlockOptin = 227 * 1024

    class Error(int):
        name = "cudaErrorInsufficientDriver"

    def __init__(self, error=0):
        self.error = self.Error(error)

    def cudaGetDeviceCount(self):
        return self.error, 1

    def cudaDriverGetVersion(self):
        return self.Error(0), 13010

    def cudaDeviceGetAttribute(self, attribute, device):
        return self.Error(0), attribute


@pytest.fixture
def runtime(monkeypatch):
    def give(fake):
        bindings = types.ModuleType("cuda.bindings")
        monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.delitem(sys.modules, "cuda.bindings.runtime", raising=False)
        if fake is not None:
            bindings.runtime = fake

    return give


def test_a_gpu_is_described(runtime):
    runtime(FakeRuntime())
    assert env._gpus() == {
        "driver": "CUDA 13.1",
        "GPU 0": "132 multiprocessors at up to 1.98 GHz, memory 5120 bits at up to 2.62 GHz, L2 50 MiB, "
        "227 KiB shared memory a block",
    }


def test_no_driver_and_no_cuda_python_are_one_line_each(runtime):
    runtime(FakeRuntime(35))
    assert env._gpus() == {"devices": "cudaErrorInsufficientDriver"}
    runtime(None)
    (line,) = env._gpus().values()
    assert line.startswith("not installed (pip install cuda-python)")
