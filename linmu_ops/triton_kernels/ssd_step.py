"""Triton kernel of `ssd_step`: one pass over the state, one program per (batch, head, slice of P)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference._visits import normalized


@triton.jit
def _ssd_step_kernel(
    state_ptr, y_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, H, Gx, Gb, Gc, P, N,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, MASS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    dt = tl.load(dt_ptr + bh)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + h)
    if SOFTPLUS:
        dt = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(tl.minimum(dt, 20.0))))
    decay = tl.exp(dt * tl.load(a_ptr + h))
    x = tl.load(x_ptr + (b * Gx + h // (H // Gx)) * P + offs_p, mask=mask_p, other=0.0).to(tl.float32)
    rows = P
    if MASS:  # a row more, of ones
        x = tl.where(offs_p == P, 1.0, x)
        rows = P + 1
        mask_p = offs_p < rows
    k = tl.load(b_ptr + (b * Gb + h // (H // Gb)) * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    q = tl.load(c_ptr + (b * Gc + h // (H // Gc)) * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    at = state_ptr + (bh * rows + offs_p)[:, None] * N + offs_n[None, :]
    inside = mask_p[:, None] & mask_n[None, :]
    state = tl.load(at, mask=inside, other=0.0) * decay + (dt * x)[:, None] * k[None, :]
    tl.store(at, state, mask=inside)
    y = tl.sum(state * q[None, :], axis=1)
    if HAS_D:
        y += tl.load(d_ptr + h) * x
    tl.store(y_ptr + bh * rows + offs_p, y.to(y_ptr.dtype.element_ty), mask=mask_p)


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments and result of the dispatcher op `linmu::ssd_step`."""
    batch, H, rows, N = state.shape
    y = x.new_empty(batch, H, rows, dtype=torch.float32 if normalize else x.dtype)
    if y.numel():
        block_n = triton.next_power_of_2(N)
        block_p = max(1, min(triton.next_power_of_2(rows), 2048 // block_n))
        _ssd_step_kernel[(batch * H, triton.cdiv(rows, block_p))](
            state, y, x, dt, A, B, C, D, dt_bias, H, x.shape[1], B.shape[1], C.shape[1], x.shape[2], N,
            SOFTPLUS=dt_softplus, HAS_D=D is not None, HAS_BIAS=dt_bias is not None, MASS=normalize, BLOCK_P=block_p,
            BLOCK_N=block_n,
        )  # fmt: skip
    if not normalize:
        return y, y.new_empty(0, dtype=torch.float32)
    y, mass = normalized(y)
    return y.to(x.dtype), mass.log()
