"""`gated_delta_step` against its reference."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference
from tests.ops.cases.gated_delta_step import CASES, DTYPES, by_reference, make_inputs, stepped
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa


@pytest.mark.parametrize("options", [{}, dict(use_qk_l2norm_in_kernel=True, scale=0.7)], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype, options):
    check_against_reference(stepped, by_reference, make_inputs(case, dtype, **options))


def test_opcheck():
    i = make_inputs(CASES[1], torch.float32)
    args = (i["state"], i["q"], i["k"], i["v"], i["g"], i["beta"], 0.5, True)
    torch.library.opcheck(torch.ops.linmu.gated_delta_step, args)


def test_compile():
    f = torch.compile(linmu_ops.gated_delta_step, fullgraph=True, dynamic=True)
    for case in CASES[1:3]:
        i = make_inputs(case, torch.float32)
        want, after = by_reference(**{**i, "state": i["state"].clone()})
        torch.testing.assert_close(f(**i), want)
        torch.testing.assert_close(i["state"], after)


def test_strided():
    i = make_inputs((2, 4, 2, 4, 2, 6, 10), torch.float32)
    i |= dict(v=torch.randn(2, 10, 2).transpose(1, 2), g=-torch.rand(4, 2).t(), q=torch.randn(2, 2, 12)[..., ::2])
    check_against_reference(stepped, by_reference, i)


def test_same_bits_for_any_number_of_threads():
    i = make_inputs((4, 28, 4, 4, 28, 64, 64), torch.float32)
    assert_same_bits(lambda: stepped(**{**i, "state": i["state"].clone()}), threads=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OLDER)
def test_isa(isa):
    rerun_with_isa(isa, __file__, "test_forward")


def test_errors():
    i = make_inputs(CASES[1], torch.float32)
    with pytest.raises(ValueError, match=r"gated_delta_step: g must be \(B, H\) with B=2, got shape \(1, 4\)"):
        linmu_ops.gated_delta_step(**{**i, "g": i["g"][:1]})
    with pytest.raises(TypeError, match="gated_delta_step: k must be float32, got float64"):
        linmu_ops.gated_delta_step(**{**i, "k": i["k"].double()})
    with pytest.raises(ValueError, match="gated_delta_step: state must be contiguous"):
        linmu_ops.gated_delta_step(**{**i, "state": i["state"].transpose(0, 1).contiguous().transpose(0, 1)})
    with pytest.raises(RuntimeError, match="gated_delta_step: has no gradient"):
        linmu_ops.gated_delta_step(**{**i, "q": i["q"].requires_grad_()})
