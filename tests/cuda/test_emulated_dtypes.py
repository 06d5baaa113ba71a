"""Arguments of another float dtype than the rows, in the CUDA kernels: forward, gradients and steps."""

from __future__ import annotations

import pytest
import torch

from tests.ops.dtypes import ANY_DTYPE, DTYPES, assert_casts
from tests.ops.layouts import WITH_CUDA

pytestmark = pytest.mark.usefixtures("by_emulator")
QUICK = {
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float64),
}


def mixes():
    for op in (op for op in WITH_CUDA if ANY_DTYPE[op]):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for other in DTYPES:
                marks = () if (dtype, other) in QUICK else pytest.mark.sweep
                yield pytest.param(op, dtype, other, marks=marks)


@pytest.mark.parametrize(("op", "dtype", "other"), list(mixes()), ids=str)
def test_each_mix_of_dtypes(op, dtype, other):
    assert_casts(op, "cpu", dtype, other)
