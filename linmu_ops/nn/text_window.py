"""Causal softmax attention of text over the tokens before it, and the attention that all text has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _transforms
from .._dims import accumulate_dtype, autocasts, without_autocast
from ._inputs import take


def finite(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, n, G, P), 0 at a token with one that is not finite, and which those are, (B, n) uint8.

    A mask does not keep NaN and Inf from the tokens that do not see them, for a weight of 0 times NaN is NaN.
    """
    broken = ~(k.isfinite() & v.isfinite()).flatten(-2).all(-1)
    at = broken[..., None, None]
    # As numbers: PyTorch 2.13's compiler cannot join masks on a CPU.
    return k.masked_fill(at, 0), v.masked_fill(at, 0), broken.byte()


def as_ring(last: Tensor, seen: Tensor) -> Tensor:
    """(B, G, w, P), token i of a row at i % w, of its last w tokens (B, w, G, P), oldest first, after `seen` (B,)."""
    at = (torch.arange(last.shape[1], device=last.device) - seen[:, None]) % last.shape[1]
    return take(last, at).transpose(1, 2).contiguous()


def from_ring(ring: Tensor, seen: Tensor) -> Tensor:
    """(B, w, G, P), the other way round; the first of them are of no token where fewer than w were seen."""
    ring = ring.transpose(1, 2)
    return take(ring, (torch.arange(ring.shape[1], device=ring.device) + seen[:, None]) % ring.shape[1])


def causal_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    window: int,
    scale: float,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    filled: Tensor | None = None,
    chosen: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of each token over the last `window` tokens, itself included; linear in L.

    q (B, L, H, P), k, v (B, L, G, P), valid (B, L) bool: not padding; keys, values (B, window, G, P) and filled
    (B, window): the tokens before. Chunks of `chunk_size(window)` queries meet the keys of as many tokens before as any
    of them sees; chosen (n,) int64: those chunks that do, row after row, the others give 0. seq_idx (B, L): the
    sequences of a row, which do not see each other.
    """
    batch, length, heads, _ = q.shape
    if not batch * length:
        return torch.zeros_like(q)
    size = chunk_size(window)
    chunks, reach = -(-length // size), -(-window // size) * size
    pad, within = chunks * size - length, None
    if torch.compiler.is_exporting():
        # A length that is a symbol: neither the sign of a padding nor a single chunk may be asked for. The last token,
        # repeated, fills up to two chunks more, which no other sees.
        chunks, pad, within = length // size + 2, 0, torch.arange(length, device=q.device)
        whole = torch.arange(chunks * size, device=q.device).clamp(max=length - 1)
        q, k, v, valid = (t.index_select(1, whole) for t in (q, k, v, valid))
        seq_idx = None if seq_idx is None else seq_idx.index_select(1, whole)
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).reshape(batch * chunks, size, heads, q.shape[3])
    every = torch.arange(batch * chunks, device=q.device) if chosen is None else chosen
    first = every // chunks * (reach + chunks * size) + every % chunks * size
    at = first[:, None] + torch.arange(reach + size, device=q.device)

    def around(t: Tensor, before: Tensor | None = None) -> Tensor:
        """(n, reach + size, ...): from `reach` tokens before a chunk to its end."""
        before = t.new_zeros(batch, window, *t.shape[2:]) if before is None else before
        ends = (t.new_zeros(batch, n, *t.shape[2:]) for n in (reach - window, pad))
        return torch.cat((next(ends), before, t, next(ends)), dim=1).flatten(0, 1)[at]

    behind = torch.arange(size, device=q.device)[:, None] + reach - torch.arange(reach + size, device=q.device)
    mask = ((behind >= 0) & (behind < window)) & around(valid, filled)[:, None]
    if seq_idx is not None:
        mine = F.pad(seq_idx, (0, pad)).reshape(batch * chunks, size)[every]
        mask = mask & (mine[..., None] == around(seq_idx)[:, None])
    # A query sees itself even where it is padding: a row with no key at all would be NaN.
    mask = mask | (behind == 0)
    own, earlier = finite(k, v), None if keys is None or values is None else finite(keys, values)
    k, v, broken = (around(t, None if earlier is None else earlier[i]) for i, t in enumerate(own))
    y = attend(q if chosen is None else q[chosen], k, v, mask, scale)
    poisoned = (mask & broken.bool()[:, None]).any(-1)[..., None]
    y = y.masked_fill(poisoned[..., None], torch.nan)
    if chosen is not None:
        y = y.new_zeros(batch * chunks, *y.shape[1:]).index_copy(0, chosen, y)
    # Not a view: kernels differ in the strides of what they return.
    y = y.reshape(batch, chunks * size, *y.shape[2:])
    return y[:, :length] if within is None else y.index_select(1, within)


def chunk_size(window: int) -> int:
    """Queries that meet the same keys."""
    return min(window, 64)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention by PyTorch's own kernels: queries (N, I, H, P) to keys and values (N, J, G, P), mask (N, I, J) bool."""
    if not torch.compiler.is_dynamo_compiling() and _transforms.active():
        return _differentiable(q, k, v, mask, scale)[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same with the log-sum-exp of the scores, in the accumulate dtype."""
    if autocasts(q.device) and q.dtype != torch.float64:  # which autocast leaves as it is
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    if not torch.compiler.is_dynamo_compiling() and _transforms.active():
        return _differentiable(q, k, v, mask, scale)
    if torch.is_grad_enabled():
        return _AttendWithLse.apply(q, k, v, mask, scale)
    return _attend_with_lse(q, k, v, mask, scale)


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, mask, scale)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    y = _product(weights.to(v.dtype).flatten(2, 3), v.transpose(1, 2)).div_(total.flatten(2, 3)).to(v.dtype)
    return _ungrouped(y, q), (top + total.log())[..., 0].transpose(1, 2).flatten(2)


def _differentiable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_attend_with_lse` as often as asked, and forwards: PyTorch keeps scores and weights for it."""
    acc = accumulate_dtype(q.dtype)
    with without_autocast(q.device):
        scores = _grouped(q, k.shape[2]).to(acc) @ k.permute(0, 2, 3, 1).to(acc) * scale
        scores = scores.unflatten(2, (q.shape[1], -1)).masked_fill(~mask[:, None, :, None], -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().to(v.dtype).to(acc)
        y = (weights.flatten(2, 3) @ v.transpose(1, 2).to(acc)).to(v.dtype)
    return _ungrouped(y, q), lse.transpose(1, 2).flatten(2)


class _AttendWithLse(torch.autograd.Function):
    """Keeps neither scores nor weights, of which a query has as many as its window has keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        y, lse = _attend_with_lse(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, mask, lse)
        ctx.scale = scale
        return y, lse

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            _, pull = torch.func.vjp(lambda a, b, c: _differentiable(a, b, c, mask, ctx.scale), q, k, v)[:2]
            return (*pull((dy, dlse)), None, None)
        groups = k.shape[2]
        lse, dlse = (t.unflatten(2, (groups, t.shape[2] // groups)).transpose(1, 2) for t in (lse, dlse))
        weights = _scores(q, k, mask, ctx.scale).sub_(lse[..., None]).exp_()
        dy = _grouped(dy, groups)
        dweights = _product(dy, v.permute(0, 2, 3, 1)).view_as(weights)
        dscores = dweights.mul_(weights)
        dscores = dscores.addcmul_(weights, (dlse - dscores.sum(-1))[..., None]).to(q.dtype).flatten(2, 3)
        dq = _ungrouped(_product(dscores, k.transpose(1, 2)) * ctx.scale, q)
        dk = _product(dscores.mT, _grouped(q, groups)).transpose(1, 2) * ctx.scale
        dv = _product(weights.to(v.dtype).flatten(2, 3).mT, dy).transpose(1, 2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _grouped(t: Tensor, groups: int) -> Tensor:
    """(N, I, H, P) to (N, G, I H/G, P): the rows that meet the same keys."""
    return t.unflatten(2, (groups, t.shape[2] // groups)).transpose(1, 2).flatten(2, 3)


def _ungrouped(t: Tensor, q: Tensor) -> Tensor:
    """(N, G, I H/G, P) to (N, I, H, P), as q is."""
    return t.unflatten(2, (q.shape[1], -1)).transpose(1, 2).flatten(2, 3)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit matrices, not rounded to their dtype: in the accumulate dtype. Has no gradient."""
    acc = accumulate_dtype(a.dtype)
    if torch.compiler.is_exporting():
        # Where rows come first, the size of each part must be shown to divide that of the whole; rows may be a symbol.
        a, b = (t.to(acc).transpose(0, 1) for t in (a, b))
        with without_autocast(a.device):
            return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, (a.shape[0], -1)).transpose(0, 1)
    if a.dtype == acc:
        return a @ b
    with without_autocast(a.device):
        if a.device.type == "cuda" and torch.version.hip is None and not torch.compiler.is_compiling():
            return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=acc).unflatten(0, a.shape[:2])
        return a.to(acc) @ b.to(acc)


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(N, G, I, H/G, J), accumulate dtype; -inf where the mask is False."""
    scores = _product(_grouped(q, k.shape[2]), k.permute(0, 2, 3, 1)).mul_(scale)
    return scores.unflatten(2, (q.shape[1], -1)).masked_fill_(~mask[:, None, :, None], -torch.inf)
