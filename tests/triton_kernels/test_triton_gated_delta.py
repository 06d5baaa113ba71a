"""The Triton kernels of the gated delta rule, interpreted on the CPU, against their references."""

from __future__ import annotations

import pytest
import torch

from linmu_ops._testing import check_implementation
from tests.ops.cases import gated_delta_scan as scan
from tests.ops.cases import gated_delta_step as step

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def check(op, inputs, wrt=()):
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    check_implementation(op, "triton", inputs, wrt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", step.CASES[:3] + step.CASES[4:], ids=str)
def test_gated_delta_step_kernel(case, dtype):
    check("gated_delta_step", step.make_inputs(case, dtype, use_qk_l2norm_in_kernel=case[0] == 2))


@pytest.mark.parametrize("options", [(), ("all",)], ids=["plain", "all"])
@pytest.mark.parametrize("direction", scan.DIRECTIONS)
def test_gated_delta_scan_kernels(direction, options):
    inputs = scan.make_inputs((2, 5, 2, 2, 1, 1, 5, 7), torch.float32, direction, options)
    check("gated_delta_scan", inputs, scan.used(inputs))


def test_more_visits_than_lie_between_two_kept_states():
    inputs = scan.make_inputs((1, 35, 1, 1, 1, 1, 5, 7), torch.float32, "forward", ("seq_idx", "initial_state"))
    check("gated_delta_scan", inputs, scan.used(inputs))


def test_half_precision():
    inputs = scan.make_inputs((1, 4, 2, 2, 1, 1, 8, 8), torch.float16, "both", ("all",))
    check("gated_delta_scan", inputs, scan.used(inputs))


@pytest.mark.parametrize("direction", scan.DIRECTIONS)
def test_empty_rows(direction):
    inputs = scan.make_inputs((2, 0, 2, 1, 2, 2, 4, 3), torch.float32, direction, ("initial_state",))
    check("gated_delta_scan", inputs | dict(return_final_state=True))
