"""`bench/gpu_check.sh quick`: whether the kernels are right on this GPU, and how fast, in less than eight minutes.

Correctness comes first, then times beside the peers that are installed, then hardware counters where ncu may read them.
A step that fails, or for which no time is left, says so in its row. The table of all rows is printed last; rows, roofs
and the logs of what was called are in --out.

With --emulate it runs on a machine without a GPU: small cases, by the emulator of `tests/cuda`. Its times are of the
emulator, and its rows say that they are of no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import linmu_ops
from linmu_ops._testing import check_implementation, run_op

from . import check, measure, run
from .check import Row, Session
from .peers import Bench, Case, Inputs
from .provenance import ROOT

PART = 2048  # visits of a case that are compared with the reference, which takes them one by one
# What a case is made of instead in the emulator. Windows of 48 tokens are enough for the kernels of sm_90a.
SMALL = dict(B=1, L=70, H=2, G=1, Gx=1, Gb=1, Gc=2, grid=(3, 4, 8), window=(3, 4, 4), shift=(0, 1, 1), D=256)
PEERS = dict(
    ssd_scan=("mamba_ssm", "fla simple_gla", "forward scan, flipped twice"),
    window_attention=("roll + partition + SDPA, compiled",),
)
KERNELS = "visits_kernel|states_kernel|slice_kernel|output_kernel|forward_kernel|dq_kernel|dkv_kernel|gradients_kernel"


@dataclasses.dataclass(frozen=True)
class Target:
    """A case of `op`, as its bench has it or with `changed` sizes; milliseconds that are wanted on an H100 or H200."""

    op: str
    case: str
    want: float | None = None
    want_backward: float | None = None
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)
    ordered: bool = False

    @property
    def name(self) -> str:
        more = [f"{k}={v}" for k, v in self.changed.items()] + ["in an order"] * self.ordered
        return ", ".join([f"{self.op} {self.case}", *more])


TARGETS = (
    Target("ssd_scan", "7b-both", 0.6, 3.6 + 0.6),
    Target("ssd_scan", "7b-forward", 0.32, 2 + 0.32),
    Target("ssd_scan", "mamba-2", 2.5, 11 + 2.5),
    Target("window_attention", "7b", 0.32, 1.3 + 0.32),
    Target("ssd_scan", "7b-both", ordered=True),
    Target("ssd_scan", "7b-both", changed=dict(P=136)),
    Target("ssd_scan", "7b-both", changed=dict(P=72, N=72)),
    Target("window_attention", "swin, 8x8"),
    Target("window_attention", "swin, 12x12"),
)
SMALL_OPS = (
    *(Target("ssd_step", f"7b, batch {b}") for b in (1, 16, 64)),
    Target("causal_conv1d", "layer"),
    Target("branch_mix_norm", "layer"),
)


def bench_of(target: Target, emulated: bool) -> tuple[Bench, str]:
    """The target's bench, with the target's case in it."""
    bench = run.load(target.op)
    case = bench.cases[target.case]
    sizes = case.sizes | target.changed
    if emulated:
        sizes |= {k: v for k, v in SMALL.items() if k in sizes}
        sizes |= {k: min(sizes[k], 72) for k in ("P", "N") if k in sizes}

    def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
        inputs = bench.make(c, dtype, device)
        if target.ordered:
            inputs["token_order"] = torch.stack([torch.randperm(c["L"]) for _ in range(c["B"])]).int().to(device)
        return inputs

    changed = dataclasses.replace(case, sizes=sizes)
    return dataclasses.replace(bench, cases={target.name: changed}, make=make), target.name


def tests(session: Session) -> Iterator[Row]:
    """The GPU's tests of the CUDA kernels of the two ops that have targets."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-k", "cuda and (ssd_scan or window_attention)"]
    if session.emulated:
        command += ["--collect-only"]
    elif subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0:
        command += ["-n", "12"]
    command += [f"--junit-xml={session.out / 'quick_tests.xml'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(120, session.left()))
    (session.out / "quick_tests.log").write_text(done.stdout + done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    nothing = session.emulated and done.returncode in (0, 5)  # 5: none of them is collected without a GPU
    yield dict(result=("ok: " if done.returncode == 0 or nothing else "failed: ") + (lines[-1] if lines else "-"))


def _results(target: Target, inputs: Inputs, wrt: tuple[str, ...]) -> list[Tensor]:
    leaves = {k: v.detach().clone().requires_grad_(k in wrt) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    out = run_op(target.op, **leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    if not wrt:
        return outputs
    wanted = [leaves[k] for k in wrt if k in leaves]
    return [o.detach() for o in outputs] + list(torch.autograd.grad([o.float().sum() for o in outputs], wanted))


def correct(session: Session, target: Target) -> Iterator[Row]:
    """A part against float64, of windows with gradients; then the whole twice: the same bits, and all written."""
    bench, name = bench_of(target, session.emulated)
    case = bench.cases[name]
    if target.op == "ssd_scan" and case["L"] > PART:
        part = dataclasses.replace(case, sizes=case.sizes | dict(B=1, L=PART))
    elif target.op == "window_attention" and not session.emulated:
        part = dataclasses.replace(case, sizes=case.sizes | dict(B=1, grid=(*(min(s, 16) for s in case["grid"]),)))
    else:
        part = case
    wrt = bench.differentiable if target.want_backward else ()
    judged = wrt if target.op == "window_attention" else ()  # a scan's reference would keep every state for them
    check_implementation(target.op, session.impl, bench.make(part, torch.bfloat16, session.device), judged)
    inputs = bench.make(case, torch.bfloat16, session.device)
    with linmu_ops.use_impl(f"{target.op}:{session.impl}"):
        first, second = (_results(target, inputs, wrt) for _ in range(2))
    if not all(t.isfinite().all() for t in first):
        raise AssertionError("not finite, or not written")
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise AssertionError("two runs gave different bits")
    yield dict(result="right, the same bits twice" + (", gradients too" if wrt else ""))


def timed(session: Session, target: Target, backward: bool, seconds: float) -> Iterator[Row]:
    bench, name = bench_of(target, session.emulated)
    peers = () if session.emulated or target.ordered else PEERS.get(target.op, ())
    rows = measure.measure(
        bench, name, torch.bfloat16, session.device, backward=backward, wanted=(session.impl, *peers),
        seconds=seconds, warmup=0.0 if session.emulated else 0.1, rounds=(1, 1) if session.emulated else (5, 20),
    )  # fmt: skip
    ours = next(r for r in rows if r["impl"] == measure.OURS + session.impl)
    others = {r["impl"]: r["us"] * 1e-3 for r in rows if "us" in r and r is not ours}
    best = min(others, key=lambda n: others[n], default=None)
    ms, want = ours["us"] * 1e-3, target.want_backward if backward else target.want
    yield dict(
        ms=ms, roof_percent=ours["roof_percent"], peer=best, peer_ms=None if best is None else others[best],
        want_ms=want, rows=rows,
        result="no GPU" if session.emulated else "" if want is None else "met" if ms <= want else f"{ms / want:.1f} x",
    )  # fmt: skip


def counters(session: Session, target: Target) -> Iterator[Row]:
    """What ncu reads of one call, as a table of its own file."""
    if session.emulated or shutil.which("ncu") is None:
        yield dict(result="left out: no ncu here" if not session.emulated else "no GPU")
        return
    sections = (
        "SpeedOfLight", "SchedulerStats", "WarpStateStats", "InstructionStats", "MemoryWorkloadAnalysis", "Occupancy",
    )  # fmt: skip
    call = "import sys; from bench import quick; quick.call_once(int(sys.argv[1]))"
    file = session.out / f"quick_ncu_{target.op}_{target.case.replace(' ', '_').replace(',', '')}.csv"
    command = [
        "ncu", "--clock-control", "none", "--kernel-name", f"regex:{KERNELS}", "--launch-count", "8", "--csv",
        "--page", "raw", *(a for s in sections for a in ("--section", s)),
        sys.executable, "-c", call, str(TARGETS.index(target)),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(60, session.left()))
    file.write_text(done.stdout)
    yield dict(result=f"{file.name}, exit {done.returncode}")


def call_once(number: int) -> None:
    """For ncu: the target of that number, forward."""
    bench, name = bench_of(TARGETS[number], False)
    with linmu_ops.use_impl(f"{bench.op}:cuda"):
        run_op(bench.op, **bench.make(bench.cases[name], torch.bfloat16, "cuda"))
    torch.cuda.synchronize()


def few_configurations() -> None:
    """Two for each of mamba_ssm's kernels: its tuner would compile about 160. Before they are imported."""
    with contextlib.suppress(ImportError):
        tuner: Any = importlib.import_module("mamba_ssm.utils.determinism")
        whole = tuner.autotune_configs
        tuner.autotune_configs = lambda configs: whole(configs)[:2]


def run_all(session: Session) -> None:
    few_configurations()
    step = session.step
    step("machine", 5, lambda: check.machine(session))
    step("tests", 20, lambda: tests(session))
    for target in TARGETS:
        step(f"{target.name}: correct", 10, lambda t=target: correct(session, t))  # type: ignore[misc]
    for target in TARGETS:
        step(target.name, 10, lambda t=target: timed(session, t, False, 0.5))  # type: ignore[misc]
        if target.want_backward:
            name = f"{target.name}, with backward"
            step(name, 10, lambda t=target: timed(session, t, True, 0.5))  # type: ignore[misc]
    for target in SMALL_OPS:
        step(target.name, 5, lambda t=target: timed(session, t, False, 0.2))  # type: ignore[misc]
    for target in TARGETS[:4]:
        step(f"{target.name}: counters", 40, lambda t=target: counters(session, t))  # type: ignore[misc]


def main(argv: list[str] | None = None) -> int:
    return check.main("quick", __doc__.splitlines()[0], 440.0, run_all, argv)


if __name__ == "__main__":
    sys.exit(main())
