"""Two commits in one run: each in a process of its own, which take turns sample by sample."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linmu_ops._tables import markdown

from . import measure, timing
from .provenance import ROOT
from .run import OPS, load

# What the libraries in linmu_ops/ are built from.
COMPILED = ("csrc", "CMakeLists.txt", "setup.py")
ROUNDS = (3, 200)
CLOSE = 1e-2  # of a result's norm; two versions of a kernel differ by rounding


class CompareError(RuntimeError):
    """The other commit cannot be measured."""


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


@contextlib.contextmanager
def checked_out(revision: str, device: str) -> Iterator[Path]:
    """A temporary worktree of that commit, with its libraries.

    They are this checkout's where both are built from the same files, else they are built, which takes minutes.

    Raises:
        CompareError: there is no such commit, or it cannot be built.
    """
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise CompareError(f"bench: --base must be a commit of this checkout, got {revision!r}")
    commit = found.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="linmu-base-") as folder:
        tree = Path(folder) / "tree"
        if (added := _git("worktree", "add", "--detach", str(tree), commit)).returncode:
            raise CompareError(f"bench: git cannot check {revision} out: {added.stderr.strip().splitlines()[-1]}")
        try:
            if _git("diff", "--quiet", commit, "--", *COMPILED).returncode == 0:
                for library in (ROOT / "linmu_ops").glob("*.so"):
                    shutil.copy2(library, tree / "linmu_ops")
            else:
                _build(tree, device)
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _build(tree: Path, device: str) -> None:
    print("bench: the base's kernels are others: building them", file=sys.stderr)
    environment = os.environ | ({"LINMU_BUILD": "cpu"} if device == "cpu" else {})
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CompareError(f"bench: the base cannot be built\n{(done.stdout + done.stderr)[-2000:]}")


class Side:
    """A process that imports `linmu_ops` from one folder; `bench` is this checkout's."""

    def __init__(self, root: Path, threads: int) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "side.py"), str(root), str(ROOT), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root,
        )  # fmt: skip

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise CompareError(f"bench: a process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass(frozen=True)
class Question:
    """What both commits are asked for."""

    op: str
    case: str
    dtype: str
    backward: bool
    device: str


def compare(base: Side, this: Side, question: Question, seconds: float, rounds: tuple[int, int] = ROUNDS) -> Any:
    """A row: microseconds of both, and how many times faster this checkout is than the base, round by round."""
    row: dict[str, Any] = dict(vars(question))
    ready = {"base": base.ask(**vars(question)), "this": this.ask(**vars(question))}
    for name, answer in ready.items():
        if "error" in answer:
            return row | dict(status=f"{name}: {answer['error']}")
    pairs = list(zip(ready["base"]["norms"], ready["this"]["norms"], strict=False))
    same = len(ready["base"]["norms"]) == len(ready["this"]["norms"])
    if not same or not all(abs(a - b) <= CLOSE * abs(a) for a, b in pairs):
        return row | dict(status="not timed: the results differ")
    count = int(min(max(seconds / max(a["seconds"] for a in ready.values()), rounds[0]), rounds[1]))
    times: dict[str, list[float]] = {"base": [], "this": []}
    for i in range(count):
        for name, side in [("base", base), ("this", this)][:: 1 - 2 * (i % 2)]:
            times[name].append(side.ask(sample=True)["seconds"])
    ratio = timing.summarise([b / t for b, t in zip(times["base"], times["this"], strict=True)])
    medians = {f"{name}_us": timing.summarise(samples).median * 1e6 for name, samples in times.items()}
    return row | medians | dict(
        status="ok", ratio=ratio.median, ratio_p20=ratio.p20, ratio_p80=ratio.p80, rounds=ratio.rounds
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        what = [row["op"], row["case"], row["dtype"] + (", backward" if row["backward"] else "")]
        if row["status"] != "ok":
            lines.append([*what, "", "", row["status"], ""])
            continue
        ratio = f"{row['ratio']:.2f} ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})"
        lines.append([*what, f"{row['base_us']:.1f}", f"{row['this_us']:.1f}", ratio, str(row["rounds"])])
    return markdown(["op", "case", "dtype", "base, µs", "this, µs", "times faster (p20 to p80)", "rounds"], lines)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--base", required=True, help="the commit to compare this checkout with, as it is now")
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated; every op if left out")
    parser.add_argument("--case", action="append", help="names of cases; those of --quick if left out")
    parser.add_argument("--dtype", action="append", help="float32, bfloat16, ...; each case's own if left out")
    parser.add_argument("--backward", action="store_true", help="forward + backward")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; PyTorch's choice")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per commit and case (default 1)")
    parser.add_argument("--json", type=Path, help="append rows (JSON lines) to this file")
    return parser.parse_args(argv)


def questions(args: argparse.Namespace) -> Iterator[Question]:
    for op in args.op or OPS:
        bench = load(op)
        if args.backward and not bench.differentiable:
            continue
        names = args.case or [n for n, c in bench.cases.items() if c.quick and not c.target]
        if unknown := set(names) - set(bench.cases):
            known = ", ".join(bench.cases)
            raise CompareError(f"{op}: case must be one of {known}, got {', '.join(sorted(unknown))}")
        for name in names:
            for dtype in args.dtype or bench.cases[name].dtypes:
                if getattr(torch, dtype, None) not in measure.TOLERANCE:
                    raise CompareError(f"bench: --dtype must be a float dtype, got {dtype}")
                yield Question(op, name, dtype, args.backward, args.device)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        asked = list(questions(args))
        with checked_out(args.base, args.device) as tree, contextlib.ExitStack() as sides:
            base, this = (Side(root, args.threads) for root in (tree, ROOT))
            sides.callback(base.close)
            sides.callback(this.close)
            rows = [compare(base, this, question, args.seconds) for question in asked]
    except CompareError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows))
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(row | dict(base=args.base)) + "\n" for row in rows)
    return 0 if all(row["status"] == "ok" for row in rows) else 1
