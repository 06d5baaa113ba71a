"""Tensors of a fuzzed call: their values, how they lie in memory, and the judgement of the call by its reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

import linmu_ops
from linmu_ops._testing import Judge, results_of, run_op, written

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
VALUES = ("normal", "small", "large", "biased", "zero", "sparse")
PLACES = ("contiguous", "offset", "expanded", "strided", "transposed", "negated")
IN_PLACE = {name for op in linmu_ops._registry.OPS for name in written(op)}
UGLY = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 37, 48, 63, 64, 65, 70)

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(tuple(DTYPES))
batches = st.sampled_from((1, 2, 3, 0))
threads = st.sampled_from((1, 1, 1, 2, 3))


def sizes(most: int, least: int = 0) -> st.SearchStrategy[int]:
    return st.integers(least, min(most, 20)) | st.sampled_from([n for n in UGLY if least <= n <= most])


def some(*names: str) -> st.SearchStrategy[list[str]]:
    """Any of these options, sorted."""
    return st.sets(st.sampled_from(names)).map(sorted)


def manners(*names: str) -> st.SearchStrategy[dict[str, list[Any]]]:
    """For each tensor its values, its place in memory, and the dimension that the place is about."""
    one = st.tuples(st.sampled_from(VALUES), st.sampled_from(PLACES), st.integers(0, 3)).map(list)
    return st.dictionaries(st.sampled_from(names), one)


class Tensors:
    """The inputs of one call, of the dtype of `case`, with the manners that it gives them.

    What is made is the memory, `bases`; `placed` gives the tensors that lie in it, differentiably, so that expanded and
    strided ones reach the op as they are.
    """

    def __init__(self, case: dict[str, Any]) -> None:
        self.manners: dict[str, list[Any]] = case["manners"]
        self.dtype = DTYPES[case["dtype"]]
        self.small = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.generator = torch.Generator().manual_seed(case["seed"])
        self.bases: dict[str, Tensor] = {}
        self.views: dict[str, Callable[[Tensor], Tensor]] = {}

    def normal(self, shape: Sequence[int], values: str) -> Tensor:
        t = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        factor = {"small": 1e-2, "large": 4.0 if self.dtype == torch.float16 else 30.0, "zero": 0.0}.get(values, 1.0)
        if values == "biased":
            return t + (4 if self.dtype == torch.float16 else 40)
        return t * factor * (torch.rand(t.shape, generator=self.generator) < 0.2 if values == "sparse" else 1)

    def uniform(self, shape: Sequence[int], values: str) -> Tensor:
        """In (0, 1); at its ends, near them, or both."""
        t = torch.rand(*shape, generator=self.generator, dtype=torch.float64)
        return {"small": t * 1e-3, "large": 1 - t * 1e-3, "zero": t * 0, "sparse": t.round()}.get(values, t)

    def integers(self, shape: Sequence[int], low: int, high: int) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=self.generator)

    def segments(self, name: str, batch: int, length: int) -> None:
        values, *_ = self.manners.get(name, ["normal"])
        chance = {"small": 0.01, "large": 0.9, "zero": 0.0, "sparse": 0.3}.get(values, 0.1)
        index = (torch.rand(batch, length, generator=self.generator) < chance).cumsum(1)
        far = torch.tensor([0, 2**31 - 1, -(2**31)])[index % 3]
        self.add(name, (far if values == "biased" else index).int())

    def order(self, batch: int, length: int) -> None:
        rows = [torch.randperm(length, generator=self.generator) for _ in range(batch)]
        self.add("token_order", torch.stack(rows).int() if rows else torch.zeros(0, length).int())

    def mask(self, name: str, batch: int, length: int) -> None:
        self.add(name, self.uniform((batch, length), self.manners.get(name, ["normal"])[0]) < 0.7)

    def draw(
        self, name: str, shape: Sequence[int], kind: str = "normal", dtype: torch.dtype | None = None, factor: float = 1
    ) -> None:
        """Values of a kind, "normal" or "uniform"."""
        values = getattr(self, kind)(shape, self.manners.get(name, ["normal"])[0])
        self.add(name, (factor * values).to(self.dtype if dtype is None else dtype))

    def add(self, name: str, t: Tensor) -> None:
        _, place, dim = self.manners.get(name, ["normal", "contiguous", 0])
        if t.dim() == 0 or name in IN_PLACE:  # which must be contiguous
            place = "contiguous"
        d = dim % max(t.dim(), 1)
        gap = float("nan") if t.is_floating_point() else 0  # that nobody may read
        if place == "offset":
            self.bases[name] = torch.cat((t.new_full((3,), gap), t.flatten()))
            self.views[name] = lambda base: base[3:].view(t.shape)
        elif place == "expanded" and t.shape[d] > 1 and not (name == "token_order" and d == 1):
            self.bases[name] = t.narrow(d, 0, 1).clone()
            self.views[name] = lambda base: base.expand(t.shape)
        elif place == "strided":
            self.bases[name] = torch.stack((t, torch.full_like(t, gap)), d + 1).flatten(d, d + 1)
            self.views[name] = lambda base: base[(*[slice(None)] * d, slice(None, None, 2))]
        elif place == "transposed":
            self.bases[name] = t.transpose(d, -1).contiguous()
            self.views[name] = lambda base: base.transpose(d, -1)
        elif place == "negated" and t.is_floating_point():
            self.bases[name] = -t
            self.views[name] = torch._neg_view
        else:
            self.bases[name] = t
            self.views[name] = lambda base: base

    def placed(self, **values: Any) -> dict[str, Any]:
        return {k: self.views[k](v) if k in self.views else v for k, v in values.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.placed(**self.bases)


def call(op: str, **inputs: Any) -> Any:
    """Outputs of the op, and what it updates in place."""
    out = run_op(op, **inputs)
    state = [inputs[name] for name in written(op) if inputs.get(name) is not None]
    if not state:
        return out
    outputs = out if isinstance(out, tuple) else (out,)
    return (*(t for t in outputs if t is not None), *state)


def by(impl: str, op: str, tensors: Tensors, options: dict[str, Any]) -> Callable[..., Any]:
    def run(**bases: Any) -> Any:
        with linmu_ops.use_impl(f"{op}:{impl}"):
            return call(op, **tensors.placed(**bases), **options)

    return run


def judge(
    op: str, tensors: Tensors, options: dict[str, Any], wrt: Sequence[str], change: Callable[[Any], Any] | None = None
) -> None:
    """The kernel and its gradients against the float64 reference, where that is finite in the tensors' own dtype.

    change: of the outputs, what can be compared.
    """

    def changed(f: Callable[..., Any]) -> Callable[..., Any]:
        return f if change is None else lambda **bases: change(f(**bases))

    reference, kernel = (changed(by(impl, op, tensors, options)) for impl in ("reference", "cpu"))
    leaves = {k: t.clone().requires_grad_(k in wrt) for k, t in tensors.bases.items()}
    out = reference(**leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    if wrt:
        used = [o for o in out if o.requires_grad]
        out += torch.autograd.grad([o.sum() for o in used], [leaves[k] for k in wrt], allow_unused=True)
    if not all(o is None or o.isfinite().all() for o in out):
        reject()  # beyond the range of the dtype, or a root at 0
    wrt = [k for k, g in zip(wrt, out[len(out) - len(wrt) :], strict=True) if g is not None]
    rule = Judge(reference, tensors.bases, wrt)
    rule(results_of(kernel, tensors.bases, wrt, lambda _: rule.weights))


def with_threads(check: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    @functools.wraps(check)
    def run(case: dict[str, Any]) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(case["threads"])
        try:
            check(case)
        finally:
            torch.set_num_threads(before)

    return run
