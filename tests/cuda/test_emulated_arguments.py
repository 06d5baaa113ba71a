"""However an argument lies in memory, and wherever: the CUDA kernels read its values, or refuse it."""

from __future__ import annotations

import pytest
import torch

from tests.ops import layouts

pytestmark = pytest.mark.usefixtures("by_emulator")
EVERY_OP = pytest.mark.parametrize("op", layouts.WITH_CUDA)


@EVERY_OP
def test_a_layout_changes_no_value(op):
    layouts.assert_same(op, "cpu", layouts.LAYOUTS, lambda t: t, bits=False)


@EVERY_OP
def test_one_row_stands_for_all(op):
    layouts.assert_same(op, "cpu", [layouts.expanded], layouts.packed_row)


@EVERY_OP
def test_a_tensor_elsewhere_is_refused_by_the_kernel_itself(op):
    """A host pointer among a GPU's, or, as here, no pointer at all: the library looks, whoever calls it."""
    kernel, args = getattr(torch.ops.linmu_emulated, op).default, layouts.dispatched(op)
    for _, moved in layouts.elsewhere(args):
        with pytest.raises(ValueError, match=rf"{op}: [\w.]+ must be on (cpu|meta), got (cpu|meta)"):
            kernel.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *moved)
