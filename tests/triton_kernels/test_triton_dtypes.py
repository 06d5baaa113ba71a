"""Arguments of another float dtype than the rows, in the Triton kernels: forward, gradients and steps."""

from __future__ import annotations

import pytest
import torch

from linmu_ops import _registry
from tests.ops.dtypes import ANY_DTYPE, DTYPES, assert_casts

pytest.importorskip("triton")
# Interpreted, there is no bfloat16 of rows, and a scan takes seconds.
ROWS = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
QUICK = (torch.float32, torch.bfloat16)
SIZES = {"gated_delta_scan": dict(L=3, K=4, V=4), "ssd_scan": dict(L=5)}


def mixes():
    for op in (op for op in ANY_DTYPE if ANY_DTYPE[op] and _registry._triton_why_not(op) is None):
        for dtype in ROWS:
            for other in DTYPES:
                marks = () if (dtype, other) == QUICK else pytest.mark.sweep
                yield pytest.param(op, dtype, other, marks=marks)


@pytest.mark.parametrize(("op", "dtype", "other"), list(mixes()), ids=str)
def test_each_mix_of_dtypes(op, dtype, other):
    assert_casts(op, "triton", dtype, other, **SIZES.get(op, {}))
