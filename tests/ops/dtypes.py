"""Which arguments of an op may be of any float dtype, and what it makes of them, for any implementation."""

from __future__ import annotations

import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import run_op, small_inputs, written
from tests.ops.layouts import DEVICE, SIZES

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Per op, the arguments that may be of any float dtype whatever x is of.
ANY_DTYPE = {
    "branch_mix_norm": ["mix", "weight", "bias"],
    "causal_conv1d": ["weight", "bias"],
    "causal_conv1d_step": ["weight", "bias"],
    "exact_step": ["dt", "dt_bias", "rest", "c_map", "scale", "cos", "sin"],
    "far_attention": ["lse", "rest", "steps", "b_map", "c_map", "scale", "rates"],
    "gated_delta_scan": ["g", "beta", "reverse_g", "reverse_beta", "gate"],
    "gated_delta_step": ["g", "beta"],
    "gated_norm": ["weight"],
    "near_attention": [],
    "ssd_scan": ["dt", "A", "D", "dt_bias", "reverse_dt", "reverse_A", "reverse_dt_bias", "gate"],
    "ssd_step": ["dt", "A", "D", "dt_bias"],
    "window_attention": ["bias", "cos", "sin"],
}


def call_of(op, dtype=torch.float32, **sizes):
    return small_inputs(op, DEVICE, dtype, **{**SIZES.get(op, {}), **sizes})


def results(op, impl, inputs):
    """Outputs, what is written to, and gradients."""
    leaves = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    differentiates = _registry.OPS[op].backward is not None
    if differentiates:
        leaves = {k: v.detach().requires_grad_() for k, v in leaves.items() if k not in ("cos", "sin")}
    with linmu_ops.use_impl(f"{op}:{impl}"):
        out = run_op(op, **inputs | leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    if not differentiates:
        return [*out, *(inputs[name].resolve_neg() for name in written(op))]
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=g).to(o) for o in out]
    grads = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True)
    assert all(grad is None or grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves.values(), strict=True))
    return [*out, *(grad for grad in grads if grad is not None)]


def assert_casts(op, impl, dtype, other, **sizes):
    """As with those arguments cast to the type that the op counts in; gradients come in the argument's own."""
    narrow, wide = call_of(op, dtype, **sizes), call_of(op, dtype, **sizes)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ANY_DTYPE[op]:
        narrow[name] = narrow[name].to(other)
        wide[name] = narrow[name].to(acc)
    got, want = results(op, impl, narrow), results(op, impl, wide)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.to(a.dtype))
