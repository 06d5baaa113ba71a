"""What a scan's segment may not see changes no bit of it: neither values that are large, nor those that are none."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.ops import neighbours
from tests.ops.neighbours import DIRECTIONS, OPS, VALUES, WHOLE, inputs_of, results
from tests.ops.reruns import OLDER, rerun_with_isa

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cases():
    for op in OPS:
        every = itertools.product(enumerate(DIRECTIONS), enumerate(OPS[op][0]), DTYPES)
        for (i, direction), (j, options), dtype in every:
            marks = () if DTYPES.index(dtype) == (i + j) % 4 else pytest.mark.sweep
            yield pytest.param(op, direction, options, dtype, marks=marks)


CASES = list(cases())


@pytest.mark.parametrize("op, direction, options, dtype", CASES, ids=str)
def test_no_bit_of_another_segment_changes(op, direction, options, dtype):
    neighbours.check(op, direction, options, dtype, gradients=False)


@pytest.mark.parametrize("op, direction, options, dtype", CASES, ids=str)
def test_no_bit_of_another_segments_gradients_changes(op, direction, options, dtype):
    neighbours.check(op, direction, options, dtype, gradients=True)


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
    sees = slice(WHOLE.segments[-1], WHOLE.L) if direction == "reverse" else slice(WHOLE.segments[0], WHOLE.segments[1])
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        if got.shape[1] == WHOLE.L:
            kept = torch.ones(2, WHOLE.L, dtype=torch.bool)
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
    kept = torch.arange(WHOLE.L) != 35
    assert torch.equal(results(op, inputs)[0][:, kept], want[:, kept])


@pytest.mark.sweep
@pytest.mark.parametrize("isa", OLDER)
def test_older_processors(isa):
    rerun_with_isa(isa, __file__, "test_no_bit")
