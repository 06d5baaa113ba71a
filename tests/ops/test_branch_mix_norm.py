"""`branch_mix_norm` against its reference and against PyTorch's own norms."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import linmu_ops
from linmu_ops._testing import check_against_reference
from tests.ops.cases.branch_mix_norm import (
    CASES,
    DTYPES,
    EMPTY,
    MIXES,
    NORMS,
    by_reference,
    check_gradient_of_a_mix_far_apart,
    check_gradient_of_a_scalar_mix,
    make_inputs,
    wrt,
)
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype, mix, norm):
    inputs = make_inputs(case, dtype, norm, mix, masked=case[1] != 21) | dict(eps=1e-3)
    leaves = [k for k in wrt(inputs) if (k, mix) != ("mix", "scalar")]
    check_against_reference(linmu_ops.branch_mix_norm, by_reference, inputs, leaves)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_a_scalar_mix(case, dtype, norm):
    check_gradient_of_a_scalar_mix(case, dtype, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mix", ["scalar", "token"])
def test_gradient_of_a_mix_of_branches_far_apart(mix, norm):
    check_gradient_of_a_mix_far_apart(linmu_ops.branch_mix_norm, mix, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("D", [1, 2])
def test_few_channels(D, norm):
    # Forward only: the gradient of a norm over so few channels is a difference of equals, rounding error all of it.
    inputs = make_inputs((2, 5, D), torch.float32, norm) | dict(eps=1e-3)
    check_against_reference(linmu_ops.branch_mix_norm, by_reference, inputs)


@pytest.mark.parametrize("missing", ["mask", "weight", "bias"])
def test_each_option_left_out(missing):
    inputs = make_inputs((2, 9, 17), torch.float32)
    del inputs[missing]
    check_against_reference(linmu_ops.branch_mix_norm, by_reference, inputs, wrt(inputs))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mix", MIXES)
def test_gradcheck(norm, mix):
    inputs = make_inputs((2, 3, 4), torch.float64, norm, mix)
    leaves = {k: inputs.pop(k).double().requires_grad_() for k in wrt(inputs)}
    torch.autograd.gradcheck(
        lambda *values: linmu_ops.branch_mix_norm(**dict(zip(leaves, values, strict=True)), **inputs),
        tuple(leaves.values()),
    )


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm):
    i = make_inputs((2, 6, 5), torch.float32, norm)
    t = {k: i[k].requires_grad_() for k in wrt(i)}
    args = (t["a"], t["b"], t["mix"], i["mask"], t.get("weight"), t.get("bias"), norm, 1e-6)
    torch.library.opcheck(torch.ops.linmu.branch_mix_norm, args)


def test_compile():
    f = torch.compile(functools.partial(linmu_ops.branch_mix_norm, norm="rms"), fullgraph=True, dynamic=True)
    for L in (9, 17):
        i = make_inputs((2, L, 6), torch.float32, "rms", "channel", masked=False)
        leaves = tuple(i[k].requires_grad_() for k in ("a", "b", "mix"))
        got = torch.autograd.grad(f(*leaves).square().sum(), leaves)
        want = torch.autograd.grad(linmu_ops.branch_mix_norm(*leaves, norm="rms").square().sum(), leaves)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_empty(case, mix):
    inputs = make_inputs(case, torch.float32, mix=mix)
    check_against_reference(linmu_ops.branch_mix_norm, by_reference, inputs, wrt(inputs))


def test_strided():
    inputs = make_inputs((2, 21, 12), torch.float32, mix="token")
    inputs["a"] = torch.randn(2, 12, 43).transpose(1, 2)[:, 1::2]
    inputs["mix"] = torch.rand(21, 2).t()
    inputs["mask"] = inputs["mask"].t().contiguous().t()
    check_against_reference(linmu_ops.branch_mix_norm, by_reference, inputs, wrt(inputs))


def test_as_pytorch():
    i = make_inputs((2, 7, 12), torch.float32, masked=False)
    a, b, lam, w, c = (i[k] for k in ("a", "b", "mix", "weight", "bias"))
    mixed = lam * a + (1 - lam) * b
    op = linmu_ops.branch_mix_norm
    torch.testing.assert_close(op(a, b, lam, weight=w, bias=c, eps=1e-5), F.layer_norm(mixed, (12,), w, c, 1e-5))
    torch.testing.assert_close(op(a, b, lam, weight=w, norm="rms", eps=1e-5), F.rms_norm(mixed, (12,), w, 1e-5))
    torch.testing.assert_close(op(a, b, lam, norm="none"), mixed)


def test_b_is_not_looked_at_off_the_mask():
    i = make_inputs((2, 9, 12), torch.float32, mix="token")
    i["b"][~i["mask"]] = float("nan")
    leaves = {k: i[k].requires_grad_() for k in wrt(i)}
    out = linmu_ops.branch_mix_norm(**{**i, **leaves})
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    assert all(t.isfinite().all() for t in (out, *grads))
    assert not grads[1][~i["mask"]].any() and not grads[2][~i["mask"]].any()


def test_far_from_zero():
    i = make_inputs((1, 5, 64), torch.float32, masked=False)
    i["a"], i["b"] = i["a"] * 1e-3 + 100, i["b"] * 1e-3 + 100
    check_against_reference(linmu_ops.branch_mix_norm, by_reference, i, wrt(i))


@pytest.mark.parametrize("mix", MIXES)
def test_same_bits_for_any_number_of_threads(mix):
    i = make_inputs((2, 300, 48), torch.float32, mix=mix)

    def run():
        leaves = {k: i[k].detach().clone().requires_grad_() for k in wrt(i)}
        out = linmu_ops.branch_mix_norm(**{**i, **leaves})
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    assert_same_bits(run, threads=(1, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OLDER)
def test_isa(isa):
    rerun_with_isa(isa, __file__, "test_forward_and_backward")


def test_errors():
    i = make_inputs((2, 6, 5), torch.float32)
    op = linmu_ops.branch_mix_norm
    with pytest.raises(ValueError, match=r"branch_mix_norm: b must be \(B, L, D\) with B=2, L=6, D=5, got shape"):
        op(**{**i, "b": i["b"][:, :5]})
    with pytest.raises(TypeError, match="branch_mix_norm: b must be float32, got float64"):
        op(**{**i, "b": i["b"].double()})
    with pytest.raises(ValueError, match=r"mix must be \(1,\), \(D,\) or \(B, L\) with .* D=5, got shape \(4,\)"):
        op(**{**i, "mix": torch.rand(4)})
    with pytest.raises(ValueError, match=r"mix must be \(1,\), \(D,\) or \(B, L\) with .* D=5, got shape \(2, 5\)"):
        op(**{**i, "mix": torch.rand(2, 5)})
    with pytest.raises(TypeError, match="branch_mix_norm: mask must be bool, got int32"):
        op(**{**i, "mask": i["mask"].int()})
    with pytest.raises(ValueError, match="branch_mix_norm: norm must be one of layer, rms, none, got 'batch'"):
        op(**{**i, "norm": "batch"})
    with pytest.raises(ValueError, match="branch_mix_norm: bias needs norm='layer', got norm='rms'"):
        op(**{**i, "norm": "rms"})
    with pytest.raises(ValueError, match="branch_mix_norm: weight needs norm='layer' or 'rms', got norm='none'"):
        op(**{**i, "norm": "none", "bias": None})
    with pytest.raises(ValueError, match=r"branch_mix_norm: eps must be >= 0, got -1.0"):
        op(**i, eps=-1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [3584, 3586])
def test_an_output_larger_than_caches_has_the_bits_of_its_parts(dtype, D):
    i = make_inputs((1, (18 << 20) // (dtype.itemsize * D), D), dtype)
    whole = linmu_ops.branch_mix_norm(**i)
    rows = slice(101, 201)
    part = linmu_ops.branch_mix_norm(**i | {k: i[k][:, rows] for k in ("a", "b", "mask")})
    assert torch.equal(whole[:, rows], part)
