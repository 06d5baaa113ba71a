"""What a result does not depend on may be anything, in the CUDA kernels, run by the emulator, as in the others."""

from __future__ import annotations

import math

import pytest
import torch

from tests.covering import covering
from tests.ops import isolation

pytestmark = pytest.mark.usefixtures("by_emulator")
PAIRS = [(c, n) for c, n in isolation.PAIRS if "causal" in c or c.startswith("conv")]
KINDS = [("80", torch.float32), ("90", torch.bfloat16)]


@pytest.fixture(autouse=True)
def results_of_their_own(monkeypatch):
    """What is kept for "cpu" is not of these kernels."""
    monkeypatch.setattr(isolation, "clean_results", isolation.clean_results.__wrapped__)


@covering("pair, value, kind", PAIRS, [math.nan, 1e30], KINDS)
def test_nothing_else_changes(pair, value, kind, monkeypatch):
    (which, name), (arch, dtype) = pair, kind
    monkeypatch.setenv("LINMU_CUDA_ARCH", arch)
    isolation.check(which, name, value, "cpu", dtype)


@pytest.mark.parametrize("arch, dtype", KINDS)
@pytest.mark.parametrize(("which", "name"), [(c, n) for c, n in PAIRS if "causal" in c], ids=str)
def test_nothing_hides_a_nan_from_the_queries_that_see_it(which, name, arch, dtype, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", arch)
    isolation.nothing_is_hidden(which, name, "cpu", dtype)
