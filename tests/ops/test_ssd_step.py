"""`ssd_step` against its reference, and against the scan."""

from __future__ import annotations

import math

import pytest
import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import check_against_reference
from tests.ops.cases.ssd_step import CASES, DTYPES, by_reference, make_inputs, stepped
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa


@pytest.mark.parametrize("mean", [False, True], ids=["", "mean"])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype, softplus, mean):
    check_against_reference(stepped, by_reference, make_inputs(case, dtype, softplus, skip=softplus, mean=mean))


def test_opcheck():
    i = make_inputs(CASES[1], torch.float32, True, True)
    args = (i["state"], i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["dt_bias"], True)
    torch.library.opcheck(torch.ops.linmu.ssd_step, (*args, False))
    wide = torch.cat((i["state"], torch.rand_like(i["state"][:, :, :1])), 2)
    torch.library.opcheck(torch.ops.linmu.ssd_step, (wide, *args[1:], True))


def test_compile():
    f = torch.compile(linmu_ops.ssd_step, fullgraph=True, dynamic=True)
    for case in ((2, 4, 4, 1, 1, 16, 24), (3, 6, 2, 2, 6, 5, 37)):
        i = make_inputs(case, torch.float32, True, True)
        want, after = by_reference(**{**i, "state": i["state"].clone()})
        torch.testing.assert_close(f(**i), want)
        torch.testing.assert_close(i["state"], after)


def test_strided():
    i = make_inputs((2, 4, 2, 1, 4, 6, 10), torch.float32, True, True)
    i |= dict(x=torch.randn(2, 6, 2).transpose(1, 2), dt=torch.randn(4, 2).t(), C=torch.randn(2, 4, 20)[..., ::2])
    check_against_reference(stepped, by_reference, i)


def test_same_bits_for_any_number_of_threads():
    i = make_inputs((4, 28, 4, 4, 28, 64, 64), torch.float32, True, True)
    assert_same_bits(lambda: stepped(**{**i, "state": i["state"].clone()}), threads=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OLDER)
def test_isa(isa):
    rerun_with_isa(isa, __file__, "test_forward")


def test_a_step_without_mass_is_zero():
    """And around kernels that do not normalize, as on CUDA."""
    i = make_inputs((2, 4, 2, 2, 4, 8, 12), torch.float32, True, mean=True)
    i |= dict(state=torch.zeros_like(i["state"]), dt=i["dt"].index_fill(0, torch.tensor([1]), -1e4))
    y, log_mass, state = stepped(**{**i, "state": i["state"].clone()})
    assert not y[1].any() and (log_mass[1] == -math.inf).all() and not state[1].any()
    torch.testing.assert_close(y[0], i["x"][0].repeat_interleave(2, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registry, "serves", lambda op, x: "cuda")
        for got, want in zip(stepped(**i), (y, log_mass, state), strict=True):
            torch.testing.assert_close(got, want)


def test_steps_are_the_scan():
    B, H, P, N, L = 2, 4, 8, 12, 9
    x, dt = torch.randn(B, L, 2, P), torch.rand(B, L, H)
    A, Bm, C = -torch.rand(H), torch.randn(B, L, 2, N), torch.randn(B, L, H, N)
    with linmu_ops.use_impl("ssd_scan:reference"):
        y, final = linmu_ops.ssd_scan(x, dt, A, Bm, C, return_final_state=True)
    state = torch.zeros(B, H, P, N)
    steps = [linmu_ops.ssd_step(state, x[:, t], dt[:, t], A, Bm[:, t], C[:, t]) for t in range(L)]
    torch.testing.assert_close(torch.stack(steps, 1), y)
    torch.testing.assert_close(state, final)
    Bm, C, state = Bm.abs(), C.abs(), torch.zeros(B, H, P + 1, N)
    with linmu_ops.use_impl("ssd_scan:reference"):
        y, log_mass, final = linmu_ops.ssd_scan(x, dt, A, Bm, C, normalize=True, return_final_state=True)
    steps = [linmu_ops.ssd_step(state, x[:, t], dt[:, t], A, Bm[:, t], C[:, t], normalize=True) for t in range(L)]
    torch.testing.assert_close(torch.stack([s[0] for s in steps], 1), y)
    torch.testing.assert_close(torch.stack([s[1] for s in steps], 1), log_mass)
    torch.testing.assert_close(state, final)


def test_errors():
    i = make_inputs(CASES[1], torch.float32)
    with pytest.raises(ValueError, match=r"ssd_step: dt must be \(B, H\) with B=2, got shape \(1, 4\)"):
        linmu_ops.ssd_step(**{**i, "dt": i["dt"][:1]})
    with pytest.raises(TypeError, match="ssd_step: B must be float32, got float64"):
        linmu_ops.ssd_step(**{**i, "B": i["B"].double()})
    with pytest.raises(ValueError, match="ssd_step: state must be contiguous"):
        linmu_ops.ssd_step(**{**i, "state": i["state"].transpose(0, 1).contiguous().transpose(0, 1)})
    with pytest.raises(RuntimeError, match="ssd_step: has no gradient"):
        linmu_ops.ssd_step(**{**i, "x": i["x"].requires_grad_()})
