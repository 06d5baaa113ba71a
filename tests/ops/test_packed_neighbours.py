"""What a scan's segment may not see changes no bit of it: neither values that are large, nor those that are none."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import linmu_ops
from linmu_ops._testing import results_of, run_op, to_double
from tests.ops.reruns import rerun_with_isa

L, H, P, N = 70, 4, 20, 20  # chunks of 32; a segment spans two, another starts and ends within one
SEGMENTS = [0, 17, 40, 43]
MIDDLE = slice(SEGMENTS[1], SEGMENTS[2])
VALUES = (0.3, 300.0, 1e8, 1e19, 1e30, -1e30, math.inf, -math.inf, math.nan)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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


def ssd_scan_inputs(r, options):
    inputs = dict(
        x=torch.randn(2, L, 2, P, generator=r.generator), dt=r.unit(2, L, H) * 0.3 + 0.01, A=-r.unit(H) - 0.1,
        B=r.normal(2, L, 1, N), C=r.normal(2, L, 2, N), D=r.normal(H), chunk_size=32,
    )  # fmt: skip
    own = dict(dt=r.unit(2, L, H), B=r.normal(2, L, 1, N), C=r.normal(2, L, 2, N))
    if "mean" in options:
        inputs["normalize"] = True
    if "state" in options:
        inputs["initial_state"] = r.normal(2, H, P + ("mean" in options), N)
    return inputs, own


def gated_delta_scan_inputs(r, options):
    def key():
        return torch.nn.functional.normalize(r.normal(2, L, 2, N), dim=-1)

    inputs = dict(
        q=r.normal(2, L, 4, N), k=key(), v=r.normal(2, L, 2, P), g=-r.unit(2, L, H) * 0.3, beta=r.unit(2, L, H),
        use_qk_l2norm_in_kernel="norm" in options, chunk_size=32,
    )  # fmt: skip
    own = dict(q=r.normal(2, L, 4, N), k=key(), g=-r.unit(2, L, H), beta=r.unit(2, L, H))
    if "state" in options:
        inputs["initial_state"] = r.normal(2, H, N, P)
    return inputs, own


def inputs_of(op, direction, options):
    r, at = Draw("mean" in options), torch.arange(L)
    inputs, own = globals()[f"{op}_inputs"](r, options)
    segments = torch.bucketize(at, torch.tensor(SEGMENTS), right=True).int()
    inputs |= dict(direction=direction, seq_idx=segments.repeat(2, 1), return_final_state="state" in options)
    if direction != "forward":
        inputs["reverse_mask"] = (at % 5 != 0).repeat(2, 1)
    if "gate" in options:
        inputs["token_order"] = at.roll(25).int().repeat(2, 1)
    if "gate" in options and direction == "both":
        inputs["gate"] = r.unit(2, L, H)
    if "own" in options and direction != "forward":
        inputs |= {f"reverse_{name}": value for name, value in own.items()}
    return inputs


def typed(inputs, dtype):
    if dtype == torch.float64:
        return {k: to_double(v) for k, v in inputs.items()}
    return {k: v.to(dtype) if k.removeprefix("reverse_") in NARROW else v for k, v in inputs.items()}


def spoiled(values, value, weight=False):
    """In one of two rows. weight: none is below 0."""
    values = values.clone()
    values[1, MIDDLE] = abs(value) if weight else value
    return values


def results(op, inputs, wrt=(), value=None):
    """Outputs, then gradients; with a value, that is the gradient of y in the middle."""

    def weigh(outputs):
        g = torch.Generator().manual_seed(5)
        weights = [torch.randn(o.shape, generator=g).to(o.dtype) for o in outputs]
        return weights if value is None else [spoiled(weights[0], value), *weights[1:]]

    with linmu_ops.use_impl(f"{op}:cpu"):
        return results_of(lambda **values: run_op(op, **values), inputs, wrt, weigh)


def assert_same_elsewhere(found, expected, label):
    elsewhere = torch.ones(2, L, dtype=torch.bool)
    elsewhere[1, MIDDLE] = False
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        if got.dim() > 1 and got.shape[1] == L:
            got, want = got[elsewhere], want[elsewhere]
        # States are of the first segment and of the last. What has no rows is a sum over all tokens.
        if got.dim() > 1:
            assert torch.equal(got, want), (i, *label)


def changes(op, direction, options, inputs):
    for value, names in itertools.product(VALUES, OPS[op][1]):
        names = names + [f"reverse_{n}" for n in names if f"reverse_{n}" in inputs]
        if direction == "reverse" and "own" in options and not any(n in "xv" or "reverse" in n for n in names):
            continue  # no one reads it
        weights = [n for n in names if n.endswith("dt") or "normalize" in inputs]
        yield value, names, inputs | {n: spoiled(inputs[n], value, n in weights) for n in names}


def cases():
    for op in OPS:
        every = itertools.product(enumerate(DIRECTIONS), enumerate(OPS[op][0]), DTYPES)
        for (i, direction), (j, options), dtype in every:
            marks = () if DTYPES.index(dtype) == (i + j) % 4 else pytest.mark.sweep
            yield pytest.param(op, direction, options, dtype, marks=marks)


CASES = list(cases())


@pytest.mark.parametrize("op, direction, options, dtype", CASES, ids=str)
def test_no_bit_of_another_segment_changes(op, direction, options, dtype):
    inputs = typed(inputs_of(op, direction, options), dtype)
    expected = results(op, inputs)
    for value, names, changed in changes(op, direction, options, inputs):
        assert_same_elsewhere(results(op, changed), expected, (value, names))


@pytest.mark.parametrize("op, direction, options, dtype", CASES, ids=str)
def test_no_bit_of_another_segments_gradients_changes(op, direction, options, dtype):
    inputs = typed(inputs_of(op, direction, options), dtype)
    wrt = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    expected = results(op, inputs, wrt)
    for value, names, changed in changes(op, direction, options, inputs):
        assert_same_elsewhere(results(op, changed, wrt), expected, (value, names))
    for value in VALUES:
        assert_same_elsewhere(results(op, inputs, wrt, value), expected, (value, "gradient of y"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_bit_changes_beyond_a_state_that_is_none(op, direction):
    """The first segment of the state's direction alone sees it."""
    inputs = inputs_of(op, direction, ("state",))
    wrt = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 1]
    expected = results(op, inputs, wrt)
    state = inputs["initial_state"].clone()
    state[1, 2, 3, 4] = math.nan
    found = results(op, inputs | dict(initial_state=state), wrt)
    sees = slice(SEGMENTS[-1], L) if direction == "reverse" else slice(SEGMENTS[0], SEGMENTS[1])
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        if got.shape[1] == L:
            kept = torch.ones(2, L, dtype=torch.bool)
            kept[1, sees] = False
            assert torch.equal(got[kept], want[kept]), i


@pytest.mark.parametrize("value", VALUES[-3:])
@pytest.mark.parametrize("op", OPS)
def test_what_precedes_a_token_does_not_see_it(op, value):
    """Nor what is masked from the reverse scan, where that alone would have it."""
    inputs = inputs_of(op, "forward", ()) | dict(seq_idx=None)
    want = results(op, inputs)[0]
    for name in itertools.chain.from_iterable(OPS[op][1][:-1]):
        values = inputs[name].clone()
        values[:, 37] = value
        assert torch.equal(results(op, inputs | {name: values})[0][:, :37], want[:, :37]), name
    inputs = inputs_of(op, "reverse", ())
    want = results(op, inputs)[0]
    values = inputs["x" if op == "ssd_scan" else "v"]
    values[:, 35] = value  # one of every five is masked
    kept = torch.arange(L) != 35
    assert torch.equal(results(op, inputs)[0][:, kept], want[:, kept])


@pytest.mark.sweep
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_older_processors(isa):
    rerun_with_isa(isa, __file__, "test_no_bit")
