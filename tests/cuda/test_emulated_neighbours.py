"""What a sequence holds changes nothing of its neighbours in a row, in the CUDA kernels too, run by the emulator."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.ops import neighbours

pytestmark = pytest.mark.usefixtures("by_emulator")
OP = "ssd_scan"
SHAPE = neighbours.Shape(40, 2, 8, 8, (0, 9, 20, 23))
KINDS = [("90", torch.bfloat16), ("80", torch.float32), ("90", torch.float16), ("80", torch.float16)]


def cases():
    for (i, direction), (j, options) in itertools.product(
        enumerate(neighbours.DIRECTIONS), enumerate(neighbours.OPS[OP][0])
    ):
        yield pytest.param(direction, options, *KINDS[(i + 2 * j) % len(KINDS)])


@pytest.mark.parametrize("direction, options, arch, dtype", list(cases()), ids=str)
def test_another_segment_keeps_its_values(direction, options, arch, dtype, monkeypatch):
    """A chunk with a value that is not finite is computed again, in an order of its own."""
    monkeypatch.setenv("LINMU_CUDA_ARCH", arch)
    neighbours.check(
        OP, direction, options, dtype, gradients=True, values=(1e30, math.nan), shape=SHAPE, together=True,
        bound=4 * torch.finfo(dtype).eps,
    )  # fmt: skip
