"""Where a query's earlier tokens are: near, kept or far. Each is in one of these.

Text leaves `leave` tokens at a time, in the order of positions. What has left is kept, where its score is among the
`kept` highest of all that have left; else, or once it no longer is, it enters the scan's state, for good. So two
integers of a token tell all: the step at which it leaves, and the one at which it enters. A query reads after so many
steps as are over before its window begins. The first tokens of a row, its sinks, never leave.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._inputs import Call, real_tokens_first, take
from .text_window import from_ring

_LEAVE = 64  # tokens that leave at a time, and queries that meet the same keys


class Sizes(NamedTuple):
    """Numbers of tokens.

    Attributes:
        window: that text sees of its row at least, itself included; `leave` - 1 more at most.
        sinks: the first tokens of a row, as far as they are text.
        kept: exact ones among those that have left, for each key/value head.
    """

    window: int
    sinks: int
    kept: int

    @property
    def leave(self) -> int:
        """That leave at a time."""
        return min(self.window, _LEAVE)

    @property
    def ring(self) -> int:
        """That a state has room for between the sinks and the kept ones."""
        return self.window + self.leave

    def read_by_text(self, index: Tensor) -> Tensor:
        """Steps that are over for text at `index` of its row; so many a state after `index` tokens has made."""
        # Of a clamped range PyTorch 2.13's compiler makes an index that it cannot simplify.
        return torch.where(index >= self.window, index + 1 - self.window, 0) // self.leave

    def may_be_far(self, seen: Tensor) -> bool:
        """Whether something may be far from text before which so many tokens (B,) of its row have come, on a CPU."""
        most = int(seen.max()) if seen.shape[0] else 0
        return max(most + 1 - self.window, 0) // self.leave * self.leave > self.kept


class Past(NamedTuple):
    """The tokens that a call can see. Padding is none: a call's tokens stand at its places 0, 1, ... in order.

    Attributes:
        keys, values: (B, T, G, P), keys rotated. First those of the state, if there is one: sinks, kept, ring.
        steps: (B, T, G, H / G), accumulate dtype. Step sizes of the scan.
        before: how many of the T are of the state.
        ring: how many of these, the last ones, are of its ring.
        start: (B, L) int64, the place of the first token of a place's sequence; < 0: so many tokens before the call.
        real: (B,) int64, how many places of a row are no padding.
        text: (B, L) bool, of places.
        sinks_there: (B, s) bool, which sinks the state has. None without a state.
        kept: (B, G, U + 1, m) int64, the kept ones, of the T, after each step of the call; -1: none.
        entered: (B, G, T) int64, the step of the call, from 0, at which one enters the state; U: at none.
        base: (B, L) int64, steps of the call before a place's sequence, less those of the sequence before the call.
        left: (B, U + 1) int64, how many tokens have left after each step of the call, without sinks.
        back: (B, L) int64, the place of each token of the call. None where they are in place.
        order: (B, h + L) int64, the other way round: which token stands at a place. None where they are in place.
        held: h, how many tokens the state has of a slab that was cut. They stand at places too, before the call's.
        numbers: (B, L) int64, which tell the sequences of a row apart. None where it is one.
    """

    keys: Tensor
    values: Tensor
    steps: Tensor
    before: int
    ring: int
    start: Tensor
    real: Tensor
    text: Tensor
    sinks_there: Tensor | None
    kept: Tensor
    entered: Tensor
    base: Tensor
    left: Tensor
    back: Tensor | None
    order: Tensor | None
    held: int
    numbers: Tensor | None

    def places(self, flat: Tensor, length: int) -> Tensor:
        """Of flat positions of tokens in rows of `length`: their places in their rows. 0 of -1: the state's slab comes
        before all else."""
        there = flat.clamp(min=0)
        found = there % length if self.back is None else self.back.flatten()[there]
        return torch.where(flat < 0, 0, found)

    def known(self, places: Tensor) -> Tensor:
        """Which of the T stand at these places; the first one where none does."""
        at = places + self.before
        return torch.where((at >= 0) & (at < self.keys.shape[1]), at, 0)

    def sinks(self, rows: Tensor, places: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The sinks of the sequences of n places: which of the T they are, and whether they are there; (n, size)."""
        length, number = self.start.shape[1], torch.arange(size, device=rows.device)
        place = self.start.flatten()[rows * length + places][:, None] + number
        at = rows[:, None] * length + place.clamp(0, length - 1)
        there = (place < self.real[rows][:, None]) & self.text.flatten()[at]
        # Where a sequence is shorter than the sinks, the next one begins.
        there = there & (self.start.flatten()[at] == (place - number)[:, :1])
        found = self.before + place.clamp(0, length - 1)
        if self.sinks_there is not None:
            there = torch.where(place < 0, self.sinks_there[rows], there)
            found = torch.where(place < 0, number, found)
        return found, there

    def far(self, when: Tensor, kept: int) -> Tensor:
        """How many tokens of its sequence are far from each token, which reads after the steps `when`; (B, L)."""
        base, start = (t if self.back is None else take(t, self.back) for t in (self.base, self.start))
        # What a state has of the row's first sequence counts for that one alone.
        before = self.left.gather(1, base.clamp(min=0)).masked_fill(start <= 0, 0)
        return (self.left.gather(1, when) - before - kept).clamp(min=0)


def past_of(sizes: Sizes, keys: Tensor, values: Tensor, steps: Tensor, call: Call) -> Past:
    """What a call can see: its own tokens, keys and values (B, L, G, P), and those of its state.

    steps: (B, L, G, H / G).
    """
    batch, length, groups, _ = keys.shape
    device, state = keys.device, call.state
    text = torch.ones(batch, length, dtype=torch.bool, device=device)
    if call.layout is not None:
        text = ~call.layout.visual_mask(device)
    back, order, held, mask, seq_idx = None, None, 0, call.mask, call.seq_idx
    of_slab = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # tokens that a row has of it
    if state is not None and state.slab_tokens is not None:
        # What came since the slab began, once more.
        assert state.slab_keys is not None and state.slab_values is not None and state.slab_steps is not None
        held, of_slab = state.slab_tokens.shape[1], (state.slab_tokens > -2).sum(1, keepdim=True)
        mask = torch.cat((state.slab_tokens > -2, torch.ones_like(text) if mask is None else mask), dim=1)
        text = torch.cat((state.slab_tokens == -1, text), dim=1)
        keys, values, steps = (
            torch.cat((old.transpose(1, 2).to(new.dtype), new), dim=1)
            for old, new in ((state.slab_keys, keys), (state.slab_values, values), (state.slab_steps, steps))
        )
        length += held
    place = torch.arange(length, device=device)
    real = text.new_full((batch,), length, dtype=torch.int64)
    if mask is not None:
        order = real_tokens_first(mask)
        keys, values, steps, text = (take(t, order) for t in (keys, values, steps, text))
        if seq_idx is not None:
            # The slab's are of the sequence of what follows it.
            seq_idx = take(F.pad(seq_idx, (held, 0)), order)
            after = seq_idx.gather(1, of_slab.clamp(max=max(length - 1, 0)))
            seq_idx = torch.where(place < of_slab, after, seq_idx)
        back, real = order.argsort(1)[:, held:], mask.sum(1)
    before = ring = 0
    seen, there = real.new_zeros(batch), None
    kept = torch.full((1, 1, 1), -1, device=device).expand(batch, groups, sizes.kept)
    if state is not None and state.keys is not None and state.values is not None and state.steps is not None:
        assert state.seen is not None
        seen, there, ring, before = state.seen, state.sinks, sizes.ring, sizes.sinks + sizes.kept + sizes.ring
        if there is None:
            there = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        kept = kept_of(sizes, seen, there)
        kept = torch.where(kept >= 0, kept + sizes.sinks, -1)[:, None].expand(-1, groups, -1)
        keys, values = (
            torch.cat((_in_order(old, seen, sizes, sizes.sinks).to(new.dtype), new), dim=1)
            for old, new in ((state.keys, keys), (state.values, values))
        )
        old = F.pad(_in_order(state.steps, seen, sizes, 0), (0, 0, 0, 0, sizes.sinks, 0))
        steps = torch.cat((old, steps), dim=1)
    start = -seen[:, None].expand(-1, length)
    goes_on = torch.ones_like(start, dtype=torch.bool)  # the sequence of the state
    if seq_idx is not None:
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        goes_on = begins.cumsum(1) == 0
        start = torch.where(goes_on, start, torch.where(begins, place, 0).cummax(1).values)
    done, leave = sizes.read_by_text(seen), sizes.leave
    # Of the ring and the call: which places end a step, in which step they leave.
    places = torch.arange(-ring, length, device=device)
    index = places - torch.cat((start[:, :1].expand(-1, ring), start), dim=1)
    gone = torch.where(torch.cat((goes_on.new_ones(batch, ring), goes_on), dim=1), (done * leave)[:, None], 0)
    exists = (places < real[:, None]) & (index >= gone)
    ends = exists & ((index + 1) % leave == 0)
    earlier = ends.cumsum(1) - ends.long()
    base = -done[:, None].expand(-1, length)
    if seq_idx is not None:
        base = torch.where(goes_on, base, earlier.gather(1, ring + start.clamp(min=0)))
    # A length that is a symbol: a graph may not ask for a single step. Those that are not there change nothing.
    many = (ring + length) // leave + 2 * torch.compiler.is_exporting()
    end = torch.zeros_like(ends[:, :1], dtype=torch.int64).expand(-1, many + 1)
    end = end.scatter(1, torch.where(ends, earlier, many), torch.arange(ring + length, device=device).expand_as(ends))
    end = end[:, :many]
    number = torch.arange(many, device=device)
    valid = number < ends.sum(1, keepdim=True)
    leaving = (end[..., None] - leave + 1 + torch.arange(leave, device=device)).clamp(min=0)
    own = text if not ring else torch.cat((text.new_ones(batch, ring), text), dim=1)
    sink = (index < sizes.sinks) & own
    if there is not None and sizes.sinks:
        sink = sink & ((places >= 0) | there.gather(1, index.clamp(0, sizes.sinks - 1)))
    stays = ~valid[..., None] | sink[:, None].expand(-1, many, -1).gather(2, leaving)
    first = valid & (index.gather(1, end) == leave - 1)
    leaving = torch.where(stays, -1, leaving + before - ring)
    kept, entered = running_top(score(steps).mT, leaving, first, kept)
    left = F.pad((leaving >= 0).sum(-1).cumsum(1), (1, 0))
    if there is not None:
        left = left + _left(sizes, done, there)[:, None]
    numbers = None if seq_idx is None else start
    return Past(
        keys, values, steps, before, ring, start, real, text, there, kept, entered, base, left, back, order, held,
        numbers,
    )  # fmt: skip


def score(steps: Tensor) -> Tensor:
    """By which tokens are kept: how strongly the scan would write one. (..., G, H / G) to (..., G)."""
    return steps.detach().sum(-1)


def _left(sizes: Sizes, done: Tensor, there: Tensor) -> Tensor:
    """(B,) tokens that have left in so many steps, without sinks."""
    gone = done * sizes.leave
    return gone - (there & (torch.arange(there.shape[1], device=there.device) < gone[:, None])).sum(1)


def kept_of(sizes: Sizes, seen: Tensor, there: Tensor | None) -> Tensor:
    """(B, m) int64: which of its places for kept tokens a state after `seen` tokens uses, the last ones; -1: not."""
    left = sizes.read_by_text(seen)
    left = left * sizes.leave if there is None else _left(sizes, left, there)
    place = torch.arange(sizes.kept, device=seen.device)
    return torch.where(place >= sizes.kept - left[:, None], place, -1)


def _in_order(held: Tensor, seen: Tensor, sizes: Sizes, sinks: int) -> Tensor:
    """(B, G, sinks + ring + kept, X) of a state as (B, sinks + kept + ring, G, X), the ring's oldest first."""
    first, ring, kept = held.split([sinks, sizes.ring, sizes.kept], dim=2)
    return torch.cat((first.transpose(1, 2), kept.transpose(1, 2), from_ring(ring, seen)), dim=1)


def running_top(by: Tensor, leaving: Tensor, first: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are kept after each of U steps, and at which step each enters the state.

    by (B, G, T): scores. leaving (B, U, c) int64: which leave at a step, in order; -1: none. first (B, U) bool: a step
    begins a sequence, of which nothing is kept before. kept (B, G, m): those at first, in order, -1 before all others.
    Of equal scores the earlier stays. Returns kept (B, G, U + 1, m), and entered (B, G, T), U at those that do not.
    """
    run = _running_top_op if torch.compiler.is_compiling() else _running_top
    return run(by, leaving, first, kept)


def _running_top(by: Tensor, leaving: Tensor, first: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    groups = by.shape[1]
    many, room = leaving.shape[1], kept.shape[2]
    by = F.pad(by.detach(), (1, 0), value=-torch.inf)
    every, gone = [kept], []
    for step in range(many):
        kept = kept.masked_fill(first[:, step, None, None], -1)
        pool = torch.cat((kept, leaving[:, step, None].expand(-1, groups, -1)), dim=2)
        order = by.gather(2, pool + 1).argsort(dim=2, descending=True, stable=True)
        kept = pool.gather(2, order[..., :room].sort(2).values)
        every.append(kept)
        gone.append(pool.gather(2, order[..., room:]))
    entered = torch.full_like(by, many, dtype=torch.int64)
    if many:
        out = torch.stack(gone, dim=2)
        at = torch.arange(many, device=by.device)[:, None].expand_as(out)
        entered = entered.scatter(2, out.flatten(2) + 1, at.flatten(2))
    return torch.stack(every, dim=2), entered[..., 1:]


@torch.library.custom_op("linmu_nn::running_top", mutates_args=())
def _running_top_op(by: Tensor, leaving: Tensor, first: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """A graph cannot hold a loop over as many steps as a symbol says."""
    kept, entered = _running_top(by, leaving, first, kept)
    return kept, entered.contiguous()


@_running_top_op.register_fake
def _(by: Tensor, leaving: Tensor, first: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    batch, groups, room = kept.shape
    return (
        leaving.new_empty(batch, groups, leaving.shape[1] + 1, room),
        leaving.new_empty(batch, groups, by.shape[2]),
    )
