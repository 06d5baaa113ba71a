"""`causal_conv1d` against its reference, against a convolution carried in pieces, and against transformers."""

from __future__ import annotations

import functools

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference
from tests.covering import covering
from tests.ops.cases.causal_conv1d import CASES, DTYPES, EMPTY, by_reference, make_inputs, wrt
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa


@covering("case, dtype, activation, full", CASES, DTYPES, [None, "silu"], [False, True])
def test_forward_and_backward(case, dtype, activation, full):
    inputs = make_inputs(case, dtype, full, activation)
    check_against_reference(linmu_ops.causal_conv1d, by_reference, inputs, wrt(inputs))


@pytest.mark.parametrize("given", ["bias", "token_order", "seq_idx", "initial_state", "return_final_state"])
def test_each_option_alone(given):
    everything = make_inputs((2, 37, 20, 4), torch.float32, full=True, activation="silu")
    inputs = {k: everything[k] for k in ("x", "weight", given)}
    check_against_reference(linmu_ops.causal_conv1d, by_reference, inputs, wrt(inputs))


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_gradcheck(full):
    inputs = make_inputs((2, 5, 3, 3), torch.float64, full, "silu")
    leaves = {k: inputs.pop(k).double().requires_grad_() for k in wrt(inputs)}
    torch.autograd.gradcheck(
        lambda *values: linmu_ops.causal_conv1d(**dict(zip(leaves, values, strict=True)), **inputs),
        tuple(leaves.values()),
    )


def test_gradient_of_the_state_alone():
    inputs = make_inputs((1, 2, 4, 4), torch.float32, full=True)
    check_against_reference(
        lambda **i: linmu_ops.causal_conv1d(**i)[1], lambda **i: by_reference(**i)[1], inputs, ["x", "initial_state"]
    )


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_opcheck(full):
    i = make_inputs((2, 6, 5, 4), torch.float32, full, "silu")
    tensors = {k: i[k].requires_grad_() for k in wrt(i)}
    args = [tensors["x"], tensors["weight"], tensors.get("bias"), True]
    args += [i.get("seq_idx"), i.get("token_order"), tensors.get("initial_state"), full]
    torch.library.opcheck(torch.ops.linmu.causal_conv1d, args)


def test_compile():
    f = torch.compile(functools.partial(linmu_ops.causal_conv1d, activation="silu"), fullgraph=True, dynamic=True)
    for L in (9, 17):
        i = make_inputs((2, L, 6, 4), torch.float32)
        x, w = i["x"].requires_grad_(), i["weight"].requires_grad_()
        got = torch.autograd.grad(f(x, w).square().sum(), (x, w))
        want = torch.autograd.grad(by_reference(x=x, weight=w, activation="silu").square().sum(), (x, w))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_empty(case, full):
    inputs = make_inputs(case, torch.float32, full, "silu")
    check_against_reference(linmu_ops.causal_conv1d, by_reference, inputs, wrt(inputs))


def test_state_passes_through_an_empty_call():
    state = torch.randn(2, 3, 5)
    _, final = linmu_ops.causal_conv1d(
        torch.empty(2, 0, 5), torch.randn(5, 4), initial_state=state, return_final_state=True
    )
    assert torch.equal(final, state)


def test_strided():
    inputs = make_inputs((2, 21, 12, 4), torch.float32, full=True)
    inputs["x"] = torch.randn(2, 12, 43).transpose(1, 2)[:, 1::2]
    inputs["initial_state"] = torch.randn(2, 12, 3).transpose(1, 2)
    inputs["weight"] = torch.randn(4, 12).t()
    check_against_reference(linmu_ops.causal_conv1d, by_reference, inputs, wrt(inputs))


def test_pieces_are_the_whole():
    i = make_inputs((2, 23, 6, 4), torch.float32)
    x, w = i["x"], i["weight"]
    whole, last = linmu_ops.causal_conv1d(x, w, return_final_state=True)
    ys, state = [], torch.zeros(2, 3, 6)
    for piece in x.split([1, 2, 13, 7], dim=1):
        y, state = linmu_ops.causal_conv1d(piece, w, initial_state=state, return_final_state=True)
        ys.append(y)
    assert torch.equal(torch.cat(ys, 1), whole) and torch.equal(state, last)


def test_segments_are_separate_sequences():
    i = make_inputs((1, 20, 6, 4), torch.float32)
    index = torch.tensor([0] * 7 + [4] * 2 + [0] * 11).int()[None]
    whole = linmu_ops.causal_conv1d(i["x"], i["weight"], seq_idx=index)
    parts = [linmu_ops.causal_conv1d(p, i["weight"]) for p in i["x"].split([7, 2, 11], dim=1)]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_a_segment_never_reads_another_ones_nan():
    i = make_inputs((1, 9, 6, 4), torch.float32)
    x = i["x"].clone()
    x[:, :4] = float("nan")
    index = torch.tensor([0] * 4 + [1] * 5).int()[None]
    x.requires_grad_()
    y = linmu_ops.causal_conv1d(x, i["weight"], seq_idx=index, activation="silu")[:, 4:]
    assert torch.equal(y, linmu_ops.causal_conv1d(x[:, 4:], i["weight"], activation="silu"))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_as_transformers(activation):
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    x, w, b = torch.randn(2, 19, 12), torch.randn(12, 4), torch.randn(12)
    theirs = mamba2.causal_conv1d_fn(x.transpose(1, 2), w, b, activation).transpose(1, 2)
    torch.testing.assert_close(linmu_ops.causal_conv1d(x, w, b, activation=activation), theirs)


def test_same_bits_for_any_number_of_threads():
    i = make_inputs((2, 700, 48, 4), torch.float32, full=True, activation="silu")

    def run():
        leaves = {k: i[k].detach().clone().requires_grad_() for k in wrt(i)}
        out = linmu_ops.causal_conv1d(**{**i, **leaves})
        return [*out, *torch.autograd.grad(sum(o.square().sum() for o in out), list(leaves.values()))]

    assert_same_bits(run, threads=(1, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OLDER)
def test_isa(isa):
    rerun_with_isa(isa, __file__, "test_forward_and_backward")


def test_errors():
    i = make_inputs((2, 6, 5, 4), torch.float32)
    x, w = i["x"], i["weight"]
    op = linmu_ops.causal_conv1d
    with pytest.raises(ValueError, match=r"causal_conv1d: weight must be \(D, K\) with D=5, got shape \(4, 4\)"):
        op(x, w[:4])
    with pytest.raises(ValueError, match="causal_conv1d: weight must have 1 <= K <= 8, got K=9"):
        op(x, torch.randn(5, 9))
    with pytest.raises(ValueError, match="causal_conv1d: activation must be None or 'silu', got 'gelu'"):
        op(x, w, activation="gelu")
    with pytest.raises(ValueError, match=r"initial_state must be \(B, K-1, D\) with B=2, K-1=3, D=5, got"):
        op(x, w, initial_state=torch.randn(2, 4, 5))
    with pytest.raises(TypeError, match="causal_conv1d: initial_state must be float32, got float64"):
        op(x, w, initial_state=torch.randn(2, 3, 5).double())
    with pytest.raises(TypeError, match="causal_conv1d: seq_idx must be int32, got int64"):
        op(x, w, seq_idx=torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="causal_conv1d: bias must be on cpu, got meta"):
        op(x, w, torch.empty(5, device="meta"))


@pytest.mark.parametrize("value", [-1, 6, 2**31 - 1, -(2**31), 0], ids=str)
def test_bad_token_order(value):
    i = make_inputs((2, 6, 5, 4), torch.float32)
    order = torch.arange(6).int().repeat(2, 1)
    order[1, 5] = value
    with pytest.raises(ValueError, match=r"causal_conv1d: token_order must hold every position 0\.\.L-1 once per row"):
        linmu_ops.causal_conv1d(i["x"], i["weight"], token_order=order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("D", [3584, 3586])
def test_an_output_larger_than_caches_has_the_bits_of_its_parts(dtype, D):
    x, w = torch.randn(1, (18 << 20) // (dtype.itemsize * D), D).to(dtype), torch.randn(D, 4).to(dtype)
    whole = linmu_ops.causal_conv1d(x, w, activation="silu")
    part = linmu_ops.causal_conv1d(x[:, 96:201].contiguous(), w, activation="silu")
    assert torch.equal(whole[:, 99:201], part[:, 3:])
