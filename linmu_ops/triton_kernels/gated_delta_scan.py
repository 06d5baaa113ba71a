"""Triton kernels of `gated_delta_scan`: the recurrence, visit by visit, one program per (batch, head, slice of V).

The columns of a state do not meet, so a program keeps its slice of the state in registers. All around the recurrence,
orders, masks, norms and gates, is the reference's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _autograd
from ..gated_delta_scan import ARGUMENTS, DIFFERENTIABLE
from ..reference.gated_delta_scan import gated_delta_scan as around

CHUNK = 32  # visits between two states that the gradient keeps
ELEMENTS = 4096  # of a slice of a state


@triton.jit
def _visit(q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, restart_ptr, keep_ptr, b, h, t, offs_k, offs_v, H, L, K, V):
    """The row of a visit among those of all heads, and what it brings."""
    row = b * L + t
    at = row * H + h
    new = tl.load(restart_ptr + row) != 0
    on = tl.load(keep_ptr + row) != 0
    q = tl.load(q_ptr + at * K + offs_k, mask=offs_k < K, other=0.0)
    k = tl.load(k_ptr + at * K + offs_k, mask=offs_k < K, other=0.0)
    v = tl.load(v_ptr + at * V + offs_v, mask=offs_v < V, other=0.0)
    decay = tl.where(new, 0.0, tl.exp(tl.load(g_ptr + at)))
    return at, new, on, q, k, v, decay, tl.load(beta_ptr + at)


@triton.jit
def _move(state, new, k, v, decay, beta):
    """The decayed state, v - k S', and the state after the visit."""
    held = tl.where(new, 0.0, state * decay)
    error = v - tl.where(new, 0.0, tl.sum(k[:, None] * held, axis=0))
    return held, error, held + k[:, None] * (beta * error)[None, :]


@triton.jit(do_not_specialize=["L", "chunks"])
def _forward_kernel(
    y_ptr, final_ptr, kept_ptr, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, restart_ptr, keep_ptr, state_ptr, H, L, K, V,
    chunks, KEEPS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    offs_k, offs_v = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    at_state = offs_k[:, None] * V + offs_v[None, :]
    state = tl.load(state_ptr + bh * K * V + at_state, mask=inside, other=0.0)
    for t in range(0, L):
        if KEEPS:  # noqa: SIM102  # known when it is compiled; the other is not
            if t % CHUNK == 0:
                tl.store(kept_ptr + (bh * chunks + t // CHUNK) * K * V + at_state, state, mask=inside)
        at, new, on, q, k, v, decay, beta = _visit(
            q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, restart_ptr, keep_ptr, b, h, t, offs_k, offs_v, H, L, K, V
        )
        _, _, moved = _move(state, new, k, v, decay, beta)
        state = tl.where(on, moved, tl.where(new, 0.0, state))
        y = tl.where(on, tl.sum(q[:, None] * moved, axis=0), 0.0)
        tl.store(y_ptr + at * V + offs_v, y, mask=offs_v < V)
    tl.store(final_ptr + bh * K * V + at_state, state, mask=inside)


@triton.jit(do_not_specialize=["L", "chunks", "rows"])
def _bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, dg_ptr, dbeta_ptr, dstate_ptr, dy_ptr, dfinal_ptr, kept_ptr, scratch_ptr, q_ptr, k_ptr,
    v_ptr, g_ptr, beta_ptr, restart_ptr, keep_ptr, H, L, K, V, chunks, rows, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    part = tl.program_id(1).to(tl.int64)
    offs_k, offs_v = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    at_state = offs_k[:, None] * V + offs_v[None, :]
    adjoint = tl.load(dfinal_ptr + bh * K * V + at_state, mask=inside, other=0.0)
    for back in range(0, chunks):
        first = (chunks - 1 - back) * CHUNK
        count = tl.minimum(CHUNK, L - first)
        state = tl.load(kept_ptr + (bh * chunks + chunks - 1 - back) * K * V + at_state, mask=inside, other=0.0)
        for i in range(0, count):
            tl.store(scratch_ptr + (bh * CHUNK + i) * K * V + at_state, state, mask=inside)
            at, new, on, q, k, v, decay, beta = _visit(
                q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, restart_ptr, keep_ptr, b, h, first + i, offs_k, offs_v, H, L, K, V
            )
            held, error, moved = _move(state, new, k, v, decay, beta)
            state = tl.where(on, moved, tl.where(new, 0.0, state))
        tl.debug_barrier()
        for j in range(0, count):
            i = count - 1 - j
            at, new, on, q, k, v, decay, beta = _visit(
                q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, restart_ptr, keep_ptr, b, h, first + i, offs_k, offs_v, H, L, K, V
            )
            state = tl.load(scratch_ptr + (bh * CHUNK + i) * K * V + at_state, mask=inside, other=0.0)
            held, error, moved = _move(state, new, k, v, decay, beta)
            dy = tl.where(on, tl.load(dy_ptr + at * V + offs_v, mask=offs_v < V, other=0.0), 0.0)
            whole = adjoint + tl.where(on, q[:, None] * dy[None, :], 0.0)
            at_key = tl.sum(k[:, None] * whole, axis=0)
            dv = beta * at_key
            forgot = tl.where(new, 0.0, tl.sum(held * dv[None, :], axis=1))
            dk = tl.sum(whole * (beta * error)[None, :], axis=1) - forgot
            before = whole - k[:, None] * dv[None, :]
            dg = tl.where(new, 0.0, tl.sum(tl.sum(before * held, axis=1), axis=0))
            dbeta = tl.sum(at_key * error, axis=0)
            dq = tl.sum(moved * dy[None, :], axis=1)
            row = part * rows + at
            tl.store(dq_ptr + row * K + offs_k, tl.where(on, dq, 0.0), mask=offs_k < K)
            tl.store(dk_ptr + row * K + offs_k, tl.where(on, dk, 0.0), mask=offs_k < K)
            tl.store(dv_ptr + at * V + offs_v, tl.where(on, dv, 0.0), mask=offs_v < V)
            tl.store(dg_ptr + row, tl.where(on, dg, 0.0))
            tl.store(dbeta_ptr + row, tl.where(on, dbeta, 0.0))
            adjoint = tl.where(new, 0.0, tl.where(on, before * decay, adjoint))
        tl.debug_barrier()
    tl.store(dstate_ptr + bh * K * V + at_state, adjoint, mask=inside)


class _Walk(torch.autograd.Function):
    """`recurrence` of the reference: (q, k, v, g, beta, restart, keep, state) -> (y, state)."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        given = tuple(t.contiguous() for t in given)
        ctx.save_for_backward(*given)
        return _run(given, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        q, _, v, g, *_, state = given
        (B, L, H, K), V = q.shape, v.shape[3]
        chunks, (block_k, block_v) = triton.cdiv(L, CHUNK), _blocks(K, V)
        parts = triton.cdiv(V, block_v)
        kept, scratch = (state.new_empty(B * H, n, K, V) for n in (chunks, CHUNK))
        _run(given, kept)
        dq, dk = (q.new_zeros(parts, *q.shape) for _ in range(2))
        dg, dbeta = (g.new_zeros(parts, *g.shape) for _ in range(2))
        dv, dstate = torch.zeros_like(v), torch.empty_like(state)
        if state.numel():
            _bwd_kernel[(B * H, parts)](
                dq, dk, dv, dg, dbeta, dstate, dy.contiguous(), dfinal.contiguous(), kept, scratch, *given[:-1], H, L,
                K, V, chunks, B * L * H, CHUNK=CHUNK, BLOCK_K=block_k, BLOCK_V=block_v,
            )  # fmt: skip
        return dq.sum(0), dk.sum(0), dv, dg.sum(0), dbeta.sum(0), None, None, dstate


def _blocks(K: int, V: int) -> tuple[int, int]:
    block_k = triton.next_power_of_2(max(K, 1))
    return block_k, max(1, min(triton.next_power_of_2(max(V, 1)), ELEMENTS // block_k))


def _run(given: tuple[Tensor, ...], kept: Tensor | None) -> tuple[Tensor, Tensor]:
    q, _, v, *_, state = given
    (B, L, H, K), V = q.shape, v.shape[3]
    y, final = torch.empty_like(v), torch.empty_like(state)
    if state.numel():
        block_k, block_v = _blocks(K, V)
        _forward_kernel[(B * H, triton.cdiv(V, block_v))](
            y, final, kept, *given, H, L, K, V, triton.cdiv(L, CHUNK), KEEPS=kept is not None, CHUNK=CHUNK,
            BLOCK_K=block_k, BLOCK_V=block_v,
        )  # fmt: skip
    else:
        y.zero_()
    return y, final


def _walk(*given: Tensor) -> tuple[Tensor, Tensor]:
    y, final = _Walk.apply(*given)
    return y, final


_scan = functools.partial(around, walk=_walk)


def gated_delta_scan(*args: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results of the dispatcher op `linmu::gated_delta_scan`."""
    with torch.no_grad():
        return _scan(*args)


def gated_delta_scan_bwd(grad_y: Tensor, grad_final_state: Tensor | None, *args: Any) -> list[Tensor]:
    """Arguments and results of the dispatcher op `linmu::gated_delta_scan_bwd`."""
    inputs = (*args[:-1], grad_final_state is not None, args[-1])
    wrt = [ARGUMENTS.index(name) for name in DIFFERENTIABLE]
    return _autograd.gradients(_scan, inputs, wrt, (grad_y, grad_final_state))
