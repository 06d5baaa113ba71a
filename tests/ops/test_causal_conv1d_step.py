"""`causal_conv1d_step` against its reference, against the convolution, and against transformers."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference
from tests.ops.cases.causal_conv1d_step import CASES, DTYPES, by_reference, make_inputs, stepped
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype, full):
    check_against_reference(stepped, by_reference, make_inputs(case, dtype, full, "silu" if full else None))


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "channels"])
@pytest.mark.parametrize("older", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_of_more_inputs_and_with_channels_first(dtype, older, turned):
    for case in CASES:
        inputs = make_inputs(case, dtype, True, "silu")
        state = torch.randn(case[0], case[2] - 1 + older, case[1]).to(dtype)
        inputs["state"] = state.mT.contiguous().mT if turned else state
        check_against_reference(stepped, by_reference, inputs)
        want = torch.cat([state, inputs["x"][:, None]], 1)[:, 1:]
        assert torch.equal(stepped(**inputs)[1], want)


def test_opcheck():
    i = make_inputs(CASES[1], torch.float32, bias=True)
    args = (i["state"], i["x"], i["weight"], i["bias"], True)
    torch.library.opcheck(torch.ops.linmu.causal_conv1d_step, args)


def test_compile():
    f = torch.compile(linmu_ops.causal_conv1d_step, fullgraph=True, dynamic=True)
    for D in (9, 12):
        i = make_inputs((2, D, 4), torch.float32, bias=True)
        want, after = by_reference(**{**i, "state": i["state"].clone()})
        torch.testing.assert_close(f(i["state"], i["x"], i["weight"], i["bias"]), want)
        assert torch.equal(i["state"], after)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_steps_are_the_convolution(K):
    x, w, b = torch.randn(2, 9, 6), torch.randn(6, K), torch.randn(6)
    y, final = linmu_ops.causal_conv1d(x, w, b, activation="silu", return_final_state=True)
    state = torch.zeros(2, K - 1, 6)
    steps = [linmu_ops.causal_conv1d_step(state, x[:, t], w, b, activation="silu") for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, 1), y)
    assert torch.equal(state, final)


def test_strided():
    i = make_inputs((2, 12, 4), torch.float32, bias=True)
    i |= dict(x=torch.randn(2, 24)[:, ::2], weight=torch.randn(4, 12).t())
    check_against_reference(stepped, by_reference, i)


def test_as_transformers():
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    state, x, w, b = torch.randn(2, 3, 12), torch.randn(2, 12), torch.randn(12, 4), torch.randn(12)
    their_state = state.transpose(1, 2).contiguous()
    theirs = mamba2.causal_conv1d_update(x[:, :, None], their_state, w, b, "silu")[:, :, 0]
    torch.testing.assert_close(linmu_ops.causal_conv1d_step(state, x, w, b, activation="silu"), theirs)
    assert torch.equal(state, their_state.transpose(1, 2))


def test_same_bits_for_any_number_of_threads():
    i = make_inputs((8, 3000, 4), torch.float32, bias=True, activation="silu")
    assert_same_bits(lambda: stepped(**{**i, "state": i["state"].clone()}), threads=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OLDER)
def test_isa(isa):
    rerun_with_isa(isa, __file__, "test_forward")


def test_errors():
    i = make_inputs(CASES[1], torch.float32)
    op = linmu_ops.causal_conv1d_step
    with pytest.raises(ValueError, match=r"causal_conv1d_step: state must be \(B, n, D\) with B=2, D=5, got"):
        op(**{**i, "state": torch.zeros(2, 4, 6)})
    with pytest.raises(ValueError, match="causal_conv1d_step: state must hold n >= 3 inputs, got 2"):
        op(**{**i, "state": torch.zeros(2, 2, 5)})
    with pytest.raises(TypeError, match="causal_conv1d_step: state must be float32, got float64"):
        op(**{**i, "state": i["state"].double()})
    with pytest.raises(ValueError, match="causal_conv1d_step: state must be contiguous, or the transpose of what is"):
        op(**{**i, "state": torch.zeros(2, 3, 10)[..., ::2]})
    with pytest.raises(ValueError, match="causal_conv1d_step: weight must have 1 <= K <= 8, got K=9"):
        op(torch.zeros(2, 8, 5), i["x"], torch.randn(5, 9))
    with pytest.raises(ValueError, match="causal_conv1d_step: activation must be None or 'silu', got 'relu'"):
        op(**{**i, "activation": "relu"})
    with pytest.raises(RuntimeError, match="causal_conv1d_step: has no gradient"):
        op(**{**i, "weight": i["weight"].requires_grad_()})
