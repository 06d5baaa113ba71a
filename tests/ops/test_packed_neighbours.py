"""What a scan's segment may not see changes no bit of it: neither values that are large, nor those that are none."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import linmu_ops
from linmu_ops._testing import run_op, to_double

L, H, P, N = 70, 4, 20, 20  # chunks of 32; a segment spans two, another starts and ends within one
SEGMENTS = [0, 17, 40, 43]
VALUES = (0.3, 300.0, 1e8, 1e19, 1e30, -1e30, math.inf, -math.inf, math.nan)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = ((), ("state", "gate", "own"), ("mean", "state"))


def inputs_of(direction, options):
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        values = torch.randn(*shape, generator=g)
        return values.abs() if "mean" in options else values

    at = torch.arange(L)
    inputs = dict(
        x=torch.randn(1, L, 2, P, generator=g), dt=torch.rand(1, L, H, generator=g) * 0.3 + 0.01,
        A=-torch.rand(H, generator=g) - 0.1, B=normal(1, L, 1, N), C=normal(1, L, 2, N), D=normal(H),
        direction=direction, seq_idx=(torch.bucketize(at, torch.tensor(SEGMENTS), right=True)).int()[None],
        return_final_state="state" in options, chunk_size=32,
    )  # fmt: skip
    if direction != "forward":
        inputs["reverse_mask"] = (at % 5 != 0)[None]
    if "mean" in options:
        inputs["normalize"] = True
    if "gate" in options and direction == "both":
        inputs["gate"] = torch.rand(1, L, H, generator=g)
    if "own" in options and direction != "forward":
        inputs |= dict(reverse_dt=torch.rand(1, L, H, generator=g), reverse_B=normal(1, L, 1, N))
        inputs["reverse_C"] = normal(1, L, 2, N)
    return inputs


def typed(inputs, dtype):
    if dtype == torch.float64:
        return {k: to_double(v) for k, v in inputs.items()}
    narrow = ("x", "B", "C", "reverse_B", "reverse_C")
    return {k: v.to(dtype) if k in narrow else v for k, v in inputs.items()}


def results(inputs):
    with linmu_ops.use_impl("ssd_scan:cpu"):
        found = run_op("ssd_scan", **inputs)
    return found if isinstance(found, tuple) else (found,)


def spoiled(inputs, names, value):
    changed = dict(inputs)
    for name in names:
        values = inputs[name].clone()
        weight = name.endswith("dt") or "normalize" in inputs  # none is below 0
        values[:, SEGMENTS[1] : SEGMENTS[2]] = abs(value) if weight else value
        changed[name] = values
    return changed


def check(direction, options, dtype):
    inputs = typed(inputs_of(direction, options), dtype)
    elsewhere = torch.ones(L, dtype=torch.bool)
    elsewhere[SEGMENTS[1] : SEGMENTS[2]] = False
    want = results(inputs)
    for value, names in itertools.product(VALUES, (["x"], ["B"], ["C"], ["dt"], ["x", "B", "C", "dt"])):
        names = names + [f"reverse_{n}" for n in names if f"reverse_{n}" in inputs]
        if direction == "reverse" and "own" in options and not any(n in ("x",) or "reverse" in n for n in names):
            continue
        got = results(spoiled(inputs, names, value))
        assert torch.equal(got[0][:, elsewhere], want[0][:, elsewhere]), (value, names)
        # The state that is left is of the last segment, or of the first.
        assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True) if a.shape[1] != L), (value, names)


@pytest.mark.parametrize(
    "direction, options, dtype",
    [
        pytest.param(d, o, t, marks=() if DTYPES.index(t) == (i + j) % 4 else pytest.mark.sweep)
        for (i, d), (j, o), t in itertools.product(
            enumerate(("forward", "reverse", "both")), enumerate(OPTIONS), DTYPES
        )
    ],
    ids=str,
)
def test_no_bit_of_another_segment_changes(direction, options, dtype):
    check(direction, options, dtype)


@pytest.mark.parametrize("value", VALUES[-3:])
def test_what_precedes_a_token_does_not_see_it(value):
    """Nor what is masked from the reverse scan, where that alone would have it."""
    inputs = inputs_of("forward", ()) | dict(seq_idx=None)
    want = results(inputs)[0]
    for name in ("x", "B", "C", "dt"):
        values = inputs[name].clone()
        values[:, 37] = value
        assert torch.equal(results(inputs | {name: values})[0][:, :37], want[:, :37])
    inputs = inputs_of("reverse", ())
    inputs["x"][:, 35] = value  # one of every five is masked
    want = results(inputs_of("reverse", ()))[0]
    kept = torch.arange(L) != 35
    assert torch.equal(results(inputs)[0][:, kept], want[:, kept])
