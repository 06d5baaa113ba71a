"""The Triton kernels of the small ops, interpreted on the CPU, against their references."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_implementation
from tests.covering import covering
from tests.ops.cases import branch_mix_norm, causal_conv1d, causal_conv1d_step, gated_norm, ssd_step

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def check(op, inputs, wrt=()):
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    check_implementation(op, "triton", inputs, wrt)


@covering("case, dtype, mean", ssd_step.CASES[:3] + ssd_step.CASES[4:], DTYPES, [False, True])
def test_ssd_step_kernel(case, dtype, mean):
    check("ssd_step", ssd_step.make_inputs(case, dtype, softplus=True, skip=True, mean=mean))


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("case", [*causal_conv1d.CASES[:6], *causal_conv1d.EMPTY], ids=str)
def test_causal_conv1d_kernels(case, full):
    inputs = causal_conv1d.make_inputs(case, torch.float32, full, "silu" if full else None)
    check("causal_conv1d", inputs, causal_conv1d.wrt(inputs))


@pytest.mark.parametrize("case", causal_conv1d_step.CASES[:3], ids=str)
def test_causal_conv1d_step_kernel(case):
    check("causal_conv1d_step", causal_conv1d_step.make_inputs(case, torch.float32))


MIXED = [*branch_mix_norm.CASES[1:4], *branch_mix_norm.EMPTY]


@covering("case, mix, norm", MIXED, branch_mix_norm.MIXES, branch_mix_norm.NORMS)
def test_branch_mix_norm_kernels(case, mix, norm):
    inputs = branch_mix_norm.make_inputs(case, torch.float32, norm, mix, masked=case[1] != 40) | dict(eps=1e-3)
    check("branch_mix_norm", inputs, branch_mix_norm.wrt(inputs))


@pytest.mark.parametrize("mix", ["scalar", "token"])
def test_gradient_of_a_mix_of_branches_far_apart(mix):
    def op(**inputs):
        with linmu_ops.use_impl("branch_mix_norm:triton"):
            return linmu_ops.branch_mix_norm(**inputs)

    branch_mix_norm.check_gradient_of_a_mix_far_apart(op, mix, draws=5, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])
@pytest.mark.parametrize("case", [*gated_norm.CASES, (1, 2, 2100, 2), *gated_norm.EMPTY], ids=str)
def test_gated_norm_kernels(case, before, dtype):
    inputs = gated_norm.make_inputs(case, dtype, before) | dict(eps=1e-3)
    check("gated_norm", inputs, gated_norm.wrt(inputs))
    del inputs["weight"]
    check("gated_norm", inputs, gated_norm.wrt(inputs))


@pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])
def test_gated_norm_of_gates_that_are_open_or_shut(before):
    z = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e4]).reshape(1, 6, 1).repeat(1, 1, 16)
    check("gated_norm", dict(x=torch.randn(1, 6, 16), z=z, norm_before_gate=before), ["x", "z"])
