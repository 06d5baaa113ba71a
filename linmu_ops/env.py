"""`linmu env`, `python -m linmu_ops.env [--json]`: what is installed, what was built, and whether it works.

It prints versions, the state of the compiled libraries, and one row per op and implementation. Every usable
implementation computes a small case, gradients included, and is compared with the reference. The exit code is 1 if
anything that should work does not.

A library that is not built is no failure: the references serve. One that is there and cannot be loaded is a failure.
Only the standard library is imported up front, and every probe is guarded: a broken installation is described, and does
not end in a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("linmu", "torch", "numpy", "triton", "transformers", "safetensors", "accelerate", "peft")
# Error of a working implementation relative to the largest value; `make test` judges precision, this finds damage.
TOLERANCE = 1e-2


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (done.stdout or done.stderr).strip().splitlines()[-1 if command[0] == "nvcc" else 0]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _system() -> dict[str, str]:
    return {
        "platform": platform.platform(),
        "processor": f"{cpu_name()}, {os.cpu_count()} cores",
        "C++ compiler": _first_line(os.environ.get("CXX", "c++"), "--version"),
        "nvcc": _first_line("nvcc", "--version"),
    }


def _variables() -> dict[str, str]:
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(("LINMU_", "TRITON_INTERPRET"))}


def _torch() -> dict[str, str]:
    import torch

    found = {"version": torch.__version__, "CUDA": str(torch.version.cuda), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found[f"GPU {i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    return found


def _gpus() -> dict[str, str]:
    """What cuda-python tells of each GPU: what kernels are planned by, and what a clock's cycles are worth."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return {"cuda-python": "not installed (pip install cuda-python): no clocks, caches or multiprocessors"}
    error, count = runtime.cudaGetDeviceCount()
    if int(error):
        return {"devices": error.name}
    _, driver = runtime.cudaDriverGetVersion()
    found = {"driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}"}

    def ask(name: str, device: int) -> int:
        error, value = runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, f"cudaDevAttr{name}"), device)
        if int(error):
            raise RuntimeError(f"{name} of GPU {device}: {error.name}")
        return int(value)

    for i in range(count):
        found[f"GPU {i}"] = ", ".join(
            (
                f"{ask('MultiProcessorCount', i)} multiprocessors at up to {ask('ClockRate', i) / 1e6:.2f} GHz",
                f"memory {ask('GlobalMemoryBusWidth', i)} bits at up to {ask('MemoryClockRate', i) / 1e6:.2f} GHz",
                f"L2 {ask('L2CacheSize', i) / 2**20:.0f} MiB",
                f"{ask('MaxSharedMemoryPerBlockOptin', i) / 1024:.0f} KiB shared memory a block",
            )
        )
    return found


def _binaries(failures: list[str]) -> dict[str, dict[str, str]]:
    from linmu_ops import _native, _registry

    found = {}
    for binary in _registry.binaries().values():
        found[binary.file] = {"state": "loaded" if binary.loaded else binary.error or "", **binary.info}
        if binary.path is not None and binary.path.parent != _native.HERE:
            found[binary.file]["folder"] = str(binary.path.parent)
        if binary.file == "liblinmu_cuda.so":
            found[binary.file]["evidence"] = _registry.EVIDENCE
        if binary.path is not None and binary.error:
            failures.append(f"{binary.file}: {binary.error}")
    serving, errors = _native.planners(), _native.planner_errors()
    found["layout planner"] = {"state": f"loaded: {next(iter(serving))}" if serving else _native.planner_error()}
    if serving:
        found["layout planner"]["compiler"] = next(iter(serving.values())).COMPILER
    for name, why in errors.items():
        if any(_native.HERE.glob(f"{name}*")) and not os.environ.get("LINMU_NO_BINARY"):
            failures.append(f"layout planner in {name}: {why}")
    return found


def _compare(op: str, impl: str, device: str) -> float:
    """Largest error of `impl` relative to the reference's largest value, over outputs and gradients."""
    from linmu_ops import _testing

    want = _testing.run_small(op, "reference", device)
    got = _testing.run_small(op, impl, device)
    if got.keys() != want.keys():
        raise AssertionError(f"it gives {sorted(got)}, the reference {sorted(want)}")
    worst = 0.0
    for name, value in want.items():
        error = float((got[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-6))
        if not error <= TOLERANCE:
            raise AssertionError(f"{name} is off by {error:.1e} of the reference's largest value")
        worst = max(worst, error)
    return worst


def _ops(failures: list[str]) -> list[dict[str, Any]]:
    import torch

    from linmu_ops import _registry

    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op in sorted(_registry.OPS):
            for choice in _registry.explain(op, device=device):
                row = {"op": op, "device": device, "implementation": choice.impl, "serves": choice.chosen}
                row["result"] = f"no: {choice.why_not}"
                if choice.why_not is None:
                    try:
                        row["result"] = f"ok, error {_compare(op, choice.impl, device):.0e}"
                    except Exception as e:
                        row["result"] = f"FAILED: {type(e).__name__}: {e}"
                        failures.append(f"{op} by {choice.impl} on {device}: {e}")
                rows.append(row)
    return rows


def report() -> dict[str, Any]:
    """Everything `main` prints; `failures` lists what should work and does not."""
    failures: list[str] = []

    def guarded(name: str, probe: Callable[[], Any]) -> Any:
        try:
            return probe()
        except Exception as e:
            failures.append(f"{name}: {type(e).__name__}: {e}")
            return {"error": f"{type(e).__name__}: {e}"}

    found = {
        "versions": guarded("versions", _versions),
        "system": guarded("system", _system),
        "variables": guarded("variables", _variables),
        "torch": guarded("torch", _torch),
        "CUDA": guarded("CUDA", _gpus),
        "import": guarded("import linmu_ops", lambda: {"linmu_ops": importlib.import_module("linmu_ops").__file__}),
    }
    if "error" not in found["import"]:
        found["binaries"] = guarded("binaries", lambda: _binaries(failures))
        found["ops"] = guarded("ops", lambda: _ops(failures))
    return {**found, "failures": failures}


def _print_rows(rows: list[dict[str, Any]]) -> None:
    columns = ["op", "device", "implementation", "serves", "result"]
    cells = [[("yes" if r[c] else "") if c == "serves" else str(r[c]) for c in columns] for r in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        from linmu_ops._tables import plain

        print("\n".join(plain(columns, cells)))
        return
    table = Table(*columns, box=None)
    for line in cells:
        colour = {"ok": "green", "no": "dim", "FA": "red"}[line[-1][:2]]
        table.add_row(*(Text(cell, style=colour) for cell in line))
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 1 if anything failed, else 0."""
    parser = argparse.ArgumentParser(prog="linmu env", description="What is installed and built, and does it work.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args(arguments).json
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
        return int(bool(found["failures"]))
    for section, values in found.items():
        if section in ("ops", "failures") or not values:
            continue
        print(section)
        for key, value in values.items():
            shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"  {key:14} {shown}")
    if isinstance(found.get("ops"), list):
        print()
        _print_rows(found["ops"])
    for failure in found["failures"]:
        print(f"FAILED  {failure}", file=sys.stderr)
    return int(bool(found["failures"]))


if __name__ == "__main__":
    sys.exit(main())
