"""What a result does not depend on may be anything, in the Triton kernels as in the others."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops import isolation

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
PAIRS = [(c, n) for c, n in isolation.PAIRS if "causal" in c or c.startswith("conv")]


@pytest.mark.parametrize("value", [math.nan, 1e30], ids=str)
@pytest.mark.parametrize(("which", "name"), PAIRS, ids=str)
def test_nothing_else_changes(which, name, value):
    isolation.check(which, name, value, "triton")


@pytest.mark.parametrize(("which", "name"), [(c, n) for c, n in PAIRS if "causal" in c], ids=str)
def test_nothing_hides_a_nan_from_the_queries_that_see_it(which, name):
    isolation.nothing_is_hidden(which, name, "triton")
