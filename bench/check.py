"""What the checks of a GPU share (`gpu_check.sh quick`, `layer`): rows, a deadline, the roofs, one table at the end."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from linmu_ops import _registry

from . import roofs, timing
from .provenance import where

Row = dict[str, Any]


class Session:
    """Rows, which are kept in `name`.jsonl too, a deadline, and where the ops run."""

    def __init__(self, name: str, out: Path, seconds: float, emulated: bool) -> None:
        self.out, self.emulated, self.rows = out, emulated, list[Row]()
        self.file = out / f"{name}.jsonl"
        self.file.unlink(missing_ok=True)
        self.deadline = time.monotonic() + seconds
        self.device, self.impl = ("cpu", "cpu") if emulated else ("cuda", "cuda")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def step(self, name: str, least: float, f: Callable[[], Iterator[Row]]) -> None:
        """Keep the rows of `f`, which takes at least so many seconds, and is ended at the deadline."""
        if self.left() < least:
            return self.add(dict(what=name, result="left out: no time"))
        begun = time.monotonic()
        try:
            with _until(self.left()):
                for row in f():
                    self.add(dict(what=name) | row)
        except Exception as e:  # of any kind: the next steps are worth running
            self.add(dict(what=name, result=f"failed: {type(e).__name__}: {(str(e) or '-').splitlines()[0]}"[:200]))
        print(f"{name}: {time.monotonic() - begun:.1f} s, {self.left():.0f} s left", flush=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row | where(self.device) | dict(emulated=self.emulated)) + "\n")


@contextlib.contextmanager
def _until(seconds: float) -> Iterator[None]:
    """TimeoutError where the block takes longer; and each second from then on, for what takes it for a row's."""

    def late(*_: object) -> None:
        raise TimeoutError("no time left")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine(session: Session) -> Iterator[Row]:
    """The clocks as they are, and the two roofs."""
    if not session.emulated:
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
        yield dict(result=done.stdout.strip() or done.stderr.strip()[:200])
    size = 1 << 16 if session.emulated else 4 << 30
    copy, copied = roofs.copy(size, session.device)
    timed: dict[str, Callable[[], object]] = {"copy": copy}
    flops = 0
    if not session.emulated:
        timed["gemm"], flops = roofs.gemm(torch.bfloat16, session.device)
    times = timing.interleave(timed, session.device, seconds=0.5, rounds=(3, 20))
    found = dict(copy_tbps=copied / times["copy"].median * 1e-12)
    if flops:
        found["gemm_tflops"] = flops / times["gemm"].median * 1e-12
    (session.out / "roofs.json").write_text(json.dumps(found))
    yield dict(result=", ".join(f"{k} {v:.3g}" for k, v in found.items()))


def table(rows: list[Row]) -> str:
    head = ("what", "ms", "% of roof", "best peer", "its ms", "want", "result")

    def figure(value: Any) -> str:
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    keys = ("what", "ms", "roof_percent", "peer", "peer_ms", "want_ms", "result")
    lines = [head, *(tuple(figure(row.get(k)) for k in keys) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


@contextlib.contextmanager
def emulation() -> Iterator[None]:
    """Within it linmu_ops runs the emulated CUDA kernels, those of sm_90a, on CPU tensors."""
    register_emulated = importlib.import_module("tests.cuda.conftest").register_emulated
    if not _registry.binaries()["cpu"].loaded:
        raise SystemExit(f"--emulate needs liblinmu_cpu.so: {_registry.binaries()['cpu'].error}")
    kept = register_emulated()
    before, arch = _registry.NAMESPACE["cpu"], os.environ.get("LINMU_CUDA_ARCH")
    _registry.NAMESPACE["cpu"], os.environ["LINMU_CUDA_ARCH"] = "linmu_emulated", "90"
    try:
        yield
    finally:
        _registry.NAMESPACE["cpu"] = before
        os.environ.pop("LINMU_CUDA_ARCH")
        os.environ |= {} if arch is None else {"LINMU_CUDA_ARCH": arch}
        del kept


def main(name: str, what: str, seconds: float, run: Callable[[Session], None], argv: list[str] | None) -> int:
    """The command `python -m bench.<name>`: 1 where a row failed."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=what)
    parser.add_argument("--out", type=Path, required=True, help="where results go, as bench/results/h200")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"in all (default {seconds:g})")
    parser.add_argument("--emulate", action="store_true", help="small cases, by the emulator, without a GPU")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(name, args.out, args.seconds, args.emulate)
    timing.keep_memory()
    with emulation() if args.emulate else contextlib.nullcontext():
        run(session)
    print("\n" + table(session.rows))
    return int(any(str(row.get("result", "")).startswith("failed") for row in session.rows))
