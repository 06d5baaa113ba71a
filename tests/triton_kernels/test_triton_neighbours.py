"""What a sequence holds changes no bit of its neighbours in a row, in the Triton kernels too."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops import neighbours

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
OP = "ssd_scan"
SHAPE = neighbours.Shape(24, 2, 4, 4, (0, 5, 13, 15), chunk=16)  # small: a visit takes milliseconds
OPTIONS = neighbours.OPS[OP][0]
CASES = [("forward", OPTIONS[0], torch.float32), ("reverse", OPTIONS[1], torch.float16)]


@pytest.mark.parametrize("direction, options, dtype", CASES, ids=str)
def test_no_bit_of_another_segment_changes(direction, options, dtype):
    neighbours.check(
        OP, direction, options, dtype, gradients=True, values=(1e30, math.nan), shape=SHAPE, impl="triton",
        together=True,
    )  # fmt: skip
