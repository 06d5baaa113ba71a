"""However an argument lies in memory, and wherever: the Triton kernels read its values, or refuse it."""

from __future__ import annotations

import pytest
import torch

from linmu_ops import _registry
from linmu_ops._testing import CASES, small_inputs
from tests.ops import layouts

pytest.importorskip("triton")
EVERY_OP = pytest.mark.parametrize("op", sorted(CASES))
EVERY_KERNEL = pytest.mark.parametrize("op", sorted(op for op in CASES if _registry._triton_why_not(op) is None))


@EVERY_KERNEL
def test_a_layout_changes_no_bit(op):
    layouts.assert_same(op, "triton", layouts.LAYOUTS, lambda t: t)


@EVERY_KERNEL
def test_one_row_stands_for_all(op):
    layouts.assert_same(op, "triton", [layouts.expanded], layouts.packed_row)


@pytest.mark.parametrize("op", sorted(op for op in CASES if "state" in small_inputs(op)))
def test_a_scattered_state_is_refused_past_python_too(op):
    args = layouts.dispatched(op)
    args[0] = layouts.every_other(args[0])
    with pytest.raises((ValueError, RuntimeError), match=f"{op}: state must be contiguous"):
        getattr(torch.ops.linmu_triton, op).default(*args)


@pytest.mark.parametrize("namespace", ["linmu", "linmu_reference", "linmu_triton"])
@EVERY_OP
def test_a_tensor_elsewhere_is_refused_past_python_too(op, namespace):
    kernel, args = getattr(getattr(torch.ops, namespace), op).default, layouts.dispatched(op)
    names = [a.name for a in kernel._schema.arguments]
    for i, moved in layouts.elsewhere(args):
        with pytest.raises((ValueError, RuntimeError), match=f"{op}: {names[i]} must be on {layouts.DEVICE}.*, got"):
            kernel(*moved)
