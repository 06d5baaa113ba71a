"""What tests, benches and `linmu env` share: the tolerance rule, the comparison that a NaN cannot pass, small cases."""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _registry
from ._dims import accumulate_dtype
from ._directions import DeltaReverse, Reverse


def to_double(value: Any) -> Any:
    """A float tensor as float64 (requires_grad kept), anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def offset(got: Tensor, exact: Tensor) -> Tensor:
    """got - exact, float64; 0 where both are the same infinity, as is the log of nothing."""
    return (got.double() - exact).masked_fill((got == exact) & exact.isinf(), 0)


def assert_within_twice(
    got: Tensor, exact: Tensor, baseline: Tensor, name: str = "value",
    condition: Callable[[float], float] = lambda enough: 0.0,
) -> None:  # fmt: skip
    """Fail unless |got - exact| <= 2 max|baseline - exact| + a few roundings of the output's own dtype.

    `exact` is the float64 reference, `baseline` the same-dtype PyTorch expression: the tolerance is what PyTorch
    itself gets wrong, so it needs no folklore per shape. Where a sum of terms that cancel leaves few numbers, PyTorch
    may be right by luck: an error beyond the bound is judged by twice the `condition` of the result as well, which is
    told how much of it would be enough.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == baseline.dtype, f"{name}: dtype {got.dtype}, expected {baseline.dtype}"
    if got.numel() == 0:
        return
    if not got.is_floating_point():
        assert torch.equal(got, exact), f"{name}: {int((got != exact).sum())} of {got.numel()} numbers differ"
        return
    error = offset(got, exact).abs()
    scale = exact.masked_fill(exact.isinf(), 0).abs().max().item()
    bound = 2 * offset(baseline, exact).abs().max().item() + 4 * torch.finfo(got.dtype).eps * scale + 1e-30
    worst = int(error.flatten().argmax())
    # `not (<=)`, because a NaN must fail.
    enough = lambda: max(bound, 2 * condition(error.max().item() / 2))  # noqa: E731
    if not bool((error <= bound).all()) and not bool((error <= (bound := enough())).all()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{name}: error {error.flatten()[worst]:.3e} at {index} exceeds {bound:.3e} "
            f"(scale {scale:.3e}, {int(error.isnan().sum())} NaN)"
        )


def results_of(
    f: Callable[..., Any], inputs: dict[str, Any], wrt: Sequence[str], weigh: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """The outputs of `f(**inputs)`, a Tensor or a tuple, then the gradients of their sum under `weigh(outputs)`."""
    leaves = {k: v.detach().clone().requires_grad_(k in wrt) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    out = f(**leaves)
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    if not wrt:
        return outputs
    kept = [(o, w.to(o.dtype)) for o, w in zip(outputs, weigh(outputs), strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in kept], [leaves[k] for k in wrt], [w for _, w in kept], materialize_grads=True
    )
    return [o.detach() for o in outputs] + list(grads)


# What PyTorch's operations compute, and not only move.
ROUNDED = {
    "add", "bmm", "cumsum", "div", "exp", "log", "log1p", "mean", "mm", "mul", "pow", "rsqrt", "rsub", "sigmoid",
    "sigmoid_backward", "silu", "silu_backward", "softplus", "softplus_backward", "sqrt", "square", "sub", "sum",
    "threshold_backward",
}  # fmt: skip


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    e = (x - x.amax(dim, True)).exp()
    return e / e.sum(dim, True)


def _softmax_backward(grad: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return out * (grad - (grad * out).sum(dim, True))


def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    most = x.amax(dim, True)
    most = most.masked_fill(most.isinf(), 0)
    out = (x - most).exp().sum(dim, True).log() + most
    return out if keepdim else out.squeeze(dim)


# Operations of several steps, each of which is rounded: a difference that comes to 0 hides the roundings of its terms.
STEPS: dict[str, Callable[..., Tensor]] = {
    "_softmax": _softmax,
    "_softmax_backward_data": _softmax_backward,
    "logsumexp": _logsumexp,
}


@contextlib.contextmanager
def _references_in_the_open() -> Iterator[None]:
    """Each op is its reference, differentiated by autograd: a dispatch mode sees all that they do."""
    call = _registry.call
    _registry.call = lambda op, like, *args: _registry.OPS[op].entries[0][2](*args)
    try:
        yield
    finally:
        _registry.call = call


class _Roundings(TorchDispatchMode):
    """Moves what each of PyTorch's operations computes by half a unit in its last place, up or down, of float64 results
    that stand for such of another dtype."""

    def __init__(self, seed: int, unit: float) -> None:
        super().__init__()
        self.random = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        # Drawn once, and read from another place each time: most results are small, and there are thousands.
        self.factors = 1 + (torch.randint(0, 2, (1 << 16,), generator=generator) - 0.5).double() * unit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in STEPS:
            with self:
                return STEPS[func._opname](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func._opname.removesuffix("_") not in ROUNDED or not out.is_floating_point():
            return out
        count, first = out.numel(), self.random.randrange(1 << 15)
        if first + count > len(self.factors):
            self.factors = self.factors.repeat(-(-(first + count) // len(self.factors)))
        return out.mul_(self.factors.to(out.device)[first : first + count].view(out.shape))


class Judge:
    """The float64 `reference(**inputs)`, its gradients with respect to `wrt`, and what may be asked of others.

    The reference also runs in the inputs' own dtype, as the baseline of the tolerance rule.
    """

    def __init__(self, reference: Callable[..., Any], inputs: dict[str, Any], wrt: Sequence[str] = (), seed: int = 0):
        self.reference, self.inputs, self.wrt = reference, inputs, wrt
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: list[Tensor] = []
        self.base = results_of(reference, inputs, wrt, self._draw)
        self.exact = self._run(inputs, to_double)
        dtypes = [v.dtype for v in inputs.values() if isinstance(v, Tensor)]
        self._unit = torch.finfo(torch.float64 if torch.float64 in dtypes else torch.float32).eps
        self.largest, self.draws = [0.0] * len(self.exact), 0
        self.names = [f"output {i}" for i in range(len(self.base) - len(wrt))] + [f"gradient of {k}" for k in wrt]
        if any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in inputs.values()):
            # In float64 the judge is no more exact than what it judges, and its own error as baseline would be 0. What
            # PyTorch gets wrong in float32, counted in roundings, stands in, twice: an estimate for either side.
            narrow = {
                k: v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v for k, v in inputs.items()
            }
            rounding = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            every = zip(self.exact, self._run(narrow), self._run(narrow, to_double), self.base, strict=True)
            # A gradient of a narrower dtype beside them is rounded to that, by PyTorch too: its baseline stays.
            self.base = [b if b.dtype != torch.float64 else e + offset(c, j) * rounding for e, c, j, b in every]

    def _draw(self, outputs: list[Tensor]) -> list[Tensor]:
        drawn = [torch.randn(o.shape, generator=self.generator, dtype=torch.float64) for o in outputs]
        self.weights = [d.to(o.device, o.dtype) for d, o in zip(drawn, outputs, strict=True)]
        return self.weights

    def _run(self, inputs: dict[str, Any], change: Callable[[Any], Any] = lambda v: v) -> list[Tensor]:
        values = {k: change(v) for k, v in inputs.items()}
        return results_of(self.reference, values, self.wrt, lambda _: [change(w) for w in self.weights])

    def _condition(self, i: int, enough: float) -> float:
        """How far result `i` moves when every input and weight moves by a unit in its last place, up or down, and
        what each operation makes of them by half a unit, the most that a rounding moves it.

        The largest of four draws of signs, or where that is nearly `enough`, of up to 16: the size of the terms that a
        sum adds up, whatever it comes to. Of a single number four draws are all near 0 now and then. Of 16 bits it is a
        quarter of a unit, the mean error of one rounding: there only what is stored is rounded, not every step. Terms
        that depend on each other move together with the inputs, and apart with the operations: of a row of attention
        whose one weight is 1, the gradient of the scores is a difference of two numbers that PyTorch happens to compute
        alike, and another order of their sums does not.
        """
        while self.draws < 4 or (self.draws < 16 and enough / 4 <= self.largest[i] < enough):
            with _references_in_the_open(), _Roundings(self.draws, self._unit):
                results = self._run(self.inputs, self._moved)
            for k, (other, exact) in enumerate(zip(results, self.exact, strict=True)):
                if exact.numel() and exact.is_floating_point():
                    self.largest[k] = max(self.largest[k], offset(other, exact).abs().max().item())
            self.draws += 1
        return self.largest[i]

    def _moved(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        signs = torch.randint(0, 2, value.shape, generator=self.generator).to(value.device, torch.float64) * 2 - 1
        step = torch.finfo(value.dtype).eps / (4 if value.element_size() == 2 else 1)
        return to_double(value) * (1 + signs * step)

    def __call__(self, results: Sequence[Tensor]) -> None:
        """Raise AssertionError unless these outputs and gradients are as near as float arithmetic can promise."""
        every = zip(self.names, results, self.exact, self.base, strict=True)
        for i, (name, got, exact, base) in enumerate(every):
            assert_within_twice(got, exact, base, name, functools.partial(self._condition, i))


def check_against_reference(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    wrt: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Judge `op(**inputs)` and its gradients with respect to `wrt` by the float64 `reference(**inputs)`.

    Both return a Tensor or a tuple of Tensors.
    """
    judge = Judge(reference, inputs, wrt, seed)
    judge(results_of(op, inputs, wrt, lambda _: judge.weights))


# What holds a scan's `reverse_*` arguments.
REVERSES = {"ssd_scan": Reverse, "gated_delta_scan": DeltaReverse}


def grouped(inputs: dict[str, Any], op: str = "ssd_scan") -> dict[str, Any]:
    """Arguments as the op takes them, of arguments of which each tensor has a name: `reverse_dt` is in `reverse`."""
    own = {k.removeprefix("reverse_"): v for k, v in inputs.items() if k.startswith("reverse_")}
    rest = {k: v for k, v in inputs.items() if not k.startswith("reverse_")}
    return rest | ({"reverse": REVERSES[op](**own)} if own else {})


def run_op(op: str, /, **inputs: Any) -> Any:
    """The op, of arguments of which each tensor has a name of its own, as tests change one at a time."""
    import linmu_ops

    return getattr(linmu_ops, op)(**grouped(inputs, op))


def written(op: str) -> list[str]:
    """The arguments that an op updates in place."""
    arguments = getattr(torch.ops.linmu, op).default._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def check_implementation(op: str, impl: str, inputs: dict[str, Any], wrt: Sequence[str] = ()) -> None:
    """Judge one implementation of an op by the reference; what is updated in place is judged too."""

    def by(which: str) -> Callable[..., Any]:
        def call(**values: Any) -> Any:
            with _registry.use_impl(f"{op}:{which}"):
                out = run_op(op, **values)
            outputs = out if isinstance(out, tuple) else (out,)
            return (*outputs, *(values[name] for name in written(op) if values.get(name) is not None))

        return call

    check_against_reference(by(impl), by("reference"), inputs, wrt)


Triple = tuple[int, int, int]


class _Draw:
    """Reproducible inputs, the same on every device."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def unit(self, *shape: int) -> Tensor:
        """In (0, 1), accumulate dtype."""
        return (0.01 + 0.98 * torch.rand(shape, generator=self.generator)).to(self.device, accumulate_dtype(self.dtype))

    def small(self, *shape: int) -> Tensor:
        """Accumulate dtype."""
        return self.normal(*shape).to(accumulate_dtype(self.dtype))

    def mask(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < 0.5).to(self.device)

    def order(self, rows: int, length: int) -> Tensor:
        orders = [torch.randperm(length, generator=self.generator) for _ in range(rows)]
        return torch.stack(orders).to(self.device, torch.int32)

    def segments(self, rows: int, length: int, every: int) -> Tensor:
        return (torch.arange(length, dtype=torch.int32) // every).repeat(rows, 1).to(self.device)


def _ssd_scan(r: _Draw, B: int = 2, L: int = 37, P: int = 8, N: int = 12, normalize: bool = False) -> dict[str, Any]:
    H, G = 8, 4
    inputs = dict(
        x=r.normal(B, L, G, P), dt=r.unit(B, L, H), A=-r.unit(H), B=r.normal(B, L, G, N), C=r.normal(B, L, H, N),
        D=r.small(H), dt_bias=r.small(H), dt_softplus=True, direction="both", reverse_dt=r.unit(B, L, H),
        reverse_A=-r.unit(H), reverse_B=r.normal(B, L, G, N), reverse_C=r.normal(B, L, H, N),
        reverse_dt_bias=r.small(H), reverse_mask=r.mask(B, L), reverse_seq_idx=r.segments(B, L, 9),
        gate=r.unit(B, L, H), seq_idx=r.segments(B, L, 23), token_order=r.order(B, L),
        initial_state=r.small(B, H, P + normalize, N), return_final_state=True, normalize=normalize,
    )  # fmt: skip
    return _without_negative_weights(inputs) if normalize else inputs


def _without_negative_weights(inputs: dict[str, Any]) -> dict[str, Any]:
    names = ("B", "C", "D", "reverse_B", "reverse_C", "initial_state", "state")
    return inputs | {k: inputs[k].abs() for k in names if k in inputs}


def _ssd_step(r: _Draw, B: int = 2, P: int = 8, N: int = 12, normalize: bool = False) -> dict[str, Any]:
    H, G = 8, 4
    inputs = dict(
        state=r.small(B, H, P + normalize, N), x=r.normal(B, G, P), dt=r.unit(B, H), A=-r.unit(H), B=r.normal(B, G, N),
        C=r.normal(B, H, N), D=r.small(H), dt_bias=r.small(H), dt_softplus=True, normalize=normalize,
    )  # fmt: skip
    return _without_negative_weights(inputs) if normalize else inputs


def _exact_step(
    r: _Draw, B: int = 2, H: int = 6, G: int = 3, P: int = 8, N: int = 12, R: int = 6, s: int = 3, window: int = 5,
    kept: int = 4,
) -> dict[str, Any]:  # fmt: skip
    ring, angle = window + min(window, 64), r.small(1, R)
    n, rows = s + ring + kept, torch.arange(B, device=r.device)
    return dict(
        keys=r.normal(B, G, n, P), values=r.normal(B, G, n, P), steps=r.unit(B, G, n - s, H // G),
        seen=4 * ring + kept + 7 * rows, ssm=r.unit(B, H, P + 1, N), q=r.normal(B, H, P), k=r.normal(B, G, P),
        v=r.normal(B, G, P), dt=r.small(B, H), dt_bias=r.small(H), rest=r.small(B, H), c_map=r.normal(H, P, N),
        scale=r.unit(H), window=window, sinks=rows[:, None] + torch.arange(s, device=r.device) != 1, cos=angle.cos(),
        sin=angle.sin(), z_gate=r.normal(B, H * P), real=rows % 3 != 2,
    )  # fmt: skip


def _far_attention(r: _Draw, B: int = 2, L: int = 23, before: int = 6, P: int = 8, N: int = 12) -> dict[str, Any]:
    H, G, T = 6, 3, before + L
    own = torch.arange(T, device=r.device, dtype=torch.int32)
    return dict(
        y=r.normal(B, L, H, P), lse=r.small(B, L, H), rest=r.small(B, L, H), q=r.normal(B, L, H, P),
        k=r.normal(B, T, G, P), v=r.normal(B, T, G, P), steps=r.unit(B, T, G, H // G),
        entered=torch.where(own % 5 == 4, -1, own // 4).expand(B, G, T).contiguous(),
        when=torch.where(own % 7 == 3, -1, own // 4)[before:].expand(B, L).contiguous(), b_map=r.small(G, P, N),
        c_map=r.small(H, P, N), scale=r.unit(H), rates=r.unit(H), z_gate=r.normal(B, L, H * P),
        initial_state=r.unit(B, H, P + 1, N), last=torch.full((B,), T // 5, dtype=torch.int32, device=r.device),
    )  # fmt: skip


def _gated_delta_scan(r: _Draw, B: int = 2, L: int = 37, K: int = 12, V: int = 8) -> dict[str, Any]:
    H, G = 8, 4
    return dict(
        q=r.normal(B, L, H, K), k=r.normal(B, L, G, K), v=r.normal(B, L, G, V), g=-r.unit(B, L, H),
        beta=r.unit(B, L, H), use_qk_l2norm_in_kernel=True, direction="both", reverse_q=r.normal(B, L, H, K),
        reverse_k=r.normal(B, L, G, K), reverse_g=-r.unit(B, L, H), reverse_beta=r.unit(B, L, H),
        reverse_mask=r.mask(B, L), reverse_seq_idx=r.segments(B, L, 9), gate=r.unit(B, L, H),
        seq_idx=r.segments(B, L, 23), token_order=r.order(B, L), initial_state=r.small(B, H, K, V),
        return_final_state=True,
    )  # fmt: skip


def _gated_delta_step(r: _Draw, B: int = 2, K: int = 12, V: int = 8) -> dict[str, Any]:
    H, G = 8, 4
    return dict(
        state=r.small(B, H, K, V), q=r.normal(B, H, K), k=r.normal(B, G, K), v=r.normal(B, G, V), g=-r.unit(B, H),
        beta=r.unit(B, H), use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def _causal_conv1d(r: _Draw, B: int = 2, L: int = 19, D: int = 24, K: int = 4) -> dict[str, Any]:
    return dict(
        x=r.normal(B, L, D), weight=r.small(D, K), bias=r.small(D), activation="silu", seq_idx=r.segments(B, L, 7),
        token_order=r.order(B, L), initial_state=r.normal(B, K - 1, D), return_final_state=True,
    )  # fmt: skip


def _causal_conv1d_step(r: _Draw, B: int = 2, D: int = 24, K: int = 4) -> dict[str, Any]:
    return dict(state=r.normal(B, K - 1, D), x=r.normal(B, D), weight=r.small(D, K), bias=r.small(D), activation="silu")


def _gated_norm(r: _Draw, B: int = 2, L: int = 9, D: int = 40) -> dict[str, Any]:
    return dict(x=r.normal(B, L, D), z=r.normal(B, L, D), weight=r.small(D), group_size=D // 2)


def _branch_mix_norm(r: _Draw, B: int = 2, L: int = 9, D: int = 40) -> dict[str, Any]:
    return dict(
        a=r.normal(B, L, D), b=r.normal(B, L, D), mix=r.unit(B, L), mask=r.mask(B, L), weight=r.small(D),
        bias=r.small(D),
    )  # fmt: skip


def _window_attention(
    r: _Draw, B: int = 2, P: int = 16, R: int = 12, grid: Triple = (3, 5, 6), window: Triple = (2, 3, 4)
) -> dict[str, Any]:
    H, L = 4, math.prod(grid)
    angle = r.small(1, L, R)
    return dict(
        q=r.normal(B, L, H, P), k=r.normal(B, L, 2, P), v=r.normal(B, L, 2, P), grid=grid, window=window,
        shift=(1, 1, 2), bias=r.small(H, *(2 * w - 1 for w in window)), cos=angle.cos(), sin=angle.sin(),
        causal=True, return_lse=True,
    )  # fmt: skip


def _near_attention(r: _Draw, B: int = 2, L: int = 21, before: int = 5, P: int = 16) -> dict[str, Any]:
    H, G, m, T = 4, 2, 3, before + L
    own = torch.arange(before, T, device=r.device)
    listed = torch.randint(-1, max(T // 2, 1), (B * G * 2, m), generator=r.generator)
    which = torch.arange(B * G, device=r.device).view(B, G, 1) * 2 + (own > before + 2 * L // 3)
    return dict(
        q=r.normal(B, L, H, P), k=r.normal(B, T, G, P), v=r.normal(B, T, G, P),
        low=(own - 4).clamp(min=0).int().repeat(B, 1), high=(own + 1).int().repeat(B, 1),
        which=which.masked_fill(own < before + L // 3, -1).int(), listed=listed.to(r.device, torch.int32),
    )  # fmt: skip


# Per op, one small call that gives every tensor argument.
CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "branch_mix_norm": _branch_mix_norm,
    "causal_conv1d": _causal_conv1d,
    "causal_conv1d_step": _causal_conv1d_step,
    "exact_step": _exact_step,
    "far_attention": _far_attention,
    "gated_delta_scan": _gated_delta_scan,
    "gated_delta_step": _gated_delta_step,
    "gated_norm": _gated_norm,
    "near_attention": _near_attention,
    "ssd_scan": _ssd_scan,
    "ssd_step": _ssd_step,
    "window_attention": _window_attention,
}


def small_inputs(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Any]:
    """Arguments of one small call of `op`, for `run_op`; `sizes` in place of its own."""
    return CASES[op](_Draw(device, dtype), **sizes)


def run_small(
    op: str, impl: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: Any
) -> dict[str, Tensor]:
    """Outputs, inputs written to and gradients of the small case, computed by `impl` alone; raises if it cannot."""
    inputs = small_inputs(op, device, dtype, **sizes)
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    before = {k: v.clone() for k, v in tensors.items()}
    leaves = {k: v for k, v in tensors.items() if v.is_floating_point() and _registry.OPS[op].backward}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with _registry.use_impl(f"{op}:{impl}"):
        result = run_op(op, **inputs)
        outputs = list(result) if isinstance(result, tuple) else [result]
        found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        found |= {f"{k} (in place)": v for k, v in tensors.items() if not torch.equal(v, before[k])}
        if leaves:
            grads = torch.autograd.grad(
                outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs], allow_unused=True
            )
            found |= {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return found
