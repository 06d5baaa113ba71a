"""Triton kernels of `window_attention`: one program per (window, head), tokens read and written where they lie.

Forward is the online softmax over blocks of keys; backward recomputes the weights from the saved log-sum-exp, with one
pass for dq (per query head), one for dk and dv (per key head, over its query heads) and one for the bias. No atomics.
A table entry outside the batch is treated as an absent token: nothing is read or written out of bounds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BIAS_PROGRAMS = 32


@triton.jit
def _window(offsets_ptr, w, num_visual):
    """First entry and number of entries of window w."""
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + w), 0), num_visual)
    end = tl.minimum(tl.maximum(tl.load(offsets_ptr + w + 1), begin), num_visual)
    return begin, end - begin


@triton.jit
def _entries(tokens_ptr, begin, i, count, num_tokens):
    """Flat tokens of entries i of a window (int64), and which are there."""
    token = tl.load(tokens_ptr + begin + i, mask=i < count, other=-1).to(tl.int64)
    there = (token >= 0) & (token < num_tokens)
    return tl.where(there, token, 0), there


@triton.jit
def _rows(ptr, token, there, head, heads, P, BLOCK_P: tl.constexpr):
    offs = tl.arange(0, BLOCK_P)
    at = ptr + (token * heads + head)[:, None] * P + offs[None, :]
    return tl.load(at, mask=there[:, None] & (offs < P)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, token, there, head, heads, P, value, BLOCK_P: tl.constexpr):
    offs = tl.arange(0, BLOCK_P)
    at = ptr + (token * heads + head)[:, None] * P + offs[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=there[:, None] & (offs < P)[None, :])


@triton.jit
def _turned_rows(
    ptr, cos_ptr, sin_ptr, tokens_ptr, begin, i, count, num_tokens, head, heads, P, R, cos_rows,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What `_entries` gives, and their rows with the rotary embedding applied to the first R elements."""
    token, there = _entries(tokens_ptr, begin, i, count, num_tokens)
    x = _rows(ptr, token, there, head, heads, P, BLOCK_P)
    if ROTARY:
        offs = tl.arange(0, BLOCK_P)
        if INTERLEAVED:
            partner = offs ^ 1
            sign = tl.where(offs % 2 == 0, -1.0, 1.0)
        else:
            partner = tl.where(offs < R // 2, offs + R // 2, offs - R // 2)
            sign = tl.where(offs < R // 2, -1.0, 1.0)
        inside = there[:, None] & (offs < R)[None, :]
        other = tl.load(ptr + (token * heads + head)[:, None] * P + partner[None, :], mask=inside, other=0.0)
        angle = (token % cos_rows)[:, None] * R + offs[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
        x = (x.to(tl.float32) * cos + other.to(tl.float32) * sign[None, :] * sin).to(x.dtype)
    return token, there, x


@triton.jit
def _scores(
    q, k, bias_ptr, coords_ptr, begin, i, j, count, head, table, scale, token_i, token_j, there_j,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """scale q k^T + bias, and -inf where there is no key, or, causal, a later one than the query."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_BIAS:
        ci = tl.load(coords_ptr + begin + i, mask=i < count, other=0)
        cj = tl.load(coords_ptr + begin + j, mask=j < count, other=0)
        index = ci[:, None] - cj[None, :] + table // 2
        s += tl.load(bias_ptr + head * table + index, mask=(index >= 0) & (index < table), other=0.0)
    s = tl.where(there_j[None, :], s, -float("inf"))
    if CAUSAL:  # a window's tokens are of one batch row: they compare as positions
        s = tl.where(token_j[None, :] <= token_i[:, None], s, -float("inf"))
    return s


@triton.jit
def _sum_seen(weights, x, seen, CAUSAL: tl.constexpr):
    """weights (i, j) times x (j, P), where weights are 0 that are not `seen`.

    0 times what is not finite is a NaN: such values are left out, and what sees one becomes NaN.
    """
    if not CAUSAL:
        return tl.dot(weights.to(x.dtype), x, input_precision="ieee")
    broken = ~(tl.abs(x.to(tl.float32)) < float("inf"))
    total = tl.dot(weights.to(x.dtype), tl.where(broken, 0.0, x).to(x.dtype), input_precision="ieee")
    if tl.max(tl.max(broken.to(tl.int32), axis=1), axis=0) > 0:
        count = tl.dot(seen.to(tl.float32), broken.to(tl.float32), input_precision="ieee")
        total = tl.where(count > 0.0, float("nan"), total)
    return total


@triton.jit(do_not_specialize=["num_tokens", "num_visual", "cos_rows"])
def _fwd_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, tokens_ptr, offsets_ptr, coords_ptr, bias_ptr, cos_ptr, sin_ptr,
    num_tokens, num_visual, H, G, P, R, cos_rows, table, scale,
    HAS_BIAS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    group = head // (H // G)
    begin, count = _window(offsets_ptr, tl.program_id(0), num_visual)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        token_i, there_i, q = _turned_rows(q_ptr, cos_ptr, sin_ptr, tokens_ptr, begin, i, count, num_tokens,
                                           head, H, P, R, cos_rows, ROTARY, INTERLEAVED, BLOCK_P)  # fmt: skip
        top = tl.full((BLOCK,), -float("inf"), tl.float32)
        norm = tl.zeros((BLOCK,), tl.float32)
        out = tl.zeros((BLOCK, BLOCK_P), tl.float32)
        for start in range(0, count, BLOCK):
            j = start + tl.arange(0, BLOCK)
            token_j, there_j, k = _turned_rows(k_ptr, cos_ptr, sin_ptr, tokens_ptr, begin, j, count, num_tokens,
                                               group, G, P, R, cos_rows, ROTARY, INTERLEAVED, BLOCK_P)  # fmt: skip
            v = _rows(v_ptr, token_j, there_j, group, G, P, BLOCK_P)
            s = _scores(q, k, bias_ptr, coords_ptr, begin, i, j, count, head, table, scale, token_i, token_j,
                        there_j, HAS_BIAS, CAUSAL)  # fmt: skip
            new = tl.maximum(top, tl.max(s, axis=1))
            safe = tl.where(new == -float("inf"), 0.0, new)  # no key yet: exp(-inf - -inf) would be NaN
            p = tl.exp(s - safe[:, None])
            shrink = tl.exp(top - safe)
            norm = norm * shrink + tl.sum(p, axis=1)
            seen = (token_j[None, :] <= token_i[:, None]) & there_j[None, :]
            out = out * shrink[:, None] + _sum_seen(p, v, seen, CAUSAL)
            top = new
        norm_safe = tl.where(norm == 0.0, 1.0, norm)
        _store_rows(out_ptr, token_i, there_i, head, H, P, out / norm_safe[:, None], BLOCK_P)
        tl.store(lse_ptr + (begin + i).to(tl.int64) * H + head, top + tl.log(norm_safe), mask=i < count)


@triton.jit
def _gradient_rows(dout_ptr, delta_ptr, lse_ptr, token, there, begin, i, count, head, H, P, BLOCK_P: tl.constexpr):
    """The gradients of the outputs of entries i, their products with these, and the log-sum-exps."""
    delta = tl.load(delta_ptr + token * H + head, mask=there, other=0.0)
    lse = tl.load(lse_ptr + (begin + i).to(tl.int64) * H + head, mask=i < count, other=0.0)
    return _rows(dout_ptr, token, there, head, H, P, BLOCK_P), delta, lse


@triton.jit
def _weights(
    q, k, v, dout, bias_ptr, coords_ptr, begin, i, j, count, head, table, scale, lse, delta, token_i, token_j,
    there_i, there_j, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Softmax weights p and the gradient of the scores, (i, j); and which are seen."""
    s = _scores(q, k, bias_ptr, coords_ptr, begin, i, j, count, head, table, scale, token_i, token_j, there_j,
                HAS_BIAS, CAUSAL)  # fmt: skip
    seen = there_i[:, None] & there_j[None, :]
    if CAUSAL:
        seen = seen & (token_j[None, :] <= token_i[:, None])
    p = tl.where(seen, tl.exp(s - lse[:, None]), 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    return p, tl.where(seen, p * (dp - delta[:, None]), 0.0), seen


@triton.jit(do_not_specialize=["num_tokens", "num_visual", "cos_rows"])
def _dq_kernel(
    dq_ptr, dout_ptr, delta_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, tokens_ptr, offsets_ptr, coords_ptr, bias_ptr, cos_ptr,
    sin_ptr, num_tokens, num_visual, H, G, P, R, cos_rows, table, scale,
    HAS_BIAS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    group = head // (H // G)
    begin, count = _window(offsets_ptr, tl.program_id(0), num_visual)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        token_i, there_i, q = _turned_rows(q_ptr, cos_ptr, sin_ptr, tokens_ptr, begin, i, count, num_tokens,
                                           head, H, P, R, cos_rows, ROTARY, INTERLEAVED, BLOCK_P)  # fmt: skip
        dout, delta, lse = _gradient_rows(dout_ptr, delta_ptr, lse_ptr, token_i, there_i, begin, i, count,
                                          head, H, P, BLOCK_P)  # fmt: skip
        dq = tl.zeros((BLOCK, BLOCK_P), tl.float32)
        for start in range(0, count, BLOCK):
            j = start + tl.arange(0, BLOCK)
            token_j, there_j, k = _turned_rows(k_ptr, cos_ptr, sin_ptr, tokens_ptr, begin, j, count, num_tokens,
                                               group, G, P, R, cos_rows, ROTARY, INTERLEAVED, BLOCK_P)  # fmt: skip
            v = _rows(v_ptr, token_j, there_j, group, G, P, BLOCK_P)
            _, ds, seen = _weights(q, k, v, dout, bias_ptr, coords_ptr, begin, i, j, count, head, table, scale, lse,
                                   delta, token_i, token_j, there_i, there_j, HAS_BIAS, CAUSAL)  # fmt: skip
            dq += _sum_seen(ds, k, seen, CAUSAL)
        _store_rows(dq_ptr, token_i, there_i, head, H, P, dq * scale, BLOCK_P)


@triton.jit(do_not_specialize=["num_tokens", "num_visual", "cos_rows"])
def _dkv_kernel(
    dk_ptr, dv_ptr, dout_ptr, delta_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, tokens_ptr, offsets_ptr, coords_ptr, bias_ptr,
    cos_ptr, sin_ptr, num_tokens, num_visual, H, G, P, R, cos_rows, table, scale,
    HAS_BIAS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    share = H // G
    begin, count = _window(offsets_ptr, tl.program_id(0), num_visual)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        token_j, there_j, k = _turned_rows(k_ptr, cos_ptr, sin_ptr, tokens_ptr, begin, j, count, num_tokens,
                                           group, G, P, R, cos_rows, ROTARY, INTERLEAVED, BLOCK_P)  # fmt: skip
        v = _rows(v_ptr, token_j, there_j, group, G, P, BLOCK_P)
        dk = tl.zeros((BLOCK, BLOCK_P), tl.float32)
        dv = tl.zeros((BLOCK, BLOCK_P), tl.float32)
        for head in range(group * share, group * share + share):
            for first in range(0, count, BLOCK):
                i = first + tl.arange(0, BLOCK)
                token_i, there_i, q = _turned_rows(q_ptr, cos_ptr, sin_ptr, tokens_ptr, begin, i, count, num_tokens,
                                                   head, H, P, R, cos_rows, ROTARY, INTERLEAVED, BLOCK_P)  # fmt: skip
                dout, delta, lse = _gradient_rows(dout_ptr, delta_ptr, lse_ptr, token_i, there_i, begin, i, count,
                                                  head, H, P, BLOCK_P)  # fmt: skip
                p, ds, seen = _weights(q, k, v, dout, bias_ptr, coords_ptr, begin, i, j, count, head, table, scale, lse,
                                       delta, token_i, token_j, there_i, there_j, HAS_BIAS, CAUSAL)  # fmt: skip
                dk += _sum_seen(tl.trans(ds), q, tl.trans(seen), CAUSAL)
                dv += _sum_seen(tl.trans(p), dout, tl.trans(seen), CAUSAL)
        _store_rows(dk_ptr, token_j, there_j, group, G, P, dk * scale, BLOCK_P)
        _store_rows(dv_ptr, token_j, there_j, group, G, P, dv, BLOCK_P)


@triton.jit(do_not_specialize=["num_tokens", "num_visual", "cos_rows", "num_windows"])
def _dbias_kernel(
    dbias_ptr, dout_ptr, delta_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, tokens_ptr, offsets_ptr, coords_ptr, bias_ptr,
    cos_ptr, sin_ptr, num_tokens, num_visual, H, G, P, R, cos_rows, table, scale, num_windows,
    HAS_BIAS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums the score gradients of every BIAS_PROGRAMS-th window into a table of this program's own."""
    part, head = tl.program_id(0), tl.program_id(1)
    group = head // (H // G)
    own = dbias_ptr + (part.to(tl.int64) * H + head) * table
    for w in range(part, num_windows, tl.num_programs(0)):
        begin, count = _window(offsets_ptr, w, num_visual)
        for start in range(0, count, BLOCK):
            j = start + tl.arange(0, BLOCK)
            token_j, there_j, k = _turned_rows(k_ptr, cos_ptr, sin_ptr, tokens_ptr, begin, j, count, num_tokens,
                                               group, G, P, R, cos_rows, ROTARY, INTERLEAVED, BLOCK_P)  # fmt: skip
            v = _rows(v_ptr, token_j, there_j, group, G, P, BLOCK_P)
            cj = tl.load(coords_ptr + begin + j, mask=j < count, other=0)
            # One query at a time: its keys fall on distinct table entries, so the additions cannot meet.
            for row in range(count):
                i = row + tl.zeros((1,), tl.int32)
                token_i, there_i, q = _turned_rows(q_ptr, cos_ptr, sin_ptr, tokens_ptr, begin, i, count, num_tokens,
                                                   head, H, P, R, cos_rows, ROTARY, INTERLEAVED, BLOCK_P)  # fmt: skip
                dout, delta, lse = _gradient_rows(dout_ptr, delta_ptr, lse_ptr, token_i, there_i, begin, i, count,
                                                  head, H, P, BLOCK_P)  # fmt: skip
                ci = tl.load(coords_ptr + begin + i)
                index = ci - cj + table // 2
                here = there_j & (index >= 0) & (index < table)
                if CAUSAL:
                    here &= token_j <= token_i
                s = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale
                s += tl.load(bias_ptr + head * table + index, mask=here, other=0.0)
                p = tl.where(here, tl.exp(s - lse), 0.0)
                ds = p * (tl.sum(dout.to(tl.float32) * v.to(tl.float32), axis=1) - delta)
                tl.debug_barrier()
                tl.store(own + index, tl.load(own + index, mask=here, other=0.0) + ds, mask=here)
                tl.debug_barrier()


class _Call:
    """Contiguous inputs, sizes and flags shared by the kernels of one call."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, offsets: Tensor, coords: Tensor | None,
        window: list[int], scale: float, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
        causal: bool,
    ) -> None:  # fmt: skip
        B, L, self.H, P = q.shape
        self.G, self.num_windows = k.shape[2], max(offsets.shape[0] - 1, 0)
        rotary = cos is not None and sin is not None
        R = cos.shape[2] if cos is not None else 0
        cos_rows = L if cos is None or cos.shape[0] == 1 else B * L
        table = 0 if bias is None else bias[0].numel()
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        c = lambda t: None if t is None else t.contiguous()  # noqa: E731
        self.tail = (
            self.q, self.k, self.v, tokens.contiguous(), offsets.contiguous(), c(coords), c(bias), c(cos), c(sin),
            B * L, tokens.shape[0], self.H, self.G, P, R, max(cos_rows, 1), table, scale,
        )  # fmt: skip
        most = max(1, window[0] * window[1] * window[2])
        self.flags: dict[str, Any] = dict(
            HAS_BIAS=bias is not None, ROTARY=rotary, INTERLEAVED=interleaved, CAUSAL=causal,
            BLOCK=max(16, min(64, triton.next_power_of_2(most))), BLOCK_P=max(16, triton.next_power_of_2(P)),
        )  # fmt: skip


def window_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results of the dispatcher op `linmu::window_attention`."""
    call = _Call(q, k, v, tokens, *args)
    out = torch.zeros_like(call.q)
    lse = torch.empty(tokens.shape[0], call.H, dtype=torch.float32, device=q.device)
    if out.numel() and tokens.numel():
        _fwd_kernel[(call.num_windows, call.H)](out, lse, *call.tail, **call.flags)
    return out, lse


def _turn_back(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The adjoint of the rotary embedding."""
    R = cos.shape[-1]
    turned, rest = grad[..., :R], grad[..., R:]
    scaled = turned * sin[:, :, None]
    if interleaved:
        partner = torch.stack((scaled[..., 1::2], -scaled[..., 0::2]), dim=-1).flatten(-2)
    else:
        a, b = scaled.chunk(2, dim=-1)
        partner = torch.cat((b, -a), dim=-1)
    return torch.cat((turned * cos[:, :, None] + partner, rest), dim=-1)


def window_attention_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tokens: Tensor, offsets: Tensor, coords: Tensor | None, window: list[int], scale: float, bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and results of the dispatcher op `linmu::window_attention_bwd`."""
    call = _Call(q, k, v, tokens, offsets, coords, window, scale, bias, cos, sin, interleaved, causal)
    dout = grad_out.contiguous()
    delta = (dout.float() * out.float()).sum(-1).contiguous()
    dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v))
    dbias = q.new_empty(0, dtype=torch.float32)
    work = bool(q.numel() and tokens.numel())
    if work and grad_lse is not None:
        # The log-sum-exp's gradient by a score is the score's weight, as delta's factor is.
        rows = delta.flatten(0, 1)  # a view
        there = (tokens >= 0) & (tokens < len(rows))
        rows.index_add_(0, torch.where(there, tokens, 0), grad_lse.where(there[:, None], 0.0), alpha=-1)
    if work:
        _dq_kernel[(call.num_windows, call.H)](dq, dout, delta, lse, *call.tail, **call.flags)
        _dkv_kernel[(call.num_windows, call.G)](dk, dv, dout, delta, lse, *call.tail, **call.flags)
    if bias is not None:
        parts = torch.zeros(BIAS_PROGRAMS, *bias.shape, dtype=torch.float32, device=q.device)
        if work:
            _dbias_kernel[(BIAS_PROGRAMS, call.H)](parts, dout, delta, lse, *call.tail, call.num_windows, **call.flags)
        dbias = parts.sum(0)
    if cos is not None and sin is not None:
        dq, dk = (_turn_back(g, cos, sin, interleaved) for g in (dq, dk))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias
