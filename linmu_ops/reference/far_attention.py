"""Definition of `linmu_ops.far_attention`: what is far from each token, mixed into what is near."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dims import accumulate_dtype
from ._visits import normalized
from .exact_step import LEAST_LOG_TOTAL


def far_attention(
    y: Tensor, lse: Tensor, rest: Tensor, q: Tensor, k: Tensor, v: Tensor, steps: Tensor, entered: Tensor, when: Tensor,
    b_map: Tensor, c_map: Tensor, scale: Tensor, rates: Tensor, z_gate: Tensor | None, initial_state: Tensor | None,
    last: Tensor | None, softmax_scale: float,
) -> Tensor:  # fmt: skip
    acc, (batch, length, heads, P), groups = accumulate_dtype(q.dtype), q.shape, k.shape[2]
    for name, t, least in (("entered", entered, -1), ("when", when, -1), ("last", last, 0)):
        if t is not None and bool(((t < least) | (t > k.shape[1])).any()):
            raise ValueError(f"far_attention: {name} must be in {least}..{k.shape[1]}")
    B = torch.einsum("btgp,gpn->bgtn", k.to(acc), b_map).softmax(-1)
    C = (torch.einsum("blhp,hpn->blhn", q.to(acc), c_map) * (scale * softmax_scale)[:, None]).softmax(-1)
    x = F.pad(v.to(acc), (0, 1), value=1.0).transpose(1, 2)
    dt = steps.transpose(1, 2)  # (B, G, T, H / G)
    state = q.new_zeros(batch, heads, P + 1, B.shape[-1], dtype=acc) if initial_state is None else initial_state
    final = torch.zeros_like(state) if last is not None else q.new_empty(0, dtype=acc)
    gate = 1.0 if z_gate is None else F.silu(z_gate.to(acc)).view(batch, length, heads, P)
    asked = [t for t in (when, last) if t is not None and t.numel()]
    for step in range(1 + max((int(t.max()) for t in asked), default=-1)):
        reads = when == step
        if reads.any():
            mean, total = normalized(torch.einsum("bhpn,blhn->blhp", state, C))
            share = (rest + total.log().clamp(min=LEAST_LOG_TOTAL) - lse).sigmoid()
            mixed = torch.lerp(y.to(acc), mean * gate, share[..., None])
            y.copy_(torch.where(reads[..., None, None], mixed, y.to(acc)))
        if last is not None:
            final = torch.where((last == step)[:, None, None, None], state, final)
        out = (entered != step)[..., None]  # (B, G, T, 1)
        now = dt.masked_fill(out, 0)
        run = (now * rates.view(groups, 1, -1)).cumsum(2)
        end = F.pad(run, (0, 0, 1, 0))[:, :, -1:]
        weight = now * (run - end).exp()
        new = torch.einsum("bgtr,bgtp,bgtn->bgrpn", weight, x.masked_fill(out, 0), B.masked_fill(out, 0))
        state = state * (-end[:, :, 0]).exp().flatten(1)[..., None, None] + new.flatten(1, 2)
    return final
