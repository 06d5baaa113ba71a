"""What a result does not depend on may be anything: NaN, Inf and 1e30 there change no output and no gradient of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import run_op, small_inputs, to_double, written
from tests.ops.isolation import AT, CALLS, PAIRS, check, nothing_is_hidden, scan
from tests.ops.reruns import OLDER, rerun_with_isa

VALUES = [math.nan, math.inf, -math.inf, 1e30]
IMPLEMENTATIONS = ["reference", "cpu"]


def every_call():
    """Each argument spoiled in the kernels, by NaN and by 1e30; in the reference, plain PyTorch, by one of them."""
    for impl, (i, pair), (j, value) in itertools.product(
        IMPLEMENTATIONS, enumerate(PAIRS), enumerate((math.nan, 1e30))
    ):
        marks = pytest.mark.sweep if impl == "reference" and (i + j) % 2 else ()
        yield pytest.param(impl, *pair, value, marks=marks)


@pytest.mark.parametrize(("impl", "which", "name", "value"), list(every_call()), ids=str)
def test_nothing_else_changes(impl, which, name, value):
    check(which, name, value, impl)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize(("which", "name"), PAIRS, ids=str)
def test_nothing_else_changes_in_other_dtypes(which, name, value, dtype):
    if value == 1e30 and dtype == torch.float16:
        pytest.skip("float16 has no 1e30")
    check(which, name, value, "cpu", dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("isa", OLDER)
def test_older_processors(isa):
    rerun_with_isa(isa, __file__, "test_nothing_else_changes and cpu")


@pytest.mark.parametrize("name", ["q", "k", "v", "weights"])
@pytest.mark.parametrize("which", [c for c in CALLS if "causal" in c])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_hides_a_nan_from_the_queries_that_see_it(impl, which, name):
    nothing_is_hidden(which, name, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_a_long_step_is_forgotten_exactly(direction, impl):
    """A step of 1e30 leaves nothing of the state before it, and takes no precision from the steps after it."""
    inputs = {k: v for k, v in scan(direction).items() if k != "initial_state"}
    inputs["dt"][:, AT] = 1e30
    inputs["x"][:, AT] = 0
    inputs["return_final_state"] = False
    with linmu_ops.use_impl(f"ssd_scan:{impl}"):
        got = run_op("ssd_scan", **inputs)
    with linmu_ops.use_impl("ssd_scan:reference"):
        want = run_op("ssd_scan", **{k: to_double(v) for k, v in inputs.items()})
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("value", [0.0, -math.inf], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_decay_rates_at_their_limits(impl, value):
    inputs = scan("both") | dict(A=torch.full((4,), value))
    with linmu_ops.use_impl(f"ssd_scan:{impl}"):
        y, state = run_op("ssd_scan", **inputs)
    with linmu_ops.use_impl("ssd_scan:reference"):
        want, want_state = run_op("ssd_scan", **{k: to_double(v) for k, v in inputs.items()})
    assert y.isfinite().all()
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(state.double(), want_state, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("op", sorted(o for o in _registry.OPS if o.endswith("step")))
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_of_a_batch_does_not_see_another(op, impl):
    clean, dirty = small_inputs(op), small_inputs(op)
    for k, v in dirty.items():
        if torch.is_tensor(v) and v.is_floating_point() and v.shape[0] == 2 and k not in ("A", "D", "dt_bias"):
            v[1] = math.nan
    with linmu_ops.use_impl(f"{op}:{impl}"):
        a, b = run_op(op, **clean), run_op(op, **dirty)
    a, b = (out[0] if isinstance(out, tuple) else out for out in (a, b))
    assert torch.equal(a[0], b[0])
    assert all(torch.equal(clean[name][0], dirty[name][0]) for name in written(op))
