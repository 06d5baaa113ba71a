"""On a GPU: every op by every implementation for GPUs, against the float64 reference, forward and backward."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import check_implementation, run_op, run_small, small_inputs, written
from tests.ops.cases import branch_mix_norm as branch
from tests.ops.cases import causal_conv1d as conv
from tests.ops.cases import causal_conv1d_step as conv_step
from tests.ops.cases import exact_step as exact
from tests.ops.cases import far_attention as far
from tests.ops.cases import gated_delta_scan as delta
from tests.ops.cases import gated_delta_step as delta_step
from tests.ops.cases import gated_norm as gated
from tests.ops.cases import near_attention as near
from tests.ops.cases import ssd_scan as scan
from tests.ops.cases import ssd_step as step
from tests.ops.cases import window_attention as window

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
IMPLEMENTATIONS = ["cuda", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODEL = (1, 300, 4, 2, 2, 4, 128, 128)  # several chunks of the model's own head


def _cases():
    """(op, inputs of a dtype, names to differentiate)."""
    for case in step.CASES:
        yield f"ssd_step-{case}", "ssd_step", lambda t, c=case: (step.make_inputs(c, t, softplus=True, skip=True), [])
    for case in [*scan.CASES, MODEL]:
        for direction in scan.DIRECTIONS:
            for options in ((), ("all",), ("normalize",)):

                def make(dtype, case=case, direction=direction, options=options):
                    if "normalize" in options and dtype != torch.float32:
                        pytest.skip("around the CUDA kernels, a mass is of the dtype of x")
                    inputs = scan.make_inputs(case, dtype, direction, options)
                    return inputs, scan.used(inputs)

                yield f"ssd_scan-{case}-{direction}-{'-'.join(options) or 'plain'}", "ssd_scan", make
    for case in exact.CASES:
        yield f"exact_step-{case}", "exact_step", lambda t, c=case: (exact.make_inputs(c, t), [])
    for case in far.CASES:
        yield f"far_attention-{case}", "far_attention", lambda t, c=case: (far.make_inputs(c, t), [])
    for case in delta_step.CASES:
        yield f"gated_delta_step-{case}", "gated_delta_step", lambda t, c=case: (delta_step.make_inputs(c, t), [])
    for case in delta.CASES:
        for direction in delta.DIRECTIONS:
            for options in ((), ("all",)):

                def make_delta(dtype, case=case, direction=direction, options=options):
                    inputs = delta.make_inputs(case, dtype, direction, options)
                    return inputs, delta.used(inputs)

                name = f"gated_delta_scan-{case}-{direction}-{'all' if options else 'plain'}"
                yield name, "gated_delta_scan", make_delta
    for case in [*gated.CASES, *gated.EMPTY]:
        for before in (False, True):

            def make_gated(dtype, case=case, before=before):
                inputs = gated.make_inputs(case, dtype, before)
                return inputs, gated.wrt(inputs)

            yield f"gated_norm-{case}-{'before' if before else 'after'}", "gated_norm", make_gated
    for case in near.CASES:
        yield f"near_attention-{case}", "near_attention", lambda t, c=case: (near.make_inputs(c, t), list("qkv"))
    for name, case in window.CASES.items():

        def make_window(dtype, case=case):
            inputs = window.make_inputs(case, dtype)
            return inputs, [k for k in ("q", "k", "v", "bias") if k in inputs]

        yield f"window_attention-{name}", "window_attention", make_window
    for case in [*conv.CASES, *conv.EMPTY]:
        for full in (False, True):

            def make_conv(dtype, case=case, full=full):
                inputs = conv.make_inputs(case, dtype, full, "silu" if full else None)
                return inputs, conv.wrt(inputs)

            yield f"causal_conv1d-{case}-{'full' if full else 'plain'}", "causal_conv1d", make_conv
    for case in conv_step.CASES:
        yield f"causal_conv1d_step-{case}", "causal_conv1d_step", lambda t, c=case: (conv_step.make_inputs(c, t), [])
    for case in [*branch.CASES, *branch.EMPTY]:
        for norm in branch.NORMS:
            for mix in branch.MIXES:

                def make_branch(dtype, case=case, norm=norm, mix=mix):
                    inputs = branch.make_inputs(case, dtype, norm, mix)
                    return inputs, branch.wrt(inputs)

                yield f"branch_mix_norm-{case}-{norm}-{mix}", "branch_mix_norm", make_branch


CASES = {name: (op, make) for name, op, make in _cases()}


def need(op, impl):
    if (why := _registry.why_not(op, impl, DEVICE)) is not None:
        pytest.skip(why)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name, dtype, impl):
    op, make = CASES[name]
    need(op, impl)
    inputs, wrt = make(dtype)
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    check_implementation(op, impl, inputs, wrt)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_the_same_bits_each_time(op, impl):
    need(op, impl)
    first, second = (run_small(op, impl, DEVICE, torch.bfloat16) for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_captured_in_a_graph(op):
    """Which takes that nothing waits for the device, and that all of it is on the stream it is called on."""
    need(op, "cuda")
    inputs = small_inputs(op, DEVICE)

    def call():
        state = {name: inputs[name].clone() for name in written(op)}
        with linmu_ops.use_impl(f"{op}:cuda"):
            out = run_op(op, **inputs | state)
        return [*(out if isinstance(out, tuple) else (out,)), *state.values()]

    want = [t.clone() for t in call()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_positions_that_are_no_permutation_touch_nothing_outside(impl):
    """Memory of others around the tensors would be overwritten, or, under compute-sanitizer, an error be reported."""
    need("ssd_scan", impl)
    inputs = scan.make_inputs(scan.SMALL, torch.float32, "both", ("all",))
    inputs["token_order"] = torch.randint(-(2**31), 2**31 - 1, inputs["token_order"].shape).int()
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    inputs["x"].requires_grad_()
    with linmu_ops.use_impl(f"ssd_scan:{impl}"):
        y, _ = run_op("ssd_scan", **inputs)
        y.nan_to_num().sum().backward()
    torch.cuda.synchronize()
    assert y.shape == (*inputs["dt"].shape, inputs["x"].shape[3])


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_more_elements_than_32_bits_count(impl):
    """x and y are of 2.6 G elements; with decays this steep the last tokens know nothing of the first."""
    need("ssd_scan", impl)
    B, L, H, P, N, tail = 1, 640_000, 32, 128, 16, 200
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of device memory")
    x = torch.empty(B, L, H, P, dtype=torch.bfloat16, device=DEVICE).normal_()
    b, c = (torch.randn(B, L, 1, N, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    dt, A = torch.ones(B, L, H, device=DEVICE), torch.full((H,), -2.0, device=DEVICE)
    with linmu_ops.use_impl(f"ssd_scan:{impl}"):
        y = linmu_ops.ssd_scan(x, dt, A, b, c)
        last = linmu_ops.ssd_scan(x[:, -tail:], dt[:, -tail:], A, b[:, -tail:], c[:, -tail:])
    torch.testing.assert_close(y[:, -tail // 2 :], last[:, -tail // 2 :], rtol=2e-2, atol=2e-2)
