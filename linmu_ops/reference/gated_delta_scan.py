"""Definition of `linmu_ops.gated_delta_scan`: the recurrence, one visit at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._dims import accumulate_dtype
from .._directions import DeltaDirection, DeltaReverse, with_own
from ._visits import both_directions, by_head, restarts, visited, visiting_order

NORM_EPS = 1e-6


def l2norm(t: Tensor) -> Tensor:
    """Rows of length 1, but for the epsilon that a row of zeros needs."""
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + NORM_EPS)


def delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, new: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S' = decay S, S = S' + k (outer) beta (v - k S'), y = q S; per head, S (B, H, K, V). `new`: S' is 0."""
    state = decay[..., None, None] * state
    held = torch.einsum("bhk,bhkv->bhv", k, state)
    written = beta[..., None] * (v - (held if new is None else torch.where(new[..., None], 0.0, held)))
    state = state + torch.einsum("bhk,bhv->bhkv", k, written)
    return state, torch.einsum("bhk,bhkv->bhv", q, state)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, restart: Tensor, keep: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    ys = [v.new_zeros(v.shape[0], 0, *v.shape[2:])]
    for t in range(v.shape[1]):
        new = restart[:, t, None]
        state = torch.where(new[..., None, None], 0.0, state)
        decay = torch.where(new, 0.0, torch.exp(torch.where(new, 0.0, g[:, t])))  # (B, H)
        moved, y = delta_step(state, q[:, t], k[:, t], v[:, t], decay, beta[:, t], new)
        m = keep[:, t, None, None, None]
        state = torch.where(m, moved, state)
        ys.append(torch.where(m[..., 0], y, 0.0)[:, None])
    return torch.cat(ys, dim=1), state


def gated_delta_scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, use_qk_l2norm_in_kernel: bool,
    direction: str, reverse_q: Tensor | None, reverse_k: Tensor | None, reverse_g: Tensor | None,
    reverse_beta: Tensor | None, reverse_mask: Tensor | None, reverse_seq_idx: Tensor | None, gate: Tensor | None,
    seq_idx: Tensor | None, token_order: Tensor | None, initial_state: Tensor | None, return_final_state: bool,
    chunk_size: int, walk: Callable[..., tuple[Tensor, Tensor]] = recurrence,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    forward = DeltaDirection(q, k, g, beta, None, seq_idx)
    own = DeltaReverse(reverse_q, reverse_k, reverse_g, reverse_beta, reverse_mask, reverse_seq_idx)
    reverse = with_own(forward, own)
    batch, length, heads = g.shape
    acc = accumulate_dtype(q.dtype)
    order, inverse = visiting_order("gated_delta_scan", token_order, q)
    everywhere = torch.ones(batch, length, dtype=torch.bool, device=q.device)

    def visit(t: Tensor) -> Tensor:
        return visited(t, order)

    def scan(d: DeltaDirection, state: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        def towards(t: Tensor) -> Tensor:
            return visit(t).flip(1) if back else visit(t)

        def rows(t: Tensor, factor: float = 1.0, normed: bool = False) -> Tensor:
            t = towards(by_head(t.to(acc), heads))
            return factor * (l2norm(t) if normed else t)

        keep = everywhere if d.mask is None else towards(d.mask)
        tokens = (
            rows(d.q, scale, use_qk_l2norm_in_kernel), rows(d.k, 1.0, use_qk_l2norm_in_kernel), rows(v),
            towards(d.g.to(acc)), towards(d.beta.to(acc)),
        )  # fmt: skip
        # 0 times what is not finite is a NaN, in a gradient too: what takes no part is taken out before it is
        # multiplied.
        kept = (torch.where(keep.view(*keep.shape, *[1] * (t.dim() - 2)), t, 0.0) for t in tokens)
        y, last = walk(*kept, restarts(None if d.seq_idx is None else towards(d.seq_idx), q), keep, state)
        return y.flip(1) if back else y, last

    nothing = q.new_zeros(batch, heads, k.shape[3], v.shape[3], dtype=acc)
    start = nothing if initial_state is None else initial_state
    if direction == "reverse":
        y, final = scan(reverse, start, back=True)
    else:
        y, final = scan(forward, start, back=False)
    if direction == "both":
        r, _ = scan(reverse, nothing, back=True)
        y = both_directions(y, r, gate, reverse.mask, order)
    y = visited(y, inverse).to(q.dtype)
    return y, final.to(acc).clone() if return_final_state else q.new_empty(0, dtype=acc)
