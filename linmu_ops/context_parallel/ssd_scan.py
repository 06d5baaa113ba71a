"""`linmu_ops.ssd_scan` over rows that are split over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dims import accumulate_dtype, without_autocast
from .._directions import Direction, Reverse, with_own
from ..reference._visits import restarts, visited
from ..ssd_scan import check
from ..ssd_scan import ssd_scan as op
from ._context import ContextParallel, MovedOrder

_HALF = 1 << 16
# What a row's segments send: two halves of the first index and of the last, and whether a restart lies between.
_BORDERS = 5


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    context: ContextParallel,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    direction: str = "forward",
    reverse: Reverse | None = None,
    gate: Tensor | None = None,
    seq_idx: Tensor | None = None,
    token_order: Tensor | MovedOrder | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    normalize: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linmu_ops.ssd_scan` of whole rows, of which this rank holds a slab.

    To a state that enters it, a slab does one affine map: it decays the state, and adds what its own tokens leave.
    Ranks tell each other these maps, of one direction or both, in one all-gather. Each rank then scans its slab from
    the state that enters it.

    Args:
        context: how rows are split.
        token_order: (B, n) int32, positions in the slab, or a `MovedOrder`: what `context.order` makes of the order of
            whole rows. In place if None.
        initial_state: (B, H, P, N) float32 (or float64), the same on all ranks. State before the row's first visit; for
            "reverse" before its last token.
        return_final_state: also return the state after the row's last visit, on every rank.
        normalize: must be False: a mean of both directions is not the sum of what ranks tell each other.
        The others are the op's, with the n tokens of the slab for L.

    Returns:
        y: (B, n, H, P), dtype of x. With return_final_state: (y, state), state (B, H, P, N) float32 (or float64).

    Raises:
        ValueError: a shape, device or value breaks the table. TypeError: a type or dtype does.

    Notes:
        A rank sends B (H P N + H) numbers for each direction, float32 (float64 for float64), and 5 B more with
        segments, however long the row is. A `MovedOrder` sends the arguments of the tokens that move, and their y,
        besides. With "both", and 16-bit x, y is rounded twice.
    """
    if normalize:
        raise ValueError(f"ssd_scan: normalize must be False for rows that are split over ranks, got {normalize}")
    moved = token_order if isinstance(token_order, MovedOrder) else None
    order = None if isinstance(token_order, MovedOrder) else token_order
    r = check(
        x, dt, A, B, C, D=D, dt_bias=dt_bias, direction=direction, reverse=reverse, gate=gate, seq_idx=seq_idx,
        token_order=order, initial_state=initial_state, chunk_size=chunk_size,
    )  # fmt: skip
    context.check("ssd_scan", "x", x)
    if moved is not None:
        per_token = gate is not None and gate.dim() == 3
        x, dt, B, C, *own, gate_, seq_idx = context.to_visits(  # type: ignore[assignment]
            moved, x, dt, B, C, r.dt, r.B, r.C, r.mask, r.seq_idx, gate if per_token else None, seq_idx
        )
        gate = gate_ if per_token else gate
        r = r._replace(**dict(zip(("dt", "B", "C", "mask", "seq_idx"), own, strict=True)))
    acc = accumulate_dtype(x.dtype)
    forward = Direction(dt, A, B, C, dt_bias, None, seq_idx)
    backward = with_own(forward, r)
    visits = None if order is None else order.long()
    with without_autocast(x.device):
        slabs = [
            _Slab(d, x, dt_softplus, visits, back)
            for d, back in ((forward, False), (backward, True))
            if direction in ("both", "reverse" if back else "forward")
        ]
        states = _entering(slabs, context, [initial_state] + [None] * (len(slabs) - 1))
    state, final = states[0]
    y = op(
        x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, direction=direction,
        reverse=None if direction == "forward" else r, gate=gate, seq_idx=seq_idx, token_order=order,
        initial_state=state, chunk_size=chunk_size,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    if direction == "both":
        # The op's initial state is the forward direction's. What the other brings in is added: y is linear in it.
        with without_autocast(x.device):
            brought = slabs[1].read(states[1][0], None if gate is None else 1 - gate.to(acc))
            y = (y.to(acc) + brought).to(y.dtype)
    if moved is not None:
        (y,) = context.to_positions(moved, y)  # type: ignore[assignment]
    return (y, final) if return_final_state else y


class _Slab:
    """One direction of this rank's slab."""

    def __init__(self, d: Direction, x: Tensor, softplus: bool, order: Tensor | None, back: bool) -> None:
        acc = accumulate_dtype(x.dtype)
        self.d, self.x, self.order, self.back, self.heads = d, x, order, back, d.dt.shape[2]
        self.inverse = None if order is None else order.argsort(1)
        raw = d.dt.to(acc) if d.dt_bias is None else d.dt.to(acc) + d.dt_bias.to(acc)
        step = F.softplus(raw) if softplus else raw
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if d.mask is None else d.mask
        self.everywhere = d.mask is None and d.seq_idx is None
        self.mask, self.index = self._visited(mask), None if d.seq_idx is None else self._visited(d.seq_idx)
        # From here on in visiting order. Decays are summed in double: a slab is long.
        self.step = torch.where(self.mask[..., None], self._visited(step), 0.0)
        self.log_decay = self.step.double() * d.A.double()
        self.begun = restarts(self.index, x).cumsum(1)  # segments that began after the slab's first visit

    def _visited(self, t: Tensor) -> Tensor:
        t = t if self.order is None else visited(t, self.order)
        return t.flip(1) if self.back else t

    def _at_tokens(self, t: Tensor) -> Tensor:
        t = t.flip(1) if self.back else t
        return t if self.inverse is None else visited(t, self.inverse)

    def map(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What becomes of a state that enters: the decay (B, H), the state (B, H, P, N) that is added; and, of rows of
        segments, the numbers (B, 5) that tell where these begin."""
        x, acc = self.x, accumulate_dtype(self.x.dtype)
        batch, length, heads = self.step.shape
        cut = self.begun[:, -1:] > 0 if length else self.begun.new_zeros(batch, 1, dtype=torch.bool)
        last = self.begun == self.begun[:, -1:]
        kept = (last & self.mask)[..., None]
        # The sum over later visits: no difference of two sums, so that no exponent is above 0.
        rest = self.log_decay.flip(1).cumsum(1).flip(1)
        after = torch.where(kept, F.pad(rest, (0, 0, 0, 1))[:, 1:], 0.0)
        weight = self._at_tokens(after.exp().to(acc) * torch.where(kept, self.step, 0.0))
        there = self._at_tokens(kept)
        values, keys = self._where(there, x), self._where(there, self.d.B)
        groups, P, of = x.shape[2], x.shape[3], keys.shape[2]
        weighted = values[:, :, :, None] * weight.view(
            batch, length, groups, heads // groups, 1
        )  # (B, L, Gx, H / Gx, P)
        weighted = weighted.reshape(batch, length, of, heads // of * P)
        state = torch.einsum("blgq,blgn->bgqn", weighted, keys).reshape(batch, heads, P, keys.shape[3])
        total = rest[:, 0] if length else rest.new_zeros(batch, heads)
        decay = torch.where(cut, 0.0, torch.where(cut, 0.0, total).exp()).to(acc)
        if self.index is None:
            return decay, state, None
        if not length:
            return decay, state, decay.new_zeros(batch, _BORDERS)
        ends = torch.stack((self.index[:, 0], self.index[:, -1]), dim=1)
        # float32 holds no int32, but both its halves.
        halves = (ends.div(_HALF, rounding_mode="floor"), ends.remainder(_HALF), cut)
        return decay, state, torch.cat(halves, dim=1).to(acc)

    def read(self, state: Tensor, weight: Tensor | None) -> Tensor:
        """(B, n, H, P), accumulate dtype, in token positions: what each token reads of a state (B, H, P, N) that
        enters, times a weight (B, n, H) or (H,)."""
        batch, heads, P, N = state.shape
        reached = ((self.begun == 0) & self.mask)[..., None]
        decay = torch.where(reached, self.log_decay.cumsum(1), -torch.inf).exp().to(state.dtype)
        there, decay = self._at_tokens(reached), self._at_tokens(decay)
        if weight is not None:
            decay = decay * torch.where(there, weight, 0.0)
        queries = self._where(there, self.d.C)
        groups = queries.shape[2]
        grouped = state.reshape(batch, groups, heads // groups * P, N)
        found = torch.einsum("blgn,bgqn->blgq", queries, grouped).reshape(*decay.shape, P)
        return torch.where(there[..., None], found * decay[..., None], 0.0)

    def _where(self, there: Tensor, t: Tensor) -> Tensor:
        """t (B, n, G, .), accumulate dtype, 0 where `there` (B, n, 1) is False: a NaN there must not reach others."""
        t = t.to(accumulate_dtype(t.dtype))
        return t if self.everywhere else torch.where(there[..., None], t, 0.0)


class _Map(NamedTuple):
    """A slab's, as every rank gets it; segments (B, 5) or None."""

    decay: Tensor
    state: Tensor
    segments: Tensor | None

    def apply(self, state: Tensor) -> Tensor:
        if self.segments is not None:
            state = torch.where(self.segments[:, -1, None, None, None] > 0, 0.0, state)
        return self.decay[..., None, None] * state + self.state

    def enter(self, state: Tensor, before: _Map | None) -> Tensor:
        """What is left of a state where the slab before ends with another segment."""
        if self.segments is None or before is None or before.segments is None:
            return state
        same = (self.segments[:, [0, 2]] == before.segments[:, [1, 3]]).all(1)
        return torch.where(same[:, None, None, None], state, 0.0)


def _entering(
    slabs: Sequence[_Slab], context: ContextParallel, initial: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """For each direction the state that enters this rank's slab, and the one that leaves the row, (B, H, P, N)."""
    maps = [slab.map() for slab in slabs]
    flat = [t.flatten(1) for parts in maps for t in parts if t is not None]
    sizes = [t.shape[1] for t in flat]
    sent = torch.cat(flat, dim=1)
    every = context.all_gather(sent).unflatten(0, (context.size, sent.shape[0]))
    # Every rank's states depend on it, the first one's too, for its backward waits for all ranks.
    nothing = every[:0].sum()
    columns = iter(every.split(sizes, dim=2))
    results = []
    for slab, (_, state, segments), start in zip(slabs, maps, initial, strict=True):
        decays, states = next(columns), next(columns).unflatten(2, state.shape[1:])
        numbers = None if segments is None else next(columns)
        h = torch.zeros_like(state) if start is None else start
        entering, before = h, None
        for k in reversed(range(context.size)) if slab.back else range(context.size):
            here = _Map(decays[k], states[k], None if numbers is None else numbers[k])
            if context.lengths[k]:
                h = here.enter(h, before)
            entering = h if k == context.rank else entering
            if context.lengths[k]:
                h, before = here.apply(h), here
        results.append((entering + nothing, h + nothing))
    return results
