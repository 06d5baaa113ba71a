"""Triton kernels of `branch_mix_norm`: one row at a time, each read once.

The backward walks rows in a fixed number of programs, each summing what weight, bias and mix get from its rows in a
fixed order, so that repeated runs agree to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256
MIX_SCALAR, MIX_CHANNEL, MIX_TOKEN = 0, 1, 2
NORM = {"none": 0, "rms": 1, "layer": 2}


@triton.jit
def _mix(mix_ptr, mask_ptr, row, offs, D, KIND: tl.constexpr, HAS_MASK: tl.constexpr):
    """Weight of branch a in this row (per channel), and where the row is mixed at all."""
    inside = offs < D
    if KIND == 1:
        m = tl.load(mix_ptr + offs, mask=inside, other=0.0)
    else:
        m = tl.load(mix_ptr + (row if KIND == 2 else 0)) + tl.zeros_like(offs).to(tl.float32)
    mixed = inside
    if HAS_MASK:
        mixed = offs < tl.where(tl.load(mask_ptr + row) != 0, D, 0)
        m = tl.where(mixed, m, 1.0)
    return m, mixed


@triton.jit
def _normalise(u, inside, D, eps, NORM: tl.constexpr):
    """The normed row and 1 / its standard deviation (or root mean square)."""
    if NORM == 0:
        return u, 1.0
    if NORM == 2:
        u = tl.where(inside, u - tl.sum(u, axis=0) / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(u * u, axis=0) / D + eps)
    return u * scale, scale


@triton.jit
def _fwd_kernel(
    out_ptr, a_ptr, b_ptr, mix_ptr, mask_ptr, weight_ptr, bias_ptr, D, eps, KIND: tl.constexpr,
    NORM: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < D
    m, mixed = _mix(mix_ptr, mask_ptr, row, offs, D, KIND, HAS_MASK)
    a = tl.load(a_ptr + row * D + offs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * D + offs, mask=mixed, other=0.0).to(tl.float32)
    y, _ = _normalise(m * a + (1.0 - m) * b, inside, D, eps, NORM)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs, mask=inside, other=0.0)
    tl.store(out_ptr + row * D + offs, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _bwd_kernel(
    da_ptr, db_ptr, dmix_ptr, dweight_ptr, dbias_ptr, dout_ptr, a_ptr, b_ptr, mix_ptr, mask_ptr, weight_ptr, rows, D,
    eps, KIND: tl.constexpr, NORM: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs = tl.arange(0, BLOCK)
    inside = offs < D
    dmix = tl.zeros((BLOCK,), tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.cdiv(rows - program, programs)):
        row = program + i * programs
        m, mixed = _mix(mix_ptr, mask_ptr, row, offs, D, KIND, HAS_MASK)
        a = tl.load(a_ptr + row * D + offs, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + row * D + offs, mask=mixed, other=0.0).to(tl.float32)
        dy = tl.load(dout_ptr + row * D + offs, mask=inside, other=0.0).to(tl.float32)
        y, scale = _normalise(m * a + (1.0 - m) * b, inside, D, eps, NORM)
        if HAS_WEIGHT:
            dweight += dy * y
        if HAS_BIAS:
            dbias += dy
        if HAS_WEIGHT:
            dy *= tl.load(weight_ptr + offs, mask=inside, other=0.0)
        if NORM == 0:
            du = dy
        else:
            du = dy - y * (tl.sum(dy * y, axis=0) / D)
            if NORM == 2:
                # Not dy, of which it is the mean but for roundings: the du of a row must add up to 0.
                du -= tl.sum(tl.where(inside, du, 0.0), axis=0) / D
            du = tl.where(inside, du * scale, 0.0)
        tl.store(da_ptr + row * D + offs, (du * m).to(da_ptr.dtype.element_ty), mask=inside)
        tl.store(db_ptr + row * D + offs, (du * (1.0 - m)).to(db_ptr.dtype.element_ty), mask=inside)
        lean = tl.where(mixed, du * (a - b), 0.0)
        if KIND == 2:
            tl.store(dmix_ptr + row, tl.sum(lean, axis=0))
        else:
            dmix += lean
    at = program * D + offs
    if KIND != 2:
        tl.store(dmix_ptr + at, dmix, mask=inside)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + at, dweight, mask=inside)
    if HAS_BIAS:
        tl.store(dbias_ptr + at, dbias, mask=inside)


def _kind(mix: Tensor) -> int:
    return MIX_TOKEN if mix.dim() == 2 else MIX_SCALAR if mix.shape[0] == 1 else MIX_CHANNEL


def _options(
    a: Tensor, mix: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: str
) -> dict[str, Any]:
    block = triton.next_power_of_2(a.shape[2])
    return dict(
        KIND=_kind(mix), NORM=NORM[norm], HAS_MASK=mask is not None, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, BLOCK=block, num_warps=8 if block >= 4096 else 4,
    )  # fmt: skip


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous, and masks as bytes."""
    rows = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in rows]


def branch_mix_norm(
    a: Tensor, b: Tensor, mix: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: str,
    eps: float,
) -> Tensor:  # fmt: skip
    """Arguments and result of the dispatcher op `linmu::branch_mix_norm`."""
    options = _options(a, mix, mask, weight, bias, norm)
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    if out.numel():
        tensors = _contiguous(a, b, mix, mask, weight, bias)
        _fwd_kernel[(a.shape[0] * a.shape[1],)](out, *tensors, a.shape[2], eps, **options)
    return out


def branch_mix_norm_bwd(
    grad_out: Tensor, a: Tensor, b: Tensor, mix: Tensor, mask: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, norm: str, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Arguments and results of the dispatcher op `linmu::branch_mix_norm_bwd`."""
    options = _options(a, mix, mask, weight, bias, norm)
    B, L, D = a.shape
    programs = max(1, min(PROGRAMS, B * L))
    da, db = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b))
    partial = lambda: torch.zeros(programs, D, dtype=torch.float32, device=a.device)  # noqa: E731
    dmix = torch.zeros(B, L, dtype=torch.float32, device=a.device) if mix.dim() == 2 else partial()
    dweight, dbias = (None if t is None else partial() for t in (weight, bias))
    if a.numel():
        dout, a, b, mix_, mask, weight_ = _contiguous(grad_out, a, b, mix, mask, weight)
        _bwd_kernel[(programs,)](
            da, db, dmix, dweight, dbias, dout, a, b, mix_, mask, weight_, B * L, D, eps, **options
        )
    if mix.dim() == 1:
        dmix = dmix.sum().view(1) if mix.shape[0] == 1 else dmix.sum(0)
    empty = da.new_empty(0)
    return [da, db, dmix, *(empty.clone() if t is None else t.sum(0) for t in (dweight, dbias))]
