"""NaN, Inf and 1e30 through the Triton kernels of `ssd_scan`: as far as the reference lets them, and no further."""

from __future__ import annotations

import pytest
import torch

from linmu_ops._testing import check_implementation
from tests.ops import not_finite

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")


@pytest.mark.parametrize(("name", "value", "direction", "options"), not_finite.CASES, ids=str)
def test_reaches_what_the_reference_lets_it_reach(name, value, direction, options):
    not_finite.check(name, value, direction, options, "triton")


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "value", "direction", "options"), not_finite.SWEEP, ids=str)
def test_every_way_of_spoiling(name, value, direction, options):
    not_finite.check(name, value, direction, options, "triton")


def test_a_state_may_be_larger_than_a_half():
    inputs, wrt = not_finite.large_state(torch.float16)
    check_implementation("ssd_scan", "triton", inputs, wrt)
