"""Triton kernel of `ssd_scan_bwd`: step 4 of ssd_scan.py. One program per (chunk, head) does both directions.

The gradient of the log-decay at t is what flows past t: pairs (i, j) on either side of it, the entering state into
later outputs, earlier inputs into the leaving state. Each is summed directly: as a running sum of (arrived - left), or
as a sum up to t less t's own term, it would lose its digits to cancellation, and where a compiler fuses the subtraction
with the product before it, a sum of nothing would not be 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._ssd_tiles import _exp, _log_decays, _mass, _over_visits, _pair_decays, _rounded, _segments, _state, _tile
from ._visits import token_rows


@triton.jit
def _direction(
    x, dy, dot, own, k, q, h_ptr, dh_ptr, index, S, P, N, dt, a, w, seg, carried, leaving, offs_q, valid,
    HAS_SEQ: tl.constexpr, REVERSE: tl.constexpr, MASS: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one direction within one chunk: dx, dk, dq, and per visit ddt, da, dw."""
    entering = _state(h_ptr, index, S, P, N, BLOCK_P, BLOCK_N)
    leaving_grad = _state(dh_ptr, index, S, P, N, BLOCK_P, BLOCK_N)
    log, total = _log_decays(a, seg, leaving, HAS_SEQ, REVERSE, Q)
    if REVERSE:
        pairs = (offs_q[:, None] <= offs_q[None, :]) & (seg[:, None] == seg[None, :])
        earlier = offs_q[None, :] > offs_q[:, None]  # (t, j): j is visited before t
    else:
        pairs = (offs_q[:, None] >= offs_q[None, :]) & (seg[:, None] == seg[None, :])
        earlier = offs_q[None, :] < offs_q[:, None]
    pairs = pairs & valid[:, None] & valid[None, :]
    steps, weighs = dt != 0.0, w != 0.0
    live = pairs & steps[None, :] & weighs[:, None]
    arrives = valid & (seg == carried)  # from the entering state into output i
    leaves = valid & (seg == leaving)  # from input j into the leaving state
    decay = _pair_decays(log, pairs)
    arrive, leave = _exp(log), _exp(total - log)

    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    values = tl.dot(dy, tl.trans(x), input_precision="ieee")
    if MASS:
        values = values - dot[:, None] + own[:, None]
    flow = tl.where(pairs, decay * scores * values, 0.0)  # (i, j), without dt_j and w_i
    h, fit_h = _rounded(entering, q, 0)
    g, fit_g = _rounded(leaving_grad, q, 0)
    g_rows, fit_rows = _rounded(leaving_grad, q, 1)
    dy_h = tl.dot(dy, h, input_precision="ieee") * fit_h[None, :]  # (Q, N)
    x_g = tl.dot(x, g, input_precision="ieee") * fit_g[None, :]  # (Q, N)
    through = _exp(total) * tl.sum(tl.sum(entering * leaving_grad, axis=1), axis=0)
    if MASS:
        mass = _mass(h_ptr, index, S, P, N, BLOCK_N)
        mass_grad = _mass(dh_ptr, index, S, P, N, BLOCK_N)
        dy_h += (own - dot)[:, None] * mass[None, :]
        x_g += mass_grad[None, :]
        through += _exp(total) * tl.sum(mass * mass_grad, axis=0)
    k_g = tl.dot(k, tl.trans(g_rows), input_precision="ieee") * fit_rows[None, :]  # (Q, P)
    q32, k32 = q.to(tl.float32), k.to(tl.float32)
    from_state = tl.where(arrives, arrive * tl.sum(dy_h * q32, axis=1), 0.0)
    to_state = tl.where(leaves, leave * tl.sum(x_g * k32, axis=1), 0.0)

    dw = tl.sum(tl.where(steps[None, :], flow * dt[None, :], 0.0), axis=1) + from_state
    ddt = tl.sum(tl.where(pairs & weighs[:, None], flow * w[:, None], 0.0), axis=0) + to_state
    reached = tl.where(live, flow * w[:, None] * dt[None, :], 0.0)
    past = tl.cumsum(reached, axis=0, reverse=not REVERSE)  # (t, j): from j into the outputs at t and after
    da = tl.sum(tl.where(earlier, past, 0.0), axis=1)
    into = tl.where(arrives & weighs, w * from_state, 0.0)
    out_of = tl.where(leaves & steps, dt * to_state, 0.0)
    da += tl.cumsum(into, axis=0, reverse=not REVERSE)
    da += tl.sum(tl.where(earlier, out_of[None, :], 0.0), axis=1)
    da += tl.where(carried == leaving, through, 0.0)

    weighted = tl.where(live, decay * values * w[:, None] * dt[None, :], 0.0)
    mixed = tl.where(live, decay * scores * w[:, None] * dt[None, :], 0.0)
    from_past = (arrives & weighs)[:, None]
    to_future = (leaves & steps)[:, None]
    seen_by = tl.trans(live)
    dq = _over_visits(weighted, k, live) + tl.where(from_past, (w * arrive)[:, None] * dy_h, 0.0)
    dk = _over_visits(tl.trans(weighted), q, seen_by) + tl.where(to_future, (dt * leave)[:, None] * x_g, 0.0)
    dx = _over_visits(tl.trans(mixed), dy, seen_by) + tl.where(to_future, k_g * (dt * leave)[:, None], 0.0)
    return dx, dk, dq, ddt, da, dw


@triton.jit
def _store_rows(ptr, rows, h, H, size, value, valid, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(ptr + (rows * H + h)[:, None] * size + offs[None, :], value, mask=valid[:, None] & (offs < size)[None, :])


@triton.jit(do_not_specialize=["length", "num_chunks"])
def _bwd_kernel(
    dx_ptr, db_ptr, dc_ptr, drb_ptr, drc_ptr, ddt_ptr, da_ptr, dw_ptr, rddt_ptr, rda_ptr, rdw_ptr, dd_ptr,
    dy_ptr, inverse_ptr, dot_ptr, own_ptr, x_ptr, b_ptr, c_ptr, rb_ptr, rc_ptr, d_ptr, dt_ptr, a_ptr, w_ptr, rdt_ptr,
    ra_ptr, rw_ptr, h_ptr, dh_ptr, r_ptr, dr_ptr, order_ptr, seq_ptr, rseq_ptr,
    length, H, Gx, Gb, Gc, P, N, num_chunks, S,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, SHARED: tl.constexpr, HAS_W: tl.constexpr, HAS_RW: tl.constexpr,
    HAS_D: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_RSEQ: tl.constexpr, MASS: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
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
    dot = tl.zeros((Q,), tl.float32)
    own = tl.zeros((Q,), tl.float32)
    if MASS:
        dot = tl.load(dot_ptr + row + t, mask=valid, other=0.0)
        own = tl.load(own_ptr + row + t, mask=valid, other=0.0)
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
            x, dy, dot, own, k, q, h_ptr, dh_ptr, index, S, P, N, tl.load(dt_ptr + row + t, mask=valid, other=0.0),
            tl.load(a_ptr + row + t, mask=valid, other=0.0), w, seg, carried, leaving, offs_q, valid, HAS_SEQ, False,
            MASS, Q, BLOCK_P, BLOCK_N,
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
            x, dy, dot, own, rk, rq, r_ptr, dr_ptr, index, S, P, N,
            tl.load(rdt_ptr + row + t, mask=valid, other=0.0), tl.load(ra_ptr + row + t, mask=valid, other=0.0), rw,
            rseg, rcarried, rleaving, offs_q, valid, HAS_RSEQ, True, MASS, Q, BLOCK_P, BLOCK_N,
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
        skips = tl.sum(dy32 * x.to(tl.float32), axis=1)
        if MASS:
            inverse = tl.load(inverse_ptr + row + t, mask=valid, other=0.0)
            dy32 *= inverse[:, None]
            skips = (skips - dot + own) * inverse
        dx += tl.load(d_ptr + h) * dy32
        tl.store(dd_ptr + row + t, skips, mask=valid)
    _store_rows(dx_ptr, rows, h, H, P, dx, valid, BLOCK_P)
