"""The CUDA kernels of `causal_conv1d`, its step and `branch_mix_norm`, run by the emulator, against the reference."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_implementation
from tests.covering import covering
from tests.ops.cases import branch_mix_norm as mix_cases
from tests.ops.cases import causal_conv1d as conv_cases
from tests.ops.cases import causal_conv1d_step as step_cases

pytestmark = pytest.mark.usefixtures("by_emulator")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(op, inputs, wrt=()):
    check_implementation(op, "cpu", inputs, wrt)


CONVOLVED = [*conv_cases.CASES, (1, 130, 6, 3), (1, 2, 4, 8)]


@covering("case, dtype, full, activation", CONVOLVED, DTYPES, [False, True], [None, "silu"])
def test_causal_conv1d(case, dtype, full, activation):
    inputs = conv_cases.make_inputs(case, dtype, full, activation)
    check("causal_conv1d", inputs, conv_cases.wrt(inputs))


@pytest.mark.parametrize("given", ["bias", "token_order", "seq_idx", "initial_state", "return_final_state"])
def test_each_option_of_causal_conv1d_alone(given):
    everything = conv_cases.make_inputs((2, 37, 20, 4), torch.float32, full=True, activation="silu")
    inputs = {k: everything[k] for k in ("x", "weight", given)}
    check("causal_conv1d", inputs, conv_cases.wrt(inputs))


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("case", conv_cases.EMPTY, ids=str)
def test_empty_causal_conv1d(case, full):
    inputs = conv_cases.make_inputs(case, torch.float32, full)
    check("causal_conv1d", inputs, conv_cases.wrt(inputs))


def test_an_order_out_of_range_stays_inside():
    order = torch.tensor([[-(2**31), 99, 2**31 - 1, 1]], dtype=torch.int32)
    x, weight = torch.randn(1, 4, 8, requires_grad=True), torch.randn(8, 4)
    y = linmu_ops.causal_conv1d(x, weight, token_order=order, seq_idx=torch.zeros(1, 4, dtype=torch.int32))
    torch.autograd.grad(y[:, [0, 1, 3]].sum(), x)


def test_a_value_beyond_the_filter_has_no_part():
    x = torch.zeros(1, 9, 4)
    x[:, 2] = torch.inf
    y = linmu_ops.causal_conv1d(x, torch.ones(4, 3))
    assert not y[:, [0, 1, 5, 6, 7, 8]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", step_cases.CASES, ids=str)
def test_causal_conv1d_step(case, dtype):
    check("causal_conv1d_step", step_cases.make_inputs(case, dtype))


@covering("case, dtype, mix, norm", [*mix_cases.CASES, (1, 3, 1032)], DTYPES, mix_cases.MIXES, mix_cases.NORMS)
def test_branch_mix_norm(case, dtype, mix, norm):
    inputs = mix_cases.make_inputs(case, dtype, norm, mix, masked=case[1] != 21) | dict(eps=1e-3)
    leaves = [k for k in mix_cases.wrt(inputs) if (k, mix) != ("mix", "scalar")]
    check("branch_mix_norm", inputs, leaves)


@pytest.mark.parametrize("norm", mix_cases.NORMS)
def test_gradient_of_a_scalar_mix(norm):
    mix_cases.check_gradient_of_a_scalar_mix((2, 67, 33), torch.float32, norm)


@pytest.mark.parametrize("mix", ["scalar", "token"])
def test_gradient_of_a_mix_of_branches_far_apart(mix):
    mix_cases.check_gradient_of_a_mix_far_apart(linmu_ops.branch_mix_norm, mix)


@pytest.mark.parametrize("case", [(2, 300, 64), (1, 2, 1100)], ids=str)
def test_rows_that_shared_memory_cannot_keep(case, monkeypatch):
    monkeypatch.setenv("LINMU_EMULATED_SHARED", "2000")
    inputs = mix_cases.make_inputs(case, torch.bfloat16, "layer", "channel")
    check("branch_mix_norm", inputs, mix_cases.wrt(inputs))


@pytest.mark.parametrize("case", mix_cases.EMPTY, ids=str)
def test_empty_branch_mix_norm(case):
    inputs = mix_cases.make_inputs(case, torch.float32)
    check("branch_mix_norm", inputs, mix_cases.wrt(inputs))
