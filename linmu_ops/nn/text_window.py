"""Causal softmax attention of text over the tokens before it, and over the first tokens of its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dims import accumulate_dtype

# queries (N, I, H, P), keys and values (N, J, G, P), mask (N, I, J) bool, scale -> (N, I, H, P), (N, I, H)
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class Sinks(NamedTuple):
    """The first s tokens of each row, which all later tokens attend to.

    Attributes:
        keys, values: (B, s, G, P), keys rotated.
        there: (B, s) bool. Which of them are text, and have come.
    """

    keys: Tensor
    values: Tensor
    there: Tensor

    def at_least(self, distance: int, index: Tensor) -> Tensor:
        """(B, L, s) bool: which of them lie `distance` or more before the token at `index` (B, L) of its row."""
        first = torch.arange(self.there.shape[1], device=index.device)
        return self.there[:, None] & (first <= index[..., None] - distance)

    def join(self, q: Tensor, y: Tensor, mass: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Add them to attention y (B, L, H, P), whose scores have the log-sum-exp `mass` (B, L, H), of queries q."""
        groups = self.keys.shape[2]
        grouped = q.unflatten(2, (groups, -1))  # (B, L, G, H / G, P)
        scores = torch.einsum("blgrp,bsgp->blgrs", grouped, self.keys).flatten(2, 3).to(mass.dtype) * scale
        scores = scores.masked_fill(~self.at_least(1, index)[:, :, None], -torch.inf)
        total = torch.cat((mass[..., None], scores), dim=-1).logsumexp(-1)
        weights = (scores - total[..., None]).exp().to(y.dtype).unflatten(2, (groups, -1))
        added = torch.einsum("blgrs,bsgp->blgrp", weights, self.values).flatten(2, 3)
        return (mass - total).exp().to(y.dtype)[..., None] * y + added, total


def causal_window_attention(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    window: int,
    scale: float,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    filled: Tensor | None = None,
    sinks: Sinks | None = None,
    before: Tensor | None = None,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention of each token over the last `window` tokens, itself included; linear in L.

    q (B, L, H, P), k, v (B, L, G, P), valid (B, L) bool: not padding; keys, values (B, window, G, P) and filled
    (B, window): the tokens before; before (B, L, s) bool: the sinks that a token sees. Chunks of `window` queries meet
    the keys of their own chunk and the one before; chosen (n,) int64: those that do, row after row, others give 0.
    """
    batch, length, heads, _ = q.shape
    chunks = -(-length // window)
    pad = chunks * window - length
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).view(batch * chunks, window, heads, -1)

    def pairs(t: Tensor, before: Tensor | None, first: Tensor | None = None) -> Tensor:
        before = t.new_zeros(batch, window, *t.shape[2:]) if before is None else before
        after = t.new_zeros(batch, pad, *t.shape[2:])
        t = torch.cat((before, t, after), dim=1).view(batch, chunks + 1, window, *t.shape[2:])
        parts = [t[:, :-1], t[:, 1:]]
        if first is not None:
            parts.append(first[:, None].expand(-1, chunks, *first.shape[1:]))
        return torch.cat(parts, dim=2).flatten(0, 1)

    behind = torch.arange(window, device=q.device)[:, None] + window - torch.arange(2 * window, device=q.device)
    mask = ((behind >= 0) & (behind < window)) & pairs(valid, filled)[:, None]
    # A query sees itself even where it is padding: a row with no key at all would be NaN.
    mask = mask | (behind == 0)
    if before is not None:
        mask = torch.cat((mask, F.pad(before, (0, 0, 0, pad)).view(batch * chunks, window, -1)), dim=2)
    first_keys, first_values = (None, None) if sinks is None else (sinks.keys, sinks.values)
    k, v = pairs(k, keys, first_keys), pairs(v, values, first_values)
    if chosen is None:
        y, mass = rule(q, k, v, mask, scale)
    else:
        q, k, v, mask = (t.index_select(0, chosen) for t in (q, k, v, mask))
        y, mass = (
            t.new_zeros(batch * chunks, *t.shape[1:]).index_copy(0, chosen, t) for t in rule(q, k, v, mask, scale)
        )
    y, mass = (t.view(batch, chunks * window, *t.shape[2:])[:, :length] for t in (y, mass))
    return y, mass


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention by PyTorch's own kernels, which do not tell the log-sum-exp: it is empty."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    y = y.transpose(1, 2)
    return y, y[..., 0, :0]


def attend_with_mass(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same with the log-sum-exp of the scores, in the accumulate dtype."""
    groups = k.shape[2]
    grouped = q.unflatten(2, (groups, -1))  # (N, I, G, H / G, P)
    scores = torch.einsum("nigrp,njgp->nigrj", grouped, k).to(accumulate_dtype(q.dtype)) * scale
    scores = scores.masked_fill(~mask[:, :, None, None], -torch.inf)
    mass = scores.logsumexp(-1)
    weights = (scores - mass[..., None]).exp().to(v.dtype)
    return torch.einsum("nigrj,njgp->nigrp", weights, v).flatten(2, 3), mass.flatten(2)
