"""One case of one op: every implementation that can compute it, checked, then timed side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import linmu_ops
from linmu_ops import _registry

from . import roofs, timing
from .peers import Bench, Case, Inputs, Missing, Peer

OURS = "linmu "
NATIVE = "native"  # of what is no single op: each of its ops as it is served
# Of the largest value: two float32 results of long sums differ by more than a rounding, a wrong one by much more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9}


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _call(bench: Bench) -> Callable[..., Any]:
    return bench.call or getattr(linmu_ops, bench.op)


def _ours(bench: Bench, impl: str) -> Peer:
    function = _call(bench)
    if impl == NATIVE:
        return Peer(function)
    op = bench.op if bench.op in _registry.OPS else "*"

    def run(**inputs: Any) -> Any:
        with linmu_ops.use_impl(f"{op}:{impl}"):
            return function(**inputs)

    return Peer(run)


def implementations(bench: Bench, case: Case, device: str, wanted: list[str]) -> dict[str, Callable[[], Peer]]:
    """Builders by name, ours first. `wanted`: "auto" (what serves, and eager peers), "compiled" (and compiled
    peers), "all", or names of implementations."""
    found: dict[str, Callable[[], Peer]] = {}
    if bench.op in _registry.OPS:
        for choice in linmu_ops.explain(bench.op, device=device):
            if choice.chosen or choice.impl in wanted or ("all" in wanted and choice.why_not is None):
                found[OURS + choice.impl] = functools.partial(_ours, bench, choice.impl)
    else:
        forced = [i for i in _registry.NAMESPACE if i in wanted]
        for impl in [NATIVE, *forced]:
            found[OURS + impl] = functools.partial(_ours, bench, impl)
    for name, build in bench.peers.items():
        kind = "compiled" if name.endswith(", compiled") else "auto"
        if "all" in wanted or name in wanted or kind in wanted:
            found[name] = functools.partial(build, case)
    return found


class Variant:
    """One implementation with inputs of its own: a call to time, and its results to compare."""

    def __init__(self, bench: Bench, peer: Peer, inputs: Inputs, backward: bool) -> None:
        own = {k: v.clone() if k in bench.in_place else v for k, v in inputs.items()}
        own = peer.prepare(own)
        self.peer = peer
        self.leaves: list[Tensor] = []
        self.names = []
        if backward:
            for name in bench.differentiable:
                if isinstance(own.get(name), Tensor):
                    own[name] = own[name].detach().clone().requires_grad_()
                    self.names.append(name)
                    self.leaves.append(own[name])
        self.run = functools.partial(peer.run, **own)
        self.weights: list[Tensor] = []

    def __call__(self) -> list[Tensor]:
        """Outputs, or gradients of all leaves."""
        if not self.leaves:
            with torch.no_grad():
                return _tensors(self.run())
        outputs = _tensors(self.run())
        if not self.weights:
            self.weights = [torch.ones_like(o) for o in outputs]
        return list(torch.autograd.grad(outputs, self.leaves, self.weights))

    def results(self) -> dict[str, Tensor]:
        """What must agree between implementations, in our layout."""
        values = self()
        if self.leaves:
            named = zip(self.names, values, strict=True)
            return {f"gradient of {n}": self.peer.finish_gradient(n, g) for n, g in named}
        return {f"output {i}": self.peer.finish(v).clone() for i, v in enumerate(values)}


def _difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> str | None:
    """How the results differ, or None."""
    for name, w in want.items():
        g = got[name]
        if g.shape != w.shape:
            return f"{name} has shape {tuple(g.shape)}, ours {tuple(w.shape)}"
        error, scale = (g.double() - w.double()).abs().max().item(), w.double().abs().max().item()
        if not error <= TOLERANCE.get(w.dtype, 0.0) * scale:
            return f"{name} differs from ours by {error:.1e} at a scale of {scale:.1e}"
    return None


def measure(
    bench: Bench, case_name: str, dtype: torch.dtype, device: str, *, backward: bool = False,
    wanted: tuple[str, ...] = ("auto",), seconds: float = 1.0, warmup: float = 0.2, rounds: tuple[int, int] = (3, 200),
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per implementation of `bench.cases[case_name]`; `status` is "ok" or why there is no time."""
    case = bench.cases[case_name]
    torch.manual_seed(0)
    inputs = bench.make(case, dtype, device)
    ready: dict[str, Callable[[], object]] = {}
    status: dict[str, str] = {}
    want: dict[str, Tensor] = {}
    for name, build in implementations(bench, case, device, list(wanted)).items():
        try:
            variant = Variant(bench, build(), inputs, backward)
            results = variant.results()
            want = want or results
            different = _difference(results, want)
            status[name] = "ok" if different is None else f"not timed: {different}"
        except Missing as e:
            status[name] = f"missing: {e}"
        except Exception as e:
            # A peer of any kind may fail in any way; the row says how.
            if name.startswith(OURS):
                raise
            status[name] = f"failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:300]
        if status[name] == "ok":
            ready[name] = variant
    del want, results

    itemsize = torch.empty(0, dtype=dtype).element_size()
    flops, num_bytes = bench.flops(case, backward), bench.bytes(case, itemsize, backward)
    copy, copied = roofs.copy(num_bytes, device)
    timed = dict(ready) | {"copy": copy}
    if bench.products:
        gemm, gemm_flops = roofs.gemm(dtype, device)
        timed |= {"gemm": gemm}
    times = timing.interleave(timed, device, seconds=seconds, warmup=warmup, rounds=rounds)
    bandwidth = copied / times["copy"].median
    rate = gemm_flops / times["gemm"].median if bench.products else float("inf")
    floor = max(num_bytes / bandwidth, flops / rate)
    best_peer = min((times[n].median for n in ready if not n.startswith(OURS)), default=None)
    rows = []
    for name, state in status.items():
        row: dict[str, Any] = dict(
            op=bench.op, case=case_name, sizes=case.sizes, dtype=str(dtype).removeprefix("torch."), backward=backward,
            impl=name, status=state, target=case.target,
        )  # fmt: skip
        if name in ready:
            t = times[name]
            row |= dict(
                us=t.median * 1e6, us_p20=t.p20 * 1e6, us_p80=t.p80 * 1e6, rounds=t.rounds,
                gbps=num_bytes / t.median * 1e-9, gflops=flops / t.median * 1e-9, roof_percent=100 * floor / t.median,
                bound="memory" if floor == num_bytes / bandwidth else "compute",
                times_best_peer=None if best_peer is None else best_peer / t.median,
            )  # fmt: skip
        rows.append(
            row | dict(roof_copy_gbps=bandwidth * 1e-9, roof_gemm_gflops=rate * 1e-9 if bench.products else None)
        )
    return rows
