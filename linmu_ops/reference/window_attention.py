"""Definition of `linmu_ops.window_attention`: gather each window, softmax(scale q k^T + bias) v, put it back."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .._dims import accumulate_dtype


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
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
        q_, k_ = (_rotate(t, cos, sin, interleaved).to(q.dtype).to(acc) for t in (q_, k_))
    q_, k_, v_ = (t.flatten(0, 1) for t in (q_, k_, v_))  # (B L, H or G, P)
    out = torch.zeros_like(q_)
    lse = [q_.new_zeros(0, heads)]
    ends = offsets.tolist()
    for begin, end in itertools.pairwise(ends):
        at = tokens[begin:end].long()
        qw = q_[at].unflatten(1, (groups, heads // groups))  # (n, G, H / G, P)
        scores = torch.einsum("igrp,jgp->grij", qw, k_[at]).flatten(0, 1) * scale  # (H, n, n)
        if table is not None and coords is not None:
            c = coords[begin:end].long()
            scores = scores + table[:, c[:, None] - c + table.shape[1] // 2]
        if causal:
            scores = scores.masked_fill(at > at[:, None], -math.inf)
        weights = scores.softmax(-1).unflatten(0, (groups, -1))
        out = out.index_put((at,), torch.einsum("grij,jgp->igrp", weights, v_[at]).flatten(1, 2))
        lse.append(scores.logsumexp(-1).T)
    return out.unflatten(0, q.shape[:2]).to(q.dtype), torch.cat(lse)
