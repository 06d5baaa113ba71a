"""Triton kernel of `ssd_scan_bwd`: step 4 of ssd_scan.py. One program per (chunk, head) does both directions.

The gradient of the log-decay at t is what flows past t: pairs (i, j) on either side of it, the entering state into
later outputs, earlier inputs into the leaving state. Each is summed directly; as a running sum of (arrived - left) it
would be shorter, and lose its digits to cancellation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._visits import token_rows
from .ssd_scan import _exp, _log_decays, _pair_decays, _segments, _state, _tile


@triton.jit
def _direction(
    x, dy, k, q, entering, leaving_grad, dt, a, w, seg, carried, leaving, offs_q, valid, REVERSE: tl.constexpr
):  # fmt: skip
    """Gradients of one direction within one chunk: dx, dk, dq, and per visit ddt, da, dw."""
    log, total = _log_decays(a, REVERSE)
    if REVERSE:
        pairs = (offs_q[:, None] <= offs_q[None, :]) & (seg[:, None] == seg[None, :])
    else:
        pairs = (offs_q[:, None] >= offs_q[None, :]) & (seg[:, None] == seg[None, :])
    pairs = pairs & valid[:, None] & valid[None, :]
    decay = _pair_decays(log, pairs)
    arrive = tl.where(valid & (seg == carried), _exp(log), 0.0)  # from the entering state into output i
    leave = tl.where(valid & (seg == leaving), _exp(total - log), 0.0)  # from input j into the leaving state
    through = tl.where(carried == leaving, _exp(total), 0.0)

    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    values = tl.dot(dy, tl.trans(x), input_precision="ieee")
    flow = decay * scores * values  # (i, j), without dt_j and w_i
    h = entering.to(q.dtype)
    g = leaving_grad.to(q.dtype)
    dy_h = tl.dot(dy, h, input_precision="ieee")  # (Q, N)
    x_g = tl.dot(x, g, input_precision="ieee")  # (Q, N)
    q32, k32 = q.to(tl.float32), k.to(tl.float32)
    from_state = arrive * tl.sum(dy_h * q32, axis=1)
    to_state = leave * tl.sum(x_g * k32, axis=1)

    dw = tl.sum(flow * dt[None, :], axis=1) + from_state
    ddt = tl.sum(flow * w[:, None], axis=0) + to_state
    reached = flow * w[:, None] * dt[None, :]
    past = tl.cumsum(reached, axis=1, reverse=REVERSE) - reached  # (i, t): from inputs visited before t
    if REVERSE:
        reach = offs_q[:, None] <= offs_q[None, :]
    else:
        reach = offs_q[:, None] >= offs_q[None, :]
    da = tl.sum(tl.where(reach, past, 0.0), axis=0)
    into, out_of = w * from_state, dt * to_state
    da += tl.cumsum(into, axis=0, reverse=not REVERSE) + tl.cumsum(out_of, axis=0, reverse=REVERSE) - out_of
    da += through * tl.sum(tl.sum(entering * leaving_grad, axis=1), axis=0)

    weighted = decay * values * w[:, None] * dt[None, :]
    dq = tl.dot(weighted.to(k.dtype), k, input_precision="ieee") + (w * arrive)[:, None] * dy_h
    dk = tl.dot(tl.trans(weighted).to(q.dtype), q, input_precision="ieee") + (dt * leave)[:, None] * x_g
    mixed = decay * scores * w[:, None] * dt[None, :]
    dx = tl.dot(tl.trans(mixed).to(dy.dtype), dy, input_precision="ieee")
    dx += tl.dot(k, tl.trans(g), input_precision="ieee") * (dt * leave)[:, None]
    return dx, dk, dq, ddt, da, dw


@triton.jit
def _store_rows(ptr, rows, h, H, size, value, valid, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(ptr + (rows * H + h)[:, None] * size + offs[None, :], value, mask=valid[:, None] & (offs < size)[None, :])


@triton.jit
def _bwd_kernel(
    dx_ptr, db_ptr, dc_ptr, drb_ptr, drc_ptr, ddt_ptr, da_ptr, dw_ptr, rddt_ptr, rda_ptr, rdw_ptr, dd_ptr,
    dy_ptr, x_ptr, b_ptr, c_ptr, rb_ptr, rc_ptr, d_ptr, dt_ptr, a_ptr, w_ptr, rdt_ptr, ra_ptr, rw_ptr,
    h_ptr, dh_ptr, r_ptr, dr_ptr, order_ptr, seq_ptr, rseq_ptr, length, H, Gx, Gb, Gc, P, N, num_chunks,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, SHARED: tl.constexpr, HAS_W: tl.constexpr, HAS_RW: tl.constexpr,
    HAS_D: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_RSEQ: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    offs_q = tl.arange(0, Q)
    t = c * Q + offs_q
    valid = t < length
    row = bh.to(tl.int64) * length
    index = bh * num_chunks + c
    past = tl.minimum(c * Q + Q, length)
    rows = token_rows(order_ptr, b, t, valid, length, HAS_ORDER)
    x = _tile(x_ptr, rows, h // (H // Gx), Gx, P, valid, BLOCK_P)
    dy = _tile(dy_ptr, rows, h, H, P, valid, BLOCK_P)
    dx = tl.zeros((Q, BLOCK_P), tl.float32)
    dk = tl.zeros((Q, BLOCK_N), tl.float32)
    dq = tl.zeros((Q, BLOCK_N), tl.float32)
    seq_base = b.to(tl.int64) * length
    if FORWARD:
        k = _tile(b_ptr, rows, h // (H // Gb), Gb, N, valid, BLOCK_N)
        q = _tile(c_ptr, rows, h // (H // Gc), Gc, N, valid, BLOCK_N)
        seg, carried = _segments(seq_ptr, b, t, length, c * Q - 1, valid, HAS_SEQ)
        if HAS_SEQ:
            leaving = tl.load(seq_ptr + seq_base + past - 1)
        else:
            leaving = 0
        if HAS_W:
            w = tl.load(w_ptr + row + t, mask=valid, other=0.0)
        else:
            w = tl.full((Q,), 1.0, tl.float32)
        fx, fk, fq, ddt, da, dw = _direction(
            x, dy, k, q, _state(h_ptr, index, P, N, BLOCK_P, BLOCK_N), _state(dh_ptr, index, P, N, BLOCK_P, BLOCK_N),
            tl.load(dt_ptr + row + t, mask=valid, other=0.0), tl.load(a_ptr + row + t, mask=valid, other=0.0),
            w, seg, carried, leaving, offs_q, valid, False,
        )  # fmt: skip
        dx += fx
        dk += fk
        dq += fq
        tl.store(ddt_ptr + row + t, ddt, mask=valid)
        tl.store(da_ptr + row + t, da, mask=valid)
        if HAS_W:
            tl.store(dw_ptr + row + t, dw, mask=valid)
        if not (SHARED and REVERSE):
            _store_rows(db_ptr, rows, h, H, N, dk, valid, BLOCK_N)
            _store_rows(dc_ptr, rows, h, H, N, dq, valid, BLOCK_N)
            dk = tl.zeros((Q, BLOCK_N), tl.float32)
            dq = tl.zeros((Q, BLOCK_N), tl.float32)
    if REVERSE:
        rk = _tile(rb_ptr, rows, h // (H // Gb), Gb, N, valid, BLOCK_N)
        rq = _tile(rc_ptr, rows, h // (H // Gc), Gc, N, valid, BLOCK_N)
        rseg, rcarried = _segments(rseq_ptr, b, t, length, past, valid, HAS_RSEQ)
        if HAS_RSEQ:
            rleaving = tl.load(rseq_ptr + seq_base + c * Q)
        else:
            rleaving = 0
        if HAS_RW:
            rw = tl.load(rw_ptr + row + t, mask=valid, other=0.0)
        else:
            rw = tl.full((Q,), 1.0, tl.float32)
        gx, gk, gq, rddt, rda, rdw = _direction(
            x, dy, rk, rq, _state(r_ptr, index, P, N, BLOCK_P, BLOCK_N),
            _state(dr_ptr, index, P, N, BLOCK_P, BLOCK_N), tl.load(rdt_ptr + row + t, mask=valid, other=0.0),
            tl.load(ra_ptr + row + t, mask=valid, other=0.0), rw, rseg, rcarried, rleaving, offs_q, valid, True,
        )  # fmt: skip
        dx += gx
        dk += gk
        dq += gq
        tl.store(rddt_ptr + row + t, rddt, mask=valid)
        tl.store(rda_ptr + row + t, rda, mask=valid)
        if HAS_RW:
            tl.store(rdw_ptr + row + t, rdw, mask=valid)
        _store_rows(drb_ptr, rows, h, H, N, dk, valid, BLOCK_N)
        _store_rows(drc_ptr, rows, h, H, N, dq, valid, BLOCK_N)
    if HAS_D:
        dy32 = dy.to(tl.float32)
        dx += tl.load(d_ptr + h) * dy32
        tl.store(dd_ptr + row + t, tl.sum(dy32 * x.to(tl.float32), axis=1), mask=valid)
    _store_rows(dx_ptr, rows, h, H, P, dx, valid, BLOCK_P)
