"""However an argument lies in memory, an op reads its values: forward, gradient and step. Elsewhere it is refused."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import CASES, run_op, small_inputs, written

IMPLEMENTATIONS = ["reference", "cpu"]
OPS = sorted(CASES)
# Small enough for the references.
SIZES = dict(
    window_attention=dict(P=8, R=4, grid=(2, 2, 3), window=(2, 2, 3)), ssd_scan=dict(L=9), gated_delta_scan=dict(L=9)
)


def expanded(t):
    """The first row's values in every row, kept once."""
    return t[:1].expand(t.shape)


def every_other(t):
    """The same values, none beside another."""
    wide = torch.zeros(*t.shape, 2, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


def turned(t):
    """The same values, the last dimension outermost."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def offset(t):
    """The same values, not at the start of their storage."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


def sliced(t):
    """The same values, within a wider tensor."""
    return torch.cat([t, t, t], -1)[..., t.shape[-1] : 2 * t.shape[-1]]


def negative(t):
    """The same values, kept with the other sign."""
    return torch._neg_view(-t) if t.is_floating_point() else t


def imaginary(t):
    """The same values, as what is imaginary of a conjugate."""
    if t.dtype not in (torch.float32, torch.float64):
        return t
    return torch.complex(t.clone(), -t).conj().imag


LAYOUTS = [expanded, every_other, turned, offset, sliced, negative, imaginary]


def call_of(op, dtype=torch.float32):
    return small_inputs(op, "cpu", dtype, **SIZES.get(op, {}))


def tensors_of(op):
    return [k for k, v in call_of(op).items() if isinstance(v, torch.Tensor)]


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
    weights = [torch.randn(o.shape, generator=g).to(o.dtype) for o in out]
    grads = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True)
    return [*out, *(grad for grad in grads if grad is not None)]


def assert_same(impl, got, want):
    """Bit by bit; but PyTorch's own sums, in the reference, go another way in another layout."""
    for a, b in zip(got, want, strict=True):
        if impl == "reference" and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        else:
            assert a is b is None or torch.equal(a, b)


PAIRS = [(op, name) for op in OPS for name in tensors_of(op)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_each_argument_in_each_layout(impl, op, layout):
    for name in tensors_of(op):
        values, inputs = call_of(op), call_of(op)
        packed = layout(values[name]).resolve_neg().clone(memory_format=torch.contiguous_format)
        values[name] = packed
        inputs[name] = layout(packed.clone())  # some layouts leave some tensors as they are, and one may be written to
        if name in written(op) and not inputs[name].is_contiguous():
            message = f"{op}: {name} must be contiguous"
            with linmu_ops.use_impl(f"{op}:{impl}"), pytest.raises(ValueError, match=message):
                run_op(op, **inputs)
            continue
        assert_same(impl, results(op, impl, inputs), results(op, impl, values))


@pytest.mark.parametrize("layout", [every_other, turned, expanded, negative], ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", [op for op in OPS if _registry.OPS[op].backward])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_gradient_in_each_layout(impl, op, layout):
    inputs = {
        k: v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call_of(op).items()
    }
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    with linmu_ops.use_impl(f"{op}:{impl}"):
        out = run_op(op, **inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    g = torch.Generator().manual_seed(0)
    weights = [layout(torch.randn(o.shape, generator=g)) for o in out]
    plain = [w.resolve_neg().clone(memory_format=torch.contiguous_format) for w in weights]
    found = [
        torch.autograd.grad(out, leaves, given, retain_graph=True, allow_unused=True) for given in (weights, plain)
    ]
    assert_same(impl, *found)


@pytest.mark.parametrize(("op", "name"), PAIRS, ids=str)
def test_a_tensor_elsewhere_is_refused(op, name):
    inputs = call_of(op)
    inputs[name] = inputs[name].to("meta")
    first = next(iter(k for k in inputs if k in ("x", "a", "q")))
    named = name.replace("reverse_", "reverse.")
    message = f"{op}: .* must be on" if name == first else f"{op}: {named} must be on cpu, got meta"
    with pytest.raises(ValueError, match=message):
        run_op(op, **inputs)


# Per op, the arguments that may be of any float dtype whatever x is of.
ANY_DTYPE = {
    "branch_mix_norm": ["mix", "weight", "bias"],
    "causal_conv1d": ["weight", "bias"],
    "causal_conv1d_step": ["weight", "bias"],
    "exact_step": ["dt", "dt_bias", "rest", "c_map", "scale", "cos", "sin"],
    "gated_delta_scan": ["g", "beta", "reverse_g", "reverse_beta", "gate"],
    "gated_delta_step": ["g", "beta"],
    "near_attention": [],
    "ssd_scan": ["dt", "A", "D", "dt_bias", "reverse_dt", "reverse_A", "reverse_dt_bias", "gate"],
    "ssd_step": ["dt", "A", "D", "dt_bias"],
    "window_attention": ["bias", "cos", "sin"],
}


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_each_mix_of_dtypes(op, dtype, other):
    """As with those arguments cast to the type that the op counts in; gradients come in the argument's own."""
    narrow, wide = call_of(op, dtype), call_of(op, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ANY_DTYPE[op]:
        narrow[name] = narrow[name].to(other)
        wide[name] = narrow[name].to(acc)
    got, want = results(op, "cpu", narrow), results(op, "cpu", wide)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.to(a.dtype))
