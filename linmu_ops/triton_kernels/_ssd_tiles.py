"""What the kernels of a scan, forward and backward, do with the tiles of a chunk."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log_decays(a, seg, leaving, HAS_SEQ: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr):
    """Sums of log-decays from where each visit's segment begins, and over the segment that leaves; float64.

    exp(-200) is 0 in float32: a steeper step forgets no less, and would drown the sums' other terms.
    """
    wide = a.to(tl.float64)
    wide = tl.where(wide < -200.0, -200.0, tl.where(wide > 200.0, 200.0, wide))
    if HAS_SEQ:
        at = tl.arange(0, Q)
        if REVERSE:
            since = at[:, None] <= at[None, :]
        else:
            since = at[:, None] >= at[None, :]
        log = tl.sum(tl.where(since & (seg[:, None] == seg[None, :]), wide[None, :], 0.0), axis=1)
        total = tl.sum(tl.where(seg == leaving, wide, 0.0), axis=0)
    else:
        log = tl.cumsum(wide, axis=0, reverse=REVERSE)
        total = tl.sum(wide, axis=0)
    return log, total


@triton.jit
def _pair_decays(log, pairs):
    """exp(log_i - log_j) where pairs, 0 elsewhere: (Q, Q)."""
    high = log.to(tl.float32)
    low = (log - high.to(tl.float64)).to(tl.float32)
    diff = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.where(pairs, tl.exp(tl.where(pairs, diff, 0.0)), 0.0)


@triton.jit
def _exp(log):
    return tl.exp(log.to(tl.float32))


@triton.jit
def _rounded(value, like, AXIS: tl.constexpr):
    """`value` in the type of `like`, and by which powers of two it was divided, per slice, for float16 to hold it."""
    fit = tl.sum(tl.zeros_like(value), axis=AXIS) + 1.0
    if like.dtype == tl.float16:
        size = tl.abs(value)
        most = tl.max(tl.where(size < float("inf"), size, 0.0), axis=AXIS)
        large = most > 16384.0
        fit = tl.where(large, tl.exp2(tl.floor(tl.log2(tl.where(large, most, 1.0))) - 14.0), 1.0)
        if AXIS == 0:
            value = value / fit[None, :]
        else:
            value = value / fit[:, None]
    return value.to(like.dtype), fit


@triton.jit
def _over_visits(weights, x, seen):
    """weights @ x, float32; an element of x that is not finite makes NaN where it is seen, and nothing elsewhere."""
    size = tl.abs(x)
    odd = (x != x) | (size == float("inf"))
    rows, fit = _rounded(weights, x, 1)
    out = tl.dot(rows, tl.where(odd, 0.0, x).to(x.dtype), input_precision="ieee") * fit[:, None]
    if tl.max(tl.max(odd.to(tl.int32), axis=1), axis=0) > 0:
        reached = tl.dot(seen.to(tl.float16), odd.to(tl.float16))
        out = tl.where(reached > 0.0, float("nan"), out)
    return out


@triton.jit
def _tile(ptr, rows, group, groups, size, valid, BLOCK: tl.constexpr):
    """Rows of a (B L, groups, size) tensor for one group: (Q, BLOCK)."""
    offs = tl.arange(0, BLOCK)
    return tl.load(
        ptr + (rows * groups + group)[:, None] * size + offs[None, :],
        mask=valid[:, None] & (offs < size)[None, :],
        other=0.0,
    )


@triton.jit
def _state(ptr, index, S, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """One (P, N) state of a stack, S elements from one to the next."""
    offs_p, offs_n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    return tl.load(
        ptr + index.to(tl.int64) * S + offs_p[:, None] * N + offs_n[None, :],
        mask=(offs_p < P)[:, None] & (offs_n < N)[None, :],
        other=0.0,
    )


@triton.jit
def _mass(ptr, index, S, P, N, BLOCK_N: tl.constexpr):
    """The row of that state which belongs to the mass: (BLOCK_N,)."""
    offs_n = tl.arange(0, BLOCK_N)
    return tl.load(ptr + index.to(tl.int64) * S + P * N + offs_n, mask=offs_n < N, other=0.0)


@triton.jit
def _segments(seq_ptr, b, t, length, edge, valid, HAS_SEQ: tl.constexpr):
    """Segment of each visit, and the segment of the carried-in state (that of visit `edge`; 0 beyond the ends)."""
    if HAS_SEQ:
        base = seq_ptr + b.to(tl.int64) * length
        seg = tl.load(base + t, mask=valid, other=-1)
        carried = tl.load(base + edge, mask=(edge >= 0) & (edge < length), other=0)
    else:
        seg = tl.zeros_like(t)
        carried = 0
    return seg, carried
