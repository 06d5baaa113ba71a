"""Definition of `linmu_ops.window_attention`: gather each window, softmax(scale q k^T + bias) v, put it back."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .._dims import accumulate_dtype

FEW = 16  # queries of a causal window at a time


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: (B, L, H, P); cos, sin: (B or 1, L, R). Turns the first R elements of each head, R even."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        partner = torch.cat((-b, a), dim=-1)
    return torch.cat((turned * cos[:, :, None] + partner * sin[:, :, None], rest), dim=-1)


def _check(tokens: Tensor, offsets: Tensor, coords: Tensor | None, num_tokens: int, centre: int | None) -> None:
    def require(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"window_attention: {what}")

    ends = offsets.tolist()
    require(bool(ends) and ends[0] == 0, "offsets must start with 0")
    require(ends == sorted(ends), "offsets must not decrease")
    require(ends[-1] == len(tokens), f"offsets must end with {len(tokens)}, the number of tokens")
    require(bool(((tokens >= 0) & (tokens < num_tokens)).all()), f"tokens must be in 0..{num_tokens - 1}")
    require(len(tokens.unique()) == len(tokens), "tokens must hold each token at most once")
    if centre is not None:
        require(coords is not None, "bias needs coords")
        require(coords is None or bool(((coords >= 0) & (coords <= centre)).all()), f"coords must be in 0..{centre}")


def _biased(scores: Tensor, table: Tensor | None, queries: Tensor | None, keys: Tensor | None) -> Tensor:
    """Of (H, i, j) scores."""
    if table is None or queries is None or keys is None:
        return scores
    return scores + table[:, queries[:, None] - keys + table.shape[1] // 2]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, table: Tensor | None, coords: Tensor | None, at: Tensor
) -> tuple[Tensor, Tensor]:
    """Of a window's q (n, G, H / G, P), k and v (n, G, P): out, as q, and the log-sum-exps (n, H)."""
    scores = _biased(torch.einsum("igrp,jgp->grij", q, k).flatten(0, 1) * scale, table, coords, coords)
    weights = scores.softmax(-1).unflatten(0, q.shape[1:3])
    return torch.einsum("grij,jgp->igrp", weights, v), scores.logsumexp(-1).T


def _attend_to_earlier(
    q: Tensor, k: Tensor, v: Tensor, scale: float, table: Tensor | None, coords: Tensor | None, at: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, of each query with the keys at its position or before.

    0 times what is not finite is a NaN, in a gradient too: keys that no query of a few sees are left out of their
    products, and among the few themselves what is not seen is taken out pair by pair.
    """
    order = at.argsort()
    q, k, v = q[order], k[order], v[order]
    c = None if coords is None else coords[order]
    outs, norms = [], []
    for first in range(0, len(at), FEW):
        few, before = slice(first, min(first + FEW, len(at))), slice(0, first)
        m = few.stop - first
        seen = torch.ones(m, m, dtype=torch.bool, device=q.device).tril()  # (i, j)
        q_pairs = torch.where(seen[:, :, None, None, None], q[few][:, None], 0.0)
        k_pairs, v_pairs = (torch.where(seen[:, :, None, None], t[few], 0.0) for t in (k, v))
        earlier = torch.einsum("igrp,jgp->grij", q[few], k[before])
        own = torch.einsum("ijgrp,ijgp->grij", q_pairs, k_pairs)
        scores = torch.cat((earlier, own), -1).flatten(0, 1) * scale
        if c is not None:
            scores = _biased(scores, table, c[few], c[: few.stop])
        hidden = torch.cat((seen.new_zeros(m, first), ~seen), 1)
        scores = scores.masked_fill(hidden, -math.inf)
        weights = scores.softmax(-1).unflatten(0, q.shape[1:3])
        of_earlier = torch.einsum("grij,jgp->igrp", weights[..., :first], v[before])
        outs.append(of_earlier + torch.einsum("grij,ijgp->igrp", weights[..., first:], v_pairs))
        norms.append(scores.logsumexp(-1).T)
    back = order.argsort()
    return torch.cat(outs)[back], torch.cat(norms)[back]


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, offsets: Tensor, coords: Tensor | None, window: list[int],
    scale: float, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = accumulate_dtype(q.dtype)
    heads, groups = q.shape[2], k.shape[2]
    table = None if bias is None else bias.to(acc).flatten(1)  # (H, bias_size)
    centre = None if table is None else table.shape[1] // 2
    _check(tokens, offsets, coords, q.shape[0] * q.shape[1], centre)
    q_, k_, v_ = q.to(acc), k.to(acc), v.to(acc)
    if cos is not None and sin is not None:
        q_, k_ = (rotate(t, cos, sin, interleaved).to(q.dtype).to(acc) for t in (q_, k_))
    q_, k_, v_ = (t.flatten(0, 1) for t in (q_, k_, v_))  # (B L, H or G, P)
    out = torch.zeros_like(q_)
    lse = [q_.new_zeros(0, heads)]
    ends = offsets.tolist()
    for begin, end in itertools.pairwise(ends):
        at = tokens[begin:end].long()
        c = None if table is None or coords is None else coords[begin:end].long()
        qw = q_[at].unflatten(1, (groups, heads // groups))  # (n, G, H / G, P)
        attend = _attend_to_earlier if causal else _attend
        values, norms = attend(qw, k_[at], v_[at], scale, table, c, at)
        out = out.index_put((at,), values.flatten(1, 2))
        lse.append(norms)
    return out.unflatten(0, q.shape[:2]).to(q.dtype), torch.cat(lse)
