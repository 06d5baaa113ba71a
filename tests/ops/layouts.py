"""How the tensors of a call may lie in memory, for any implementation; and calls past Python's checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import run_op, small_inputs, written

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The ops that have CUDA C++.
WITH_CUDA = sorted(f.stem for f in (Path(__file__).parents[2] / "csrc/cuda").glob("*.cu") if f.stem in _registry.OPS)
SIZES = dict(
    window_attention=dict(P=8, R=4, grid=(2, 2, 3), window=(2, 2, 3)), ssd_scan=dict(L=9), gated_delta_scan=dict(L=9)
)


def every_other(t):
    """The same values, none beside another."""
    wide = torch.zeros(*t.shape, 2, dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


def turned_and_negative(t):
    """The same values, the last dimension outermost, and kept with the other sign."""
    turned = t.movedim(-1, 0).contiguous().movedim(0, -1)
    return torch._neg_view(-turned) if t.is_floating_point() else turned


def expanded(t):
    """The first row's values for every row, kept once."""
    return t[:1].expand(t.shape)


def offset(t):
    """The same values, not at the start of their storage."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


LAYOUTS = [every_other, turned_and_negative, offset]


def laid_out(op, layout, dtype=torch.float32):
    """The small case with every tensor in this layout; but for those written to, which must be packed."""
    inputs = small_inputs(op, DEVICE, dtype, **SIZES.get(op, {}))
    return {
        k: layout(v) if isinstance(v, torch.Tensor) and (k not in written(op) or layout is offset) else v
        for k, v in inputs.items()
    }


def run(op, inputs, impl):
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    leaves = [v for v in tensors.values() if v.is_floating_point()] if _registry.OPS[op].backward else []
    for leaf in leaves:
        leaf.requires_grad_()
    with linmu_ops.use_impl(f"{op}:{impl}"):
        out = run_op(op, **inputs)
        out = list(out) if isinstance(out, tuple) else [out]
        if not leaves:
            return [*out, *(inputs[n] for n in written(op))]
        return [*out, *torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out], allow_unused=True)]


def assert_same(op, impl, layouts, packed, bits=True):
    """bits: also where rows are not aligned, which may change the order of sums."""
    want = run(op, laid_out(op, packed), impl)
    for layout in layouts:
        for got, right in zip(run(op, laid_out(op, layout), impl), want, strict=True):
            if right is None:
                assert got is None
            elif bits or layout is not offset:
                assert got.equal(right), (layout.__name__, tuple(right.shape))
            else:
                assert (got - right).abs().max() <= 1e-5 * right.abs().max(), tuple(right.shape)


def dispatched(op):
    """The small case as the dispatcher's op takes it."""
    taken = []

    def record(op, like, *args):
        taken.extend(args)
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registry, "call", record)
        with pytest.raises(StopIteration):
            run_op(op, **small_inputs(op, DEVICE, **SIZES.get(op, {})))
    return taken


def elsewhere(args):
    """(place, arguments) for each tensor but the first on another device than the rest."""
    _, *others = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    for i in others:
        yield i, [a.to("meta") if i == k else a for k, a in enumerate(args)]


def packed_row(t):
    return expanded(t).clone(memory_format=torch.contiguous_format)
