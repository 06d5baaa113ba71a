"""Definition of `linmu_ops.ssd_scan`: the recurrence, one visit at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dims import accumulate_dtype
from .._directions import Direction, Reverse, with_own
from ._visits import both_directions, by_head, normalized, restarts, visited, visiting_order


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, restart: Tensor, keep: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] (outer) B[t], y[t] = h[t] C[t]; all per head, in visiting order."""
    # 0 times what is not finite is a NaN, in a gradient too: what takes no part is taken out before it is multiplied.
    x, dt, B, C = (torch.where(keep.view(*keep.shape, *[1] * (t.dim() - 2)), t, 0.0) for t in (x, dt, B, C))
    ys = [x.new_zeros(x.shape[0], 0, *x.shape[2:])]
    for t in range(x.shape[1]):
        new = restart[:, t, None]
        state = torch.where(new[..., None, None], 0.0, state)
        decay = torch.where(new, 0.0, torch.exp(torch.where(new, 0.0, dt[:, t]) * A))[..., None, None]  # (B, H, 1, 1)
        moved = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        m = keep[:, t, None, None, None]
        state = torch.where(m, moved, state)
        ys.append(torch.where(m[..., 0], torch.einsum("bhpn,bhn->bhp", state, C[:, t]), 0.0)[:, None])
    return torch.cat(ys, dim=1), state


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, direction: str, reverse_dt: Tensor | None, reverse_A: Tensor | None, reverse_B: Tensor | None,
    reverse_C: Tensor | None, reverse_dt_bias: Tensor | None, reverse_mask: Tensor | None,
    reverse_seq_idx: Tensor | None, gate: Tensor | None, seq_idx: Tensor | None, token_order: Tensor | None,
    initial_state: Tensor | None, normalize: bool, return_final_state: bool, for_gradient: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if normalize:
        x = torch.cat([x, x.new_ones(*x.shape[:3], 1)], dim=3)
    forward = Direction(dt, A, B, C, dt_bias, None, seq_idx)
    own = Reverse(reverse_dt, reverse_A, reverse_B, reverse_C, reverse_dt_bias, reverse_mask, reverse_seq_idx)
    reverse = with_own(forward, own)
    batch, length, heads = dt.shape
    acc = accumulate_dtype(x.dtype)
    order, inverse = visiting_order("ssd_scan", token_order, x)
    everywhere = torch.ones(batch, length, dtype=torch.bool, device=x.device)

    def visit(t: Tensor) -> Tensor:
        return visited(t, order)

    def scan(d: Direction, state: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        def towards(t: Tensor) -> Tensor:
            return visit(t).flip(1) if back else visit(t)

        raw = d.dt.to(acc) if d.dt_bias is None else d.dt.to(acc) + d.dt_bias.to(acc)
        y, last = _scan(
            towards(by_head(x.to(acc), heads)), towards(F.softplus(raw) if dt_softplus else raw), d.A.to(acc),
            towards(by_head(d.B.to(acc), heads)), towards(by_head(d.C.to(acc), heads)),
            restarts(None if d.seq_idx is None else towards(d.seq_idx), x),
            everywhere if d.mask is None else towards(d.mask), state,
        )  # fmt: skip
        return y.flip(1) if back else y, last

    nothing = x.new_zeros(batch, heads, x.shape[3], B.shape[3], dtype=acc)
    start = nothing if initial_state is None else initial_state
    if direction == "reverse":
        y, final = scan(reverse, start, back=True)
    else:
        y, final = scan(forward, start, back=False)
    if direction == "both":
        r, _ = scan(reverse, nothing, back=True)
        y = both_directions(y, r, gate, reverse.mask, order)
    if D is not None:
        y = y + D.to(acc)[:, None] * visit(by_head(x.to(acc), heads))
    final = final.to(acc).clone() if return_final_state else x.new_empty(0, dtype=acc)
    y = visited(y, inverse)
    y, mass = normalized(y) if normalize else (y, x.new_empty(0, dtype=acc))
    return y if normalize and for_gradient else y.to(x.dtype), mass, final
