"""Several sequences in one row: what becomes of the others where one holds values that are large, or none.

No bit of an output or gradient of theirs may change. Cases of every op that takes `seq_idx`, and the check.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch

import linmu_ops
from linmu_ops._testing import results_of, run_op, to_double


@dataclasses.dataclass(frozen=True)
class Shape:
    L: int
    H: int
    P: int
    N: int
    segments: tuple[int, ...]  # where each begins; the second is spoiled
    chunk: int = 32

    @property
    def middle(self):
        return slice(self.segments[1], self.segments[2])


# Chunks of 32; a segment spans two, another starts and ends within one.
WHOLE = Shape(70, 4, 20, 20, (0, 17, 40, 43))
VALUES = (0.3, 300.0, 1e8, 1e19, 1e30, -1e30, math.inf, -math.inf, math.nan)
DIRECTIONS = ("forward", "reverse", "both")
# Of each op: options, and names of what is changed together.
OPS = {
    "ssd_scan": (
        ((), ("state", "gate", "own"), ("mean", "state")),
        (["x"], ["B"], ["C"], ["dt"], ["x", "B", "C", "dt"]),
    ),
    "gated_delta_scan": (
        ((), ("state", "gate", "own"), ("norm", "state")),
        (["q"], ["k"], ["v"], ["g"], ["beta"], ["q", "k", "v", "g", "beta"]),
    ),
}
NARROW = ("x", "B", "C", "q", "k", "v")


class Draw:
    def __init__(self, positive):
        self.generator, self.positive = torch.Generator().manual_seed(3), positive

    def unit(self, *shape):
        return torch.rand(*shape, generator=self.generator)

    def normal(self, *shape):
        values = torch.randn(*shape, generator=self.generator)
        return values.abs() if self.positive else values


def ssd_scan_inputs(r, options, s):
    L, H, P, N = s.L, s.H, s.P, s.N
    inputs = dict(
        x=torch.randn(2, L, 2, P, generator=r.generator), dt=r.unit(2, L, H) * 0.3 + 0.01, A=-r.unit(H) - 0.1,
        B=r.normal(2, L, 1, N), C=r.normal(2, L, 2, N), D=r.normal(H), chunk_size=s.chunk,
    )  # fmt: skip
    own = dict(dt=r.unit(2, L, H), B=r.normal(2, L, 1, N), C=r.normal(2, L, 2, N))
    if "mean" in options:
        inputs["normalize"] = True
    if "state" in options:
        inputs["initial_state"] = r.normal(2, H, P + ("mean" in options), N)
    return inputs, own


def gated_delta_scan_inputs(r, options, s):
    L, H, P, N = s.L, s.H, s.P, s.N

    def key():
        return torch.nn.functional.normalize(r.normal(2, L, 2, N), dim=-1)

    inputs = dict(
        q=r.normal(2, L, H, N), k=key(), v=r.normal(2, L, 2, P), g=-r.unit(2, L, H) * 0.3, beta=r.unit(2, L, H),
        use_qk_l2norm_in_kernel="norm" in options, chunk_size=s.chunk,
    )  # fmt: skip
    own = dict(q=r.normal(2, L, H, N), k=key(), g=-r.unit(2, L, H), beta=r.unit(2, L, H))
    if "state" in options:
        inputs["initial_state"] = r.normal(2, H, N, P)
    return inputs, own


def inputs_of(op, direction, options, shape=WHOLE):
    r, at = Draw("mean" in options), torch.arange(shape.L)
    inputs, own = globals()[f"{op}_inputs"](r, options, shape)
    segments = torch.bucketize(at, torch.tensor(shape.segments), right=True).int()
    inputs |= dict(direction=direction, seq_idx=segments.repeat(2, 1), return_final_state="state" in options)
    if direction != "forward":
        inputs["reverse_mask"] = (at % 5 != 0).repeat(2, 1)
    if "gate" in options:
        inputs["token_order"] = at.roll(shape.L // 3 + 2).int().repeat(2, 1)
    if "gate" in options and direction == "both":
        inputs["gate"] = r.unit(2, shape.L, shape.H)
    if "own" in options and direction != "forward":
        inputs |= {f"reverse_{name}": value for name, value in own.items()}
    return inputs


def typed(inputs, dtype):
    if dtype == torch.float64:
        return {k: to_double(v) for k, v in inputs.items()}
    return {k: v.to(dtype) if k.removeprefix("reverse_") in NARROW else v for k, v in inputs.items()}


def spoiled(values, value, shape, weight=False):
    """In one of two rows. weight: none is below 0."""
    values = values.clone()
    values[1, shape.middle] = abs(value) if weight else value
    return values


def results(op, inputs, wrt=(), value=None, shape=WHOLE, impl="cpu"):
    """Outputs, then gradients; with a value, that is the gradient of y in the middle."""

    def weigh(outputs):
        g = torch.Generator().manual_seed(5)
        weights = [torch.randn(o.shape, generator=g).to(o.dtype) for o in outputs]
        return weights if value is None else [spoiled(weights[0], value, shape), *weights[1:]]

    with linmu_ops.use_impl(f"{op}:{impl}"):
        return results_of(lambda **values: run_op(op, **values), inputs, wrt, weigh)


def assert_same_elsewhere(found, expected, shape, label, bound=0.0):
    """Bit by bit, or, with a bound, to so much of the largest value."""
    L = shape.L
    elsewhere = torch.ones(2, L, dtype=torch.bool)
    elsewhere[1, shape.middle] = False
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        if got.dim() > 1 and got.shape[1] == L:
            got, want = got[elsewhere], want[elsewhere]
        # States are of the first segment and of the last. What has no rows is a sum over all tokens.
        if got.dim() > 1:
            near = bound and bool(((got - want).abs() <= bound * want.abs().max()).all())
            assert near or torch.equal(got, want), (i, *label)


def changes(op, direction, options, inputs, values=VALUES, shape=WHOLE):
    for value, names in itertools.product(values, OPS[op][1]):
        names = names + [f"reverse_{n}" for n in names if f"reverse_{n}" in inputs]
        if direction == "reverse" and "own" in options and not any(n in "xv" or "reverse" in n for n in names):
            continue  # no one reads it
        weights = [n for n in names if n.endswith("dt") or "normalize" in inputs]
        yield value, names, inputs | {n: spoiled(inputs[n], value, shape, n in weights) for n in names}


def check(
    op, direction, options, dtype, *, gradients, values=VALUES, shape=WHOLE, impl="cpu", together=False, bound=0.0
):  # fmt: skip
    """Spoils one argument of the middle after another, then all, and with gradients that of y too.

    together: all at once alone. bound: of a difference that is none.
    """
    inputs = typed(inputs_of(op, direction, options, shape), dtype)
    floats = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    wrt = floats if gradients else ()
    expected = results(op, inputs, wrt, shape=shape, impl=impl)
    for value, names, changed in changes(op, direction, options, inputs, values, shape):
        if together and not set(OPS[op][1][-1]) <= set(names):
            continue
        found = results(op, changed, wrt, shape=shape, impl=impl)
        assert_same_elsewhere(found, expected, shape, (value, names), bound)
    for value in values if gradients else ():
        found = results(op, inputs, wrt, value, shape, impl)
        assert_same_elsewhere(found, expected, shape, (value, "gradient of y"), bound)
