"""What a rank's slab of rows needs of the ranks before it, in an `ExactMMATE`: the state before its first token.

Which tokens that takes is the same for all keys, but for the kept ones: it follows from the layout, padding and
sequences of whole rows, which every rank knows. Of what may be kept each rank sends its best. What is far is an affine
map of each slab, as in `linmu_ops.context_parallel.ssd_scan`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout_part import split
from ..context_parallel import SlabLayout
from ..token_layout import Partition, TokenLayout
from .far import FarAttention
from .past import Past, Sizes, score
from .state import MMATEState

_NO_TOKEN = -2  # of `MMATEState.slab_tokens`


class Before(NamedTuple):
    """Of whole rows, what lies before one rank's slab. Positions (B, n) are those of rows, -1 where there is none.

    Attributes:
        goes_on: (B,) bool. The sequence of the slab's first token began before the slab. Else nothing is before it.
        first: (B,) where that sequence begins. This and the next are numbers of a row's real tokens.
        end: (B,) where the state ends: at the slab, or at an image's or video's frames that the border cuts.
        seen: (B,) tokens of the sequence in the state.
        sinks, ring, held: positions. Token i of a sequence is at i % ring; held are those after the state.
        numbers, text: (B, h) as `slab_tokens` and `slab_text` of a state.
        may_be_kept: (B, L) bool. What has left in the state, without sinks.
    """

    goes_on: np.ndarray
    first: np.ndarray
    end: np.ndarray
    seen: np.ndarray
    sinks: np.ndarray
    ring: np.ndarray
    held: np.ndarray
    numbers: np.ndarray
    text: np.ndarray
    may_be_kept: np.ndarray

    @property
    def needed(self) -> np.ndarray:
        """(B, L) bool: tokens of which a rank needs keys and values, beside the kept ones."""
        every = np.zeros(self.may_be_kept.shape, dtype=bool)
        for part in (self.sinks, self.ring, self.held):
            row, column = np.nonzero(part >= 0)
            every[row, part[row, column]] = True
        return every


class Borders:
    """The borders between ranks, of one forward and all layers with these windows. All ranks make the same.

    Args:
        slab: of whole rows.
        windows: of the layer.
        mask: (B, n) bool of the slab, False at padding, or None.
        seq_idx: (B, n) int32 of the slab, or None.

    Attributes:
        layout: of the slab, a part of the rows'.
        seq_idx: (B, n) int32, the numbers of the slab's sequences, or None.
    """

    def __init__(
        self, slab: SlabLayout, windows: Partition, sizes: Sizes, mask: Tensor | None, seq_idx: Tensor | None
    ) -> None:
        self.context, self.sizes = slab.context, sizes
        layout, bounds, me = slab.layout, slab.context.bounds, slab.context.rank
        parts = [layout.part(*bounds[r : r + 2]) for r in range(self.context.size)]
        self.layout, self.seq_idx = parts[me], seq_idx
        real = np.ones((layout.batch_size, layout.length), dtype=bool)
        if mask is not None:
            real = slab.whole(mask).cpu().numpy()
        index = np.zeros(real.shape, np.int64)
        if seq_idx is not None:
            index = slab.whole(seq_idx).cpu().numpy()
        self.before = [_before(layout, start, windows, sizes, real, index) for start in bounds[:-1]]
        self.real = real
        self._blocks, self._positions = layout.blocks.tolist(), split(layout.positions, layout.spans)

    @classmethod
    def of(
        cls, slab: SlabLayout, windows: Partition, sizes: Sizes, mask: Tensor | None, seq_idx: Tensor | None
    ) -> Borders:
        """The borders, made once for all layers that share `slab`. Arguments as above."""
        key = ("borders", windows, sizes, id(mask), id(seq_idx))
        return slab.kept(key, lambda: (cls(slab, windows, sizes, mask, seq_idx), mask, seq_idx))[0]

    def refuse_cuts(self, op: str) -> None:
        """Raise ValueError, on all ranks, where a border cuts an image or video."""
        for (row, *_), own in zip(self._blocks, self._positions, strict=True):
            for border in self.context.bounds[1:-1]:
                if (own < border).any() and (own >= border).any():
                    raise ValueError(
                        f"{op}: context must not cut an image or video whose tokens see later ones, got a border at "
                        f"token {border} of row {row}"
                    )

    def state(self, keys: Tensor, values: Tensor, steps: Tensor) -> tuple[MMATEState | None, Tensor]:
        """The state before the slab, without the scan's, None where nothing is before; and a 0 that depends on the
        exchange. keys, values (B, n, G, P) and steps (B, n, G, H / G) are the slab's, keys rotated."""
        me, batch, device = self.before[self.context.rank], len(self.real), keys.device
        kv, written, nothing, best = self._exchange(keys, values, steps)
        if not me.goes_on.any():
            return None, nothing
        kv, written = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (kv, written))  # the last one stands for none
        first = self._places()

        def came(positions: np.ndarray) -> Tensor:
            """Where these tokens are among what came."""
            return _on(np.where(positions < 0, -1, first[np.arange(batch)[:, None], positions]), device)

        sinks, ring, held = (came(positions) for positions in (me.sinks, me.ring, me.held))
        pool = _on(best, device)
        kept = (self._kept(written[pool], pool).mT, torch.arange(keys.shape[2], device=device))  # of each head
        both = torch.cat([kv[at].transpose(1, 2) for at in (sinks, ring, kept)], dim=2)
        of_state = torch.cat([written[at].transpose(1, 2) for at in (ring, kept)], dim=2)
        old_keys, old_values = both.split(keys.shape[3], dim=3)
        state = MMATEState(
            keys=old_keys, values=old_values, steps=of_state, seen=_on(me.seen, device),
            sinks=sinks >= 0 if self.sizes.sinks else None,
        )  # fmt: skip
        if not held.shape[1]:
            return state, nothing
        slab_keys, slab_values = kv[held].transpose(1, 2).split(keys.shape[3], dim=3)
        return state._replace(
            slab_keys=slab_keys, slab_values=slab_values, slab_steps=written[held].transpose(1, 2),
            slab_tokens=_on(me.numbers, device), slab_text=_on(me.text, device),
        ), nothing  # fmt: skip

    def _exchange(self, keys: Tensor, values: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """What came from the ranks before, in turn: keys and values (n, G, 2 P), steps (n, G, H / G); a 0 that depends
        on it; and (B, m), where what may be kept is in it, -1 where there is less. Of each rank first come the needed
        tokens, in the order of rows and positions, then what may be kept."""
        context, room = self.context, self.sizes.kept
        rank, batch, here = context.rank, len(self.real), slice(context.start, context.stop)
        both, by = torch.cat((keys, values), dim=3), score(steps).mT
        rows = torch.arange(batch, device=keys.device)[:, None, None]
        groups = torch.arange(keys.shape[2], device=keys.device)
        sent, to = [(both[:0].flatten(0, 1), steps[:0].flatten(0, 1))], [0] * (rank + 1)
        for later in self.before[rank + 1 :]:
            needed = _on(np.flatnonzero(later.needed[:, here]), keys.device)
            best = (rows, _best(by, _on(later.may_be_kept[:, here], keys.device), room).clamp(max=by.shape[2] - 1).mT,
                    groups)  # fmt: skip
            part = [torch.cat((t.flatten(0, 1)[needed], t[best].flatten(0, 1))) for t in (both, steps)]
            sent.append((part[0], part[1]))
            to.append(len(part[0]))
        kv, written = (torch.cat(parts) for parts in zip(*sent, strict=True))
        of: list[int] = []
        at: list[np.ndarray] = []
        for theirs, many in self._needed_of():
            slots = min(room, theirs.stop - theirs.start)
            places = sum(of) + many + np.arange(batch * slots).reshape(batch, slots)
            there = self.before[rank].may_be_kept[:, theirs].sum(1, keepdims=True)
            at.append(np.where(np.arange(slots) < there, places, -1))
            of.append(many + batch * slots)
        of += [0] * (context.size - rank)
        kv = context.exchange(kv, to, of)
        # In a backward pass every rank must take part in one exchange after the other.
        written = context.exchange(written + kv[:0].sum().to(written.dtype), to, of)
        best_at = np.concatenate([np.zeros((batch, 0), np.int64), *at], axis=1)
        return kv, written, written[:0].sum(), best_at

    def _needed_of(self) -> list[tuple[slice, int]]:
        """The slab of each rank before, and how many of its tokens are needed here."""
        needed, bounds = self.before[self.context.rank].needed, self.context.bounds
        slabs = [slice(*bounds[r : r + 2]) for r in range(self.context.rank)]
        return [(slab, int(needed[:, slab].sum())) for slab in slabs]

    def _places(self) -> np.ndarray:
        """(B, L): where each needed token is among what came."""
        needed, batch = self.before[self.context.rank].needed, len(self.real)
        places, first = np.full(needed.shape, -1), 0
        for slab, many in self._needed_of():
            places[:, slab][needed[:, slab]] = first + np.arange(many)
            first += many + batch * min(self.sizes.kept, slab.stop - slab.start)
        return places

    def _kept(self, steps: Tensor, pool: Tensor) -> Tensor:
        """(B, G, m): which are kept of a pool (B, n), in order, the last one at the end; -1: none. steps (B, n, G,
        H / G). As `running_top` chooses: of equal scores the earlier."""
        by, room = score(steps).mT, self.sizes.kept
        best = _best(by, pool >= 0, room)
        many = pool.shape[1]
        best = torch.where(best < many, best, -1).sort(2).values
        found = pool[:, None].expand_as(by).gather(2, best.clamp(min=0)) if many else best
        return F.pad(torch.where(best < 0, -1, found), (room - best.shape[2], 0), value=-1)

    def far(
        self, scan: FarAttention, past: Past | None, given: tuple[Tensor, Tensor, Tensor], nothing: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The scan's state before the slab, (B, H, P + 1, N), and a 0 that depends on all ranks' maps. past: of the
        slab; None where it has no token. given: keys, values and step sizes of the slab."""
        like = given[2]
        context, batch, heads = self.context, len(self.real), scan.shape.num_heads
        decay, new = like.new_ones(batch, heads), like.new_zeros(batch, heads, *scan.state_size)
        if past is not None and context.rank + 1 < context.size:
            decay, new = scan.entering(past.keys, past.values, past.steps, self._entered(past), past.entered)
        # A rank whose map depends on nothing, too, has a backward pass where that of the others does.
        nothing = nothing + sum(t.flatten()[:0].sum().to(nothing.dtype) for t in (*given, *scan.parameters()))
        sent = torch.cat((decay, new.flatten(1)), dim=1) + nothing.to(decay.dtype)
        every = context.all_gather(sent).unflatten(0, (context.size, batch))
        state = torch.zeros_like(new)
        for rank in range(context.rank):
            there, then = self.before[rank : rank + 2]
            decay, new = every[rank, :, :heads], every[rank, :, heads:].unflatten(1, state.shape[1:])
            same = there.goes_on & (then.first < self._starts(rank))
            same_, goes_on = (_on(t, like.device)[:, None, None, None] for t in (same, then.goes_on))
            state = torch.where(same_, decay[..., None, None] * state, 0) + new
            state = torch.where(goes_on, state, 0)
        return state, every[:0].sum()

    def _starts(self, rank: int) -> np.ndarray:
        """(B,): how many real tokens of a row come before a rank's slab."""
        return self.real[:, : self.context.bounds[rank]].sum(1)

    def _entered(self, past: Past) -> Tensor:
        """(B, G, T) bool: what has entered by the end of the next rank's state."""
        me, device = self.context.rank, past.keys.device
        here, there = self.before[me : me + 2]
        first_place = np.where(here.goes_on, here.end, self._starts(me))
        end = _on(np.where(there.goes_on, there.end - first_place, 0), device)
        last = torch.minimum(end, past.real - 1).clamp(min=0)[:, None]
        first, base = past.start.gather(1, last), past.base.gather(1, last)
        when = base[:, 0] + self.sizes.read_by_text(end - first[:, 0])
        place = torch.arange(past.keys.shape[1], device=device) - past.before
        inside = (first <= 0) | (place >= first)  # of the sequence that goes on
        goes_on = _on(there.goes_on, device)
        return (past.entered < when[:, None, None]) & (inside & goes_on[:, None])[:, None]


def _on(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _best(by: Tensor, allowed: Tensor, room: int) -> Tensor:
    """(B, G, m): of tokens with scores (B, G, n) the `room` best that are allowed (B, n), in order; n fills up."""
    there = allowed[:, None].expand_as(by)
    best = by.masked_fill(~there, -torch.inf).argsort(dim=2, descending=True, stable=True)[..., :room]
    return torch.where(there.gather(2, best), best, by.shape[2]).sort(2).values


def _before(
    layout: TokenLayout, start: int, windows: Partition, sizes: Sizes, real: np.ndarray, index: np.ndarray
) -> Before:
    batch = len(real)
    text = ~layout.visual_mask().numpy()
    numbers = layout.numbers().numpy()
    cuts = layout.part(0, start).cut(windows).begin.numpy()
    goes_on, first, end = np.zeros(batch, dtype=bool), np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    may_be_kept = np.zeros_like(real)
    sinks, ring = np.full((batch, sizes.sinks), -1), np.full((batch, sizes.ring), -1)
    held: list[np.ndarray] = []
    for b in range(batch):
        places = np.flatnonzero(real[b])
        count = int(np.searchsorted(places, start))
        held.append(places[:0])
        if not 0 < count < len(places) or index[b, places[count - 1]] != index[b, places[count]]:
            continue
        goes_on[b] = True
        first[b] = int(np.flatnonzero(index[b, places[: count + 1]] != index[b, places[count]]).max(initial=-1)) + 1
        end[b] = min(count, int(np.searchsorted(places, cuts[b])))
        held[b] = places[end[b] : count]
        own = places[first[b] : end[b]]
        some = own[: sizes.sinks]
        sinks[b, : len(some)] = np.where(text[b, some], some, -1)
        last = np.arange(max(len(own) - sizes.ring, 0), len(own))
        ring[b, last % sizes.ring] = own[last]
        gone = int(sizes.read_by_text(torch.tensor(len(own)))) * sizes.leave
        may_be_kept[b, own[:gone]] = True
        may_be_kept[b, sinks[b][sinks[b] >= 0]] = False
    many = max(map(len, held))
    kinds = np.full((batch, many), _NO_TOKEN)
    positions = np.full((batch, many), -1)
    for b, own in enumerate(held):
        positions[b, : len(own)], kinds[b, : len(own)] = own, numbers[b, own]
    between = [np.flatnonzero(row == -1) for row in kinds]
    between_ = np.full((batch, max(map(len, between))), -1)
    for b, own in enumerate(between):
        between_[b, : len(own)] = own
    return Before(goes_on, first, end, end - first, sinks, ring, positions, kinds, between_, may_be_kept)
