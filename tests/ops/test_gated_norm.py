"""`gated_norm` against its reference, and against the modules of transformers that it stands for."""

from __future__ import annotations

import functools

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference
from tests.ops.cases.gated_norm import CASES, DTYPES, EMPTY, by_reference, make_inputs, wrt
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa

ORDERS = pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype, before):
    inputs = make_inputs(case, dtype, before) | dict(eps=1e-3)
    check_against_reference(linmu_ops.gated_norm, by_reference, inputs, wrt(inputs))


@ORDERS
@pytest.mark.parametrize("missing", ["weight", "group_size"])
def test_each_option_left_out(missing, before):
    inputs = make_inputs((2, 9, 17, 2), torch.float32, before)
    del inputs[missing]
    check_against_reference(linmu_ops.gated_norm, by_reference, inputs, wrt(inputs))


@ORDERS
def test_gradcheck(before):
    i = make_inputs((2, 3, 4, 2), torch.float64, before)
    leaves = tuple(i.pop(k).double().requires_grad_() for k in ("x", "z", "weight"))
    torch.autograd.gradcheck(lambda x, z, weight: linmu_ops.gated_norm(x, z, weight=weight, **i), leaves)


@ORDERS
@pytest.mark.parametrize("weighted", [True, False])
def test_opcheck(before, weighted):
    i = make_inputs((2, 6, 5, 2), torch.float32, before)
    x, z, weight = (i[k].requires_grad_() for k in ("x", "z", "weight"))
    torch.library.opcheck(torch.ops.linmu.gated_norm, (x, z, weight if weighted else None, 5, before, 1e-6))


def test_compile():
    f = torch.compile(functools.partial(linmu_ops.gated_norm, group_size=3), fullgraph=True, dynamic=True)
    for L in (9, 17):
        i = make_inputs((2, L, 3, 2), torch.float32)
        leaves = tuple(i[k].requires_grad_() for k in ("x", "z"))
        got = torch.autograd.grad(f(*leaves).square().sum(), leaves)
        want = torch.autograd.grad(linmu_ops.gated_norm(*leaves, group_size=3).square().sum(), leaves)
        torch.testing.assert_close(got, want)


@ORDERS
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty(case, before):
    inputs = make_inputs(case, torch.float32, before)
    check_against_reference(linmu_ops.gated_norm, by_reference, inputs, wrt(inputs))


@ORDERS
def test_no_channels(before):
    x = torch.zeros(2, 3, 0)
    assert linmu_ops.gated_norm(x, x, norm_before_gate=before).shape == x.shape


@ORDERS
def test_strided(before):
    """A gate is a part of a projection: its rows lie apart."""
    inputs = make_inputs((2, 21, 6, 2), torch.float32, before)
    inputs["z"] = torch.randn(2, 21, 40)[..., 5:17]
    inputs["x"] = torch.randn(2, 12, 43).transpose(1, 2)[:, 1::2]
    check_against_reference(linmu_ops.gated_norm, by_reference, inputs, wrt(inputs))
    inputs["x"] = torch.randn(1, 1, 12).expand(2, 21, 12)
    check_against_reference(linmu_ops.gated_norm, by_reference, inputs, wrt(inputs))


@ORDERS
def test_an_open_or_shut_gate_and_rows_of_zeros(before):
    x, z = torch.randn(1, 6, 16), torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e4]).reshape(1, 6, 1).repeat(1, 1, 16)
    inputs = dict(x=x, z=z, norm_before_gate=before)
    check_against_reference(linmu_ops.gated_norm, by_reference, inputs, ["x"])
    nothing = linmu_ops.gated_norm(torch.zeros(1, 2, 16), torch.randn(1, 2, 16), norm_before_gate=before)
    assert not nothing.any()


@ORDERS
def test_not_finite(before):
    """NaN or infinity in one group leaves the others alone, and is where the reference has it."""
    for value in (float("nan"), float("inf"), -float("inf")):
        for name in ("x", "z"):
            i = make_inputs((1, 4, 9, 2), torch.float32, before)
            clean = linmu_ops.gated_norm(**i)
            i[name][0, 1, 3] = value
            got, want = linmu_ops.gated_norm(**i), by_reference(**i)
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got[0, 1, 9:], clean[0, 1, 9:]) and torch.equal(got[0, 2:], clean[0, 2:])


@ORDERS
def test_as_transformers(before):
    if before:
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

        module = Qwen3NextRMSNormGated(24, eps=1e-5)
    else:
        from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

        module = MambaRMSNormGated(24, group_size=12, eps=1e-5)
    x, z = torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    module.weight.data.normal_()
    size = None if before else 12
    got = linmu_ops.gated_norm(x, z, weight=module.weight, group_size=size, norm_before_gate=before, eps=1e-5)
    torch.testing.assert_close(got, module(x, z))


@ORDERS
def test_same_bits_for_any_number_of_threads(before):
    i = make_inputs((2, 300, 24, 2), torch.float32, before)

    def run():
        leaves = {k: i[k].detach().clone().requires_grad_() for k in wrt(i)}
        out = linmu_ops.gated_norm(**{**i, **leaves})
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    assert_same_bits(run, threads=(1, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OLDER)
def test_isa(isa):
    rerun_with_isa(isa, __file__, "test_forward_and_backward")


def test_errors():
    i = make_inputs((2, 6, 5, 2), torch.float32)
    op = linmu_ops.gated_norm
    with pytest.raises(ValueError, match=r"gated_norm: z must be \(B, L, D\) with B=2, L=6, D=10, got shape"):
        op(**{**i, "z": i["z"][:, :5]})
    with pytest.raises(TypeError, match="gated_norm: z must be float32, got float64"):
        op(**{**i, "z": i["z"].double()})
    with pytest.raises(ValueError, match="gated_norm: group_size must divide D=10, got 4"):
        op(**{**i, "group_size": 4})
    with pytest.raises(ValueError, match="gated_norm: group_size must be >= 1, got 0"):
        op(**{**i, "group_size": 0})
    with pytest.raises(TypeError, match=r"gated_norm: group_size must be an integer >= 1, got 2.5"):
        op(**{**i, "group_size": 2.5})
    with pytest.raises(TypeError, match="gated_norm: norm_before_gate must be True or False, got 1"):
        op(**{**i, "norm_before_gate": 1})
    with pytest.raises(ValueError, match=r"gated_norm: eps must be >= 0, got -1.0"):
        op(**i, eps=-1.0)


@ORDERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [128, 130])
def test_an_output_larger_than_caches_has_the_bits_of_its_parts(dtype, size, before):
    i = make_inputs((1, (18 << 20) // (dtype.itemsize * 8 * size), size, 8), dtype, before)
    whole = linmu_ops.gated_norm(**i)
    rows = slice(101, 201)
    part = linmu_ops.gated_norm(**i | {k: i[k][:, rows] for k in ("x", "z")})
    assert torch.equal(whole[:, rows], part)
