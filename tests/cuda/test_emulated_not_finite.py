"""What the CUDA kernels, run by the emulator, do with values that are not finite, and with states beyond 65504."""

from __future__ import annotations

import pytest
import torch

from linmu_ops._testing import check_implementation
from tests.ops import not_finite

pytestmark = pytest.mark.usefixtures("by_emulator")
KINDS = [("80", torch.float32), ("90", torch.bfloat16)]


@pytest.mark.parametrize("arch, dtype", KINDS)
@pytest.mark.parametrize(("name", "value", "direction", "options"), not_finite.CASES, ids=str)
def test_reaches_what_the_reference_lets_it_reach(name, value, direction, options, arch, dtype, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", arch)
    not_finite.check(name, value, direction, options, "cpu", dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("arch, dtype", KINDS)
@pytest.mark.parametrize(("name", "value", "direction", "options"), not_finite.SWEEP, ids=str)
def test_every_way_of_spoiling(name, value, direction, options, arch, dtype, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", arch)
    not_finite.check(name, value, direction, options, "cpu", dtype)


@pytest.mark.parametrize("arch", ["80", "90"])
def test_a_state_may_be_larger_than_a_half(arch, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", arch)
    inputs, wrt = not_finite.large_state(torch.float16)
    check_implementation("ssd_scan", "cpu", inputs, wrt)
