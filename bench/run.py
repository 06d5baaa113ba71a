"""`python -m bench.run --op ssd_scan`: measure ops against their peers and the machine's roofs."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from linmu_distill.checkpoint import write_atomically
from linmu_distill.files import read_lines

from . import measure, page, report, timing
from .peers import Bench, Case
from .provenance import ROOT, where

OPS = tuple(sorted(f.stem for f in (Path(__file__).parent / "ops").glob("[a-z]*.py")))


def load(op: str) -> Bench:
    bench: Bench = importlib.import_module(f"bench.ops.{op}").BENCH
    return bench


def gate(op: str) -> str | None:
    """None if the op's tests pass, else the end of their output."""
    tests = sorted((ROOT / "tests").glob(f"**/test_{op}.py"))
    if not tests:
        return f"no tests/**/test_{op}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *map(str, tests)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return None if done.returncode == 0 else done.stdout[-3000:] + done.stderr[-1000:]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated; every op if left out")
    parser.add_argument(
        "--case",
        action="append",
        help="names of cases; if left out, all but the tiny one and those of --targets",
    )
    parser.add_argument("--dtype", action="append", help="float32, bfloat16, ...; each case's own if left out")
    parser.add_argument(
        "--impl", action="append", help="auto (default: what serves, and eager peers), compiled (peers), all, a name"
    )  # fmt: skip
    parser.add_argument("--backward", action="store_true", help="forward + backward")
    parser.add_argument(
        "--both", action="store_true", help="forward, and forward + backward where the case asks for it"
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of each op, compiled peers for the forward")
    parser.add_argument("--targets", action="store_true", help="the cases that have a target on a GPU, and no others")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice if left out")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per variant (default 1)")
    parser.add_argument("--json", type=Path, help="append rows (JSON lines) to this file")
    parser.add_argument("--replace", action="store_true", help="what --json's file has of the same cases goes")
    parser.add_argument("--save", action="store_true", help="replace bench/results/<device>/<op>.jsonl")
    parser.add_argument("--report", action="store_true", help="then write bench/reports/<device>.md from the results")
    parser.add_argument("--no-gate", action="store_true", help="do not run the op's tests; rows say UNVERIFIED")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    timing.keep_memory()
    red = []
    ops = args.op or OPS
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = dict(zip(ops, [None] * len(ops) if args.no_gate else pool.map(gate, ops), strict=True))
    for op in ops:
        if (error := errors[op]) is not None:
            print(f"{op}: refused, its tests fail (--no-gate measures all the same)\n{error}", file=sys.stderr)
            red.append(op)
            continue
        rows = list(_rows(load(op), args))
        if args.json:
            _append(args.json, rows, args.replace)
        if args.save:
            target = report.results_file(args.device, op)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.report:
        print(page.write(args.device))
    return 1 if red else 0


def _included(name: str, case: Case, args: argparse.Namespace) -> bool:
    """Where no case is named."""
    return name != "tiny" and bool(case.target) == args.targets and (case.quick or not args.quick)


def _append(file: Path, rows: list[report.Row], replace: bool) -> None:
    new = {report.title(row) for row in rows} if replace else set()
    old = read_lines(file, report.TITLE)
    rows = [row for row in old if report.title(row) not in new] + rows
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def _rows(bench: Bench, args: argparse.Namespace) -> Any:
    place = where(args.device)
    names = args.case or [n for n, c in bench.cases.items() if _included(n, c, args)]
    if unknown := set(names) - set(bench.cases):
        sys.exit(f"{bench.op}: case must be one of {', '.join(bench.cases)}, got {', '.join(sorted(unknown))}")
    for name in names:
        case = bench.cases[name]
        passes = [args.backward] if not args.both else [False, True] if case.backward else [False]
        if args.backward and not bench.differentiable:
            sys.exit(f"{bench.op}: has no backward")
        for dtype in args.dtype or case.dtypes:
            for backward in passes:
                rows = measure.measure(
                    bench, name, getattr(torch, dtype), args.device, backward=backward,
                    wanted=tuple(args.impl or (["auto", "compiled"] if args.quick and not backward else ["auto"])),
                    seconds=args.seconds,
                )  # fmt: skip
                rows = [row | place | dict(verified=not args.no_gate) for row in rows]
                print(report.table(rows, verified=not args.no_gate), flush=True)
                yield from rows


if __name__ == "__main__":
    sys.exit(main())
