"""However an argument lies in memory, an op reads its values: forward, gradient and step. Elsewhere it is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import CASES, run_op, written
from tests.ops.dtypes import ANY_DTYPE, DTYPES, assert_casts, call_of, results

IMPLEMENTATIONS = ["reference", "cpu"]
OPS = sorted(CASES)


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


def tensors_of(op):
    return [k for k, v in call_of(op).items() if isinstance(v, torch.Tensor)]


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


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", ["cpu", pytest.param("reference", marks=pytest.mark.sweep)])
def test_each_mix_of_dtypes(impl, op, dtype, other):
    assert_casts(op, impl, dtype, other)


@pytest.mark.parametrize("op", OPS)
def test_any_other_mix_is_refused(op):
    """The dtype of the rows is the rule for what is of their kind."""
    names = {n for n, v in call_of(op).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    for name in names - {"x", "a", "q"} - set(ANY_DTYPE[op]):
        inputs = call_of(op, torch.bfloat16)
        inputs[name] = inputs[name].to(torch.float16)
        named = name.replace("reverse_", "reverse.")
        with pytest.raises(TypeError, match=f"^{op}: {named} must be (bfloat16|float32), got float16$"):
            run_op(op, **inputs)


STEPS = [op for op in OPS if written(op)]


def within(whole, like, start):
    """A view of `whole`, as wide as `like`."""
    return whole.flatten()[start : start + like.numel()].view(like.shape)


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_written_shares_no_memory_with_what_is_read(impl, op):
    """Kernels read while they write. What lies beside it is another's."""
    for target, name in itertools.product(written(op), tensors_of(op)):
        inputs = call_of(op)
        mine, other = inputs[target], inputs[name]
        if target == name or mine.dtype != other.dtype:
            continue
        both = torch.cat([mine.flatten(), other.flatten()])
        inputs[target] = within(both, mine, 0)
        last = mine.numel() - 1
        for start in {max(0, last + 1 - other.numel()), last}:
            shared = inputs | {name: within(both, other, start)}
            before = both.clone()
            message = f"^{op}: ({target} .*got that of {name}|{name} .*got that of {target})$"
            with linmu_ops.use_impl(f"{op}:{impl}"), pytest.raises(ValueError, match=message):
                run_op(op, **shared)
            assert torch.equal(both, before)
        inputs[name] = within(both, other, mine.numel())
        assert_same(impl, results(op, impl, inputs), results(op, impl, call_of(op)))
