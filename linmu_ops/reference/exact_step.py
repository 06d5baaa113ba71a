"""Definition of `linmu_ops.exact_step`: one token of text for each row, in place on the state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dims import accumulate_dtype
from ._visits import normalized

LEAVE = 64  # tokens that leave at a time, at most
LEAST_LOG_TOTAL = -100.0  # stands for the log of no weights


def steps_over(seen: Tensor, window: int) -> Tensor:
    """How many steps of leaving are over for a token before which `seen` have come."""
    return torch.where(seen >= window, seen + 1 - window, 0) // min(window, LEAVE)


def _rotated(t: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """t (B, heads, P), its first R channels turned by cos, sin (B or 1, R)."""
    if cos is None or sin is None:
        return t
    head, rest = t.split([cos.shape[1], t.shape[2] - cos.shape[1]], dim=2)
    half = cos.shape[1] // 2
    turned = torch.cat((-head[..., half:], head[..., :half]), dim=2)
    if interleaved:
        turned = torch.stack((-head[..., 1::2], head[..., ::2]), dim=-1).flatten(2)
    return torch.cat((head * cos[:, None] + turned * sin[:, None], rest), dim=2)


def exact_step(
    keys: Tensor, values: Tensor, steps: Tensor, sinks: Tensor | None, seen: Tensor, ssm: Tensor, q: Tensor, k: Tensor,
    v: Tensor, dt: Tensor, dt_bias: Tensor, rest: Tensor, c_map: Tensor, scale: Tensor, cos: Tensor | None,
    sin: Tensor | None, z_gate: Tensor | None, real: Tensor | None, window: int, softmax_scale: float,
    interleaved: bool, nothing_beyond: bool, far_limit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc, batch, groups = accumulate_dtype(q.dtype), len(q), k.shape[1]
    there = seen.new_zeros(batch, 0, dtype=torch.bool) if sinks is None else sinks
    real = torch.ones_like(seen, dtype=torch.bool) if real is None else real
    if bool((seen < 0).any() | (seen >= 2**62).any()):
        raise ValueError("exact_step: seen must be from 0 to 2**62 - 1")
    first, ring = there.shape[1], window + min(window, LEAVE)
    kept = keys.shape[2] - first - ring
    q, k, v = (t.to(acc) for t in (q, k, v))
    q, k = (_rotated(t, cos, sin, interleaved) for t in (q, k))

    # Token i of a row is at i % ring, after the sinks; one of the first is a sink as well.
    step = F.softplus(dt + dt_bias).unflatten(1, (groups, -1))
    for row in real.nonzero()[:, 0].tolist():
        token = int(seen[row])
        steps[row, :, token % ring] = step[row].to(steps.dtype)
        for place in [first + token % ring] + [token] * (token < first):
            keys[row, :, place], values[row, :, place] = k[row].to(keys.dtype), v[row].to(values.dtype)

    # What each row sees: its sinks before all that has left, the ring from there on, and the last places of the kept.
    gone = steps_over(seen, window)[:, None] * min(window, LEAVE)
    sink, number, spot = (torch.arange(n, device=q.device) for n in (first, ring, kept))
    before = there & (sink < gone)
    far = gone[:, 0] - before.sum(1)
    index = seen[:, None] - (seen[:, None] - number) % ring
    near = (index >= gone) & (index >= 0)
    exact = spot >= kept - far[:, None]
    far = (far - kept).clamp(min=0)
    if nothing_beyond:
        near = near & (index > seen[:, None] - window)
        before, exact, far = torch.zeros_like(before), torch.zeros_like(exact), torch.zeros_like(far)
    mask = torch.cat((before, near, exact), dim=1) & real[:, None]

    # Rows that are padding see nothing, and are 0.
    scores = torch.einsum("bgrp,bgnp->bgrn", q.unflatten(1, (groups, -1)), keys.to(acc)) * softmax_scale
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    lse = torch.where(real[:, None], scores.logsumexp(-1).flatten(1), 0)
    weights = (scores - lse.view(*scores.shape[:3], 1)).exp()
    seen_values = values.to(acc).masked_fill(~mask[:, None, :, None], 0)
    exact_y = torch.einsum("bgrn,bgnp->bgrp", weights, seen_values).flatten(1, 2)

    features = (torch.einsum("bhp,hpn->bhn", q, c_map.to(acc)) * (scale * softmax_scale)[:, None]).softmax(-1)
    far_y, total = normalized(torch.einsum("bhpn,bhn->bhp", ssm, features))
    if z_gate is not None:
        far_y = far_y * F.silu(z_gate.to(acc)).view_as(far_y)
    excess = (far.to(acc) / far_limit).clamp(min=1).log()[:, None]
    share = (rest - excess + total.log().clamp(min=LEAST_LOG_TOTAL) - lse).sigmoid()
    mixed = torch.lerp(exact_y, far_y, share[..., None])
    y = torch.where(((far > 0) & real)[:, None, None], mixed, exact_y).masked_fill(~real[:, None, None], 0)

    due = steps_over(seen + 1, window) > steps_over(seen, window)
    if sinks is not None:
        sinks |= (sink == seen[:, None]) & real[:, None]
    seen += real
    return y.flatten(1).to(keys.dtype), due & real
