"""Triton kernels of `gated_norm`: a tile of rows of one group of channels at a time, each read once.

The backward walks tiles in a fixed number of programs, each summing what the weight gets from its rows in a fixed
order, so that repeated runs agree to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # channels of a tile; a row of more has a tile of its own
PROGRAMS = 256


@triton.jit
def _read(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tile(tile, rows, group, groups, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a tile's numbers lie, and which of them are there."""
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    return (row * groups + group) * SIZE + channel, (row < rows) & (channel < SIZE)


@triton.jit(do_not_specialize=["rows"])
def _fwd_kernel(
    out_ptr, x_ptr, z_ptr, weight_ptr, rows, groups, eps, SIZE: tl.constexpr, BEFORE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    at, inside = _tile(tl.program_id(0), rows, group, groups, SIZE, ROWS, BLOCK)
    y, z = _read(x_ptr, at, inside), _read(z_ptr, at, inside)
    gate = z * _sigmoid(z)
    if not BEFORE:
        y *= gate
    y *= 1.0 / tl.sqrt(tl.sum(y * y, axis=1) / SIZE + eps)[:, None]
    if HAS_WEIGHT:
        channel = tl.arange(0, BLOCK)[None, :]
        y *= tl.load(weight_ptr + group * SIZE + channel, mask=channel < SIZE, other=0.0)
    if BEFORE:
        y *= gate
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _bwd_kernel(
    dx_ptr, dz_ptr, dweight_ptr, dout_ptr, x_ptr, z_ptr, weight_ptr, rows, groups, eps, SIZE: tl.constexpr,
    BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs, group = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    channel = tl.arange(0, BLOCK)[None, :]
    weight, dweight = tl.zeros((1, BLOCK), tl.float32), tl.zeros((1, BLOCK), tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + group * SIZE + channel, mask=channel < SIZE, other=0.0)
    for i in range(tl.cdiv(tl.cdiv(rows, ROWS) - program, programs)):
        at, inside = _tile(program + i * programs, rows, group, groups, SIZE, ROWS, BLOCK)
        x, z, dy = _read(x_ptr, at, inside), _read(z_ptr, at, inside), _read(dout_ptr, at, inside)
        sigmoid = _sigmoid(z)
        gate = z * sigmoid
        y = x
        if not BEFORE:
            y *= gate
        scale = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) / SIZE + eps)[:, None]
        y *= scale
        if BEFORE:
            normed = dy * gate
        else:
            normed = dy
        if HAS_WEIGHT:
            dweight += tl.sum(tl.where(inside, normed * y, 0.0), axis=0)[None, :]
            normed *= weight
            dy *= weight
        du = scale * (normed - y * (tl.sum(normed * y, axis=1) / SIZE)[:, None])
        if BEFORE:
            dx, dgate = du, dy * y
        else:
            dx, dgate = du * gate, du * x
        dz = dgate * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + (program * groups + group) * SIZE + channel, dweight, mask=channel < SIZE)


def _options(weight: Tensor | None, size: int, before: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(size)
    return dict(
        SIZE=size, BEFORE=before, HAS_WEIGHT=weight is not None, ROWS=max(1, TILE // block), BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
    )  # fmt: skip


def gated_norm(
    x: Tensor, z: Tensor, weight: Tensor | None, group_size: int, norm_before_gate: bool, eps: float
) -> Tensor:  # fmt: skip
    """Arguments and result of the dispatcher op `linmu::gated_norm`."""
    options = _options(weight, group_size, norm_before_gate)
    out = torch.empty_like(x)
    if out.numel():
        rows, groups = x.shape[0] * x.shape[1], x.shape[2] // group_size
        _fwd_kernel[(triton.cdiv(rows, options["ROWS"]), groups)](out, x, z, weight, rows, groups, eps, **options)
    return out


def gated_norm_bwd(
    grad_out: Tensor, x: Tensor, z: Tensor, weight: Tensor | None, group_size: int, norm_before_gate: bool, eps: float
) -> list[Tensor]:  # fmt: skip
    """Arguments and results of the dispatcher op `linmu::gated_norm_bwd`."""
    options = _options(weight, group_size, norm_before_gate)
    rows, groups = x.shape[0] * x.shape[1], x.shape[2] // group_size
    programs = max(1, min(triton.cdiv(PROGRAMS, max(1, groups)), triton.cdiv(rows, options["ROWS"])))
    dx, dz = torch.empty_like(x), torch.empty_like(z)
    dweight = None if weight is None else x.new_zeros(programs, x.shape[2], dtype=torch.float32)
    if x.numel():
        tensors = (dx, dz, dweight, grad_out, x, z, weight)
        _bwd_kernel[(programs, groups)](*tensors, rows, groups, eps, **options)
    return [dx, dz, x.new_empty(0) if dweight is None else dweight.sum(0)]
