"""Exact softmax attention to what is near a token, and to what is kept of what has left."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _transforms
from .._dims import accumulate_dtype
from .._layout_part import whole_frames
from .._registry import serves
from ..near_attention import near_attention
from ..token_layout import TokenLayout
from ..window_attention import window_attention
from ._inputs import Call, Rotary, Triple, apply_rotary, check_began, split_heads, take
from .past import Past, Sizes, kept_of, running_top, score
from .seen import seen_before
from .shape import AttentionShape
from .state import MMATEState, on_host
from .text_window import attend_with_lse, finite
from .windows import chunks_with_text, layer_windows

_NOTHING = -1e30  # the log of no weight; -inf would make NaN gradients
_QUERIES = 256  # of which the scores against a whole row are held at a time


class Near(NamedTuple):
    """What each token gets from what is near or kept, before the output projection.

    Attributes:
        y: (B, L, H, P). Softmax attention to these tokens.
        lse: (B, L, H), accumulate dtype. Log-sum-exp of their scores.
        far: (B, L) int64. How many tokens are far.
        when: (B, L) int64. After how many steps of the call each token reads.
    """

    y: Tensor
    lse: Tensor
    far: Tensor
    when: Tensor


class Left(NamedTuple):
    """Tokens of which some enter the scan's state at once, in order.

    Attributes:
        keys, values: (B, G, n, P), keys rotated.
        steps: (B, G, n, H / G), step sizes.
        enters: (B, G, n) bool.
    """

    keys: Tensor
    values: Tensor
    steps: Tensor
    enters: Tensor


class NearAttention(nn.Module):
    """Softmax attention to near and kept tokens, with the projections of an attention layer.

    A visual token attends to its window, a box of its image or video. Layers with an odd index shift the boxes by half;
    tokens that a shift cuts off at an edge are windows of their own. It reads at the start of its slab: the frames
    whose windows begin together. Text attends to the last tokens of its row. Both attend to the sinks, and to what is
    kept. There is no output projection.

    Args:
        shape: sizes and facts of the attention layer.
        window, image_window, text_window, sink_tokens, kept_tokens: as in `ExactConfig`.

    Attributes:
        v_norm: of the values per head, where the replaced attention has one; it has no weights.
        nothing_beyond: True where the replaced attention has no longer window than this one. Text then sees the last
            `text_window` tokens and nothing else.
    """

    nothing_beyond = False

    def __init__(
        self,
        shape: AttentionShape,
        *,
        window: Triple,
        image_window: Triple | None,
        text_window: int,
        sink_tokens: int,
        kept_tokens: int,
    ) -> None:
        super().__init__()
        self.shape, self.text_window, self.sink_tokens = shape, text_window, sink_tokens
        self.sizes = Sizes(text_window, sink_tokens, kept_tokens)
        self.layer_windows = layer_windows(window, image_window, shape.layer_idx)._replace(wrap="mask")
        self.q_proj, self.k_proj, self.v_proj = shape.projections()
        self.q_norm, self.k_norm = shape.norm(), shape.norm()
        self.v_norm: nn.Module = nn.Identity()

    @property
    def state_tokens(self) -> int:
        """Tokens whose keys a state has."""
        return self.sizes.sinks + self.sizes.ring + self.sizes.kept

    def project(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, L, H, P), k and v (B, L, G, P), not rotated."""
        q, k, v = (split_heads(p(z), self.shape.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), self.v_norm(v).to(v.dtype)

    def rotate(self, t: Tensor, rotary: Rotary | None) -> Tensor:
        """Queries or keys as at their positions."""
        return apply_rotary(t, rotary, self.shape.interleaved_rotary)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, turned: Tensor, past: Past, call: Call) -> Near:
        """What is near or kept, of each token. q, k, v: as of `project`; turned: q, rotated."""
        layout, own, together = call.layout, turned, _in_one_call(turned)
        if past.order is not None:
            own = take(F.pad(turned, (0, 0, 0, 0, past.held, 0)), past.order)
        y, lse, when = self._before(own, past, layout) if together else self._text(own, past, layout)
        if past.back is not None:
            y, lse, when = (take(t, past.back) for t in (y, lse, when))
        if layout is not None and layout.has_visual:
            visual = layout.visual_mask(q.device)
            inside = self._window(q, k, v, call)
            # -inf at text would make NaN gradients.
            inside_y, inside_lse = inside[0], inside[1].masked_fill(~visual[..., None], 0)
            if layout.is_part:
                inside_y, inside_lse = self._in_cut_slabs(turned, inside_y, inside_lse, past, call, layout)
            if together:
                inside_y, inside_lse = _as_one(inside_y, inside_lse, y, lse)
            else:
                inside_y, inside_lse, read = self._before_slabs(turned, inside_y, inside_lse, past, layout)
                when = torch.where(visual, read, when)
            y = torch.where(visual[..., None, None], inside_y, y)
            lse = torch.where(visual[..., None], inside_lse, lse)
        far = past.far(when, self.sizes.kept)
        if self.nothing_beyond:
            far = torch.zeros_like(far) if layout is None else far.masked_fill(~layout.visual_mask(q.device), 0)
        return Near(y, lse, far, when)

    def _window(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:
        assert call.layout is not None
        window, shift, wrap, image_window, image_shift = self.layer_windows
        cos, sin = call.rotary or (None, None)
        return window_attention(
            q, k, v, layout=call.layout, window=window, shift=shift, wrap=wrap, image_window=image_window,
            image_shift=image_shift, scale=self.shape.scale, cos=cos, sin=sin,
            interleaved=self.shape.interleaved_rotary, causal=self.shape.causal_windows, return_lse=True,
        )  # fmt: skip

    def _before(self, q: Tensor, past: Past, layout: TokenLayout | None) -> tuple[Tensor, Tensor, Tensor]:
        """What `_text` gives of text, and `_before_slabs` of visual tokens, in one call: y, lse and when, of places. q
        (B, L, H, P), of places."""
        everything_near = self._all_near(past, q.shape[1])
        seen = seen_before(self.sizes, past, layout, self.layer_windows, self.nothing_beyond, everything_near)
        y, lse = near_attention(
            q, past.keys, past.values, seen.low, seen.high, seen.which, seen.listed, scale=self.shape.scale
        )
        return y, lse, seen.when

    def _text(self, q: Tensor, past: Past, layout: TokenLayout | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of each place, as if it were text: y, lse and after how many steps it reads. q (B, L, H, P), of places.

        Chunks of `leave` places meet the same keys: as many before them as any of them sees, the sinks, and what is
        kept after the two steps that they read after. What lies in a later sequence of a chunk has nothing but itself
        to see.
        """
        sizes, device = self.sizes, q.device
        batch, length, _, _ = q.shape
        size, exporting = sizes.leave, torch.compiler.is_exporting()
        index = torch.arange(length, device=device) - past.start
        read = sizes.read_by_text(index)
        when = (past.base + read).clamp(0, past.kept.shape[2] - 1)
        # A length that is a symbol: a graph may not ask for a single chunk. The last token, repeated, fills it up.
        chunks = length // size + 2 if exporting else -(-length // size)
        every = torch.arange(batch * chunks, device=device)
        places = torch.arange(length, device=device) < past.real[:, None]
        some = None if exporting else chunks_with_text(layout, size, past.back, past.text & places)
        if some is not None:
            every = some
        rows, first = every // chunks, every % chunks * size
        own = (first[:, None] + torch.arange(size, device=device)).clamp(max=length - 1)
        at = rows[:, None] * length + own
        read, own_when, start = (t.flatten()[at] for t in (read, when, past.start))
        lowest = start + read * size
        if self.nothing_beyond:
            lowest = torch.maximum(lowest, own - sizes.window + 1)
        reach = sizes.ring if torch.compiler.is_compiling() else min(sizes.ring, past.ring + length)
        keys_at = first[:, None] + torch.arange(-reach, size, device=device)
        # A query sees itself even where it is padding: a row with no key at all would be NaN.
        mask = (keys_at[:, None] >= lowest[..., None]) & (keys_at[:, None] <= own[..., None])
        mask = mask & (keys_at < past.real[rows][:, None])[:, None] | (keys_at[:, None] == own[..., None])
        found = [past.known(keys_at)]
        seen = [mask]
        if not self._all_near(past, length):
            ids, there = past.sinks(rows, own[:, 0], sizes.sinks)
            found.append(ids)
            seen.append(there[:, None] & (torch.arange(sizes.sinks, device=device) < (read * size)[..., None]))
        found_by_head: list[Tensor] = []
        if sizes.kept and not self._all_near(past, length):
            last = torch.where(read > 0, own_when, 0).amax(1)
            for step in (last, last - 1):
                ids = past.kept.transpose(1, 2)[rows, step.clamp(min=0)]
                reads = (own_when == step[:, None]) & (read > 0)
                seen.append(reads[..., None] & (ids[:, 0] >= 0)[:, None])
                found_by_head.append(ids)
        if self.nothing_beyond:
            seen[1:] = [torch.zeros_like(s) for s in seen[1:]]
        y, lse = self._attend(q.flatten(0, 1)[at], past, rows, found, found_by_head, _joined(seen))
        if some is not None:
            y, lse = (t.new_zeros(batch * chunks, *t.shape[1:]).index_copy(0, some, t) for t in (y, lse))
        y, lse = (t.reshape(batch, chunks * size, *t.shape[2:]) for t in (y, lse))
        if exporting:
            within = torch.arange(length, device=device)
            return y.index_select(1, within), lse.index_select(1, within), when
        return y[:, :length], lse[:, :length], when

    def _all_near(self, past: Past, length: int) -> bool:
        """Whether it is known on the host that nothing has left before text."""
        return self.nothing_beyond or not (
            torch.compiler.is_compiling() or past.before or length >= self.sizes.window + self.sizes.leave - 1
        )

    def _before_slabs(
        self, q: Tensor, y: Tensor, lse: Tensor, past: Past, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adds to the attention within windows, y and lse, what lies before a token's slab: sinks, what is kept, and
        the fewer than `leave` tokens that have not left; and text that stands between tokens of the slab, before it.
        Also after how many steps a token reads. Anything at text."""
        sizes, device, length = self.sizes, q.device, layout.length
        size = sizes.leave
        tokens, begin, inverse, between = layout.slab_chunks(*self.layer_windows, device)

        rows, place = tokens[:, 0] // length, past.places(begin, length)
        at = rows * past.start.shape[1] + place
        start = past.start.flatten()[at]
        read = (place - start) // size
        when = (past.base.flatten()[at] + read).clamp(0, past.kept.shape[2] - 1)
        ids, there = past.sinks(rows, place, sizes.sinks)
        keys_at = (start + read * size)[:, None] + torch.arange(size - 1, device=device)
        found = [past.known(keys_at), ids]
        seen = [keys_at < place[:, None], there & (torch.arange(sizes.sinks, device=device) < (read * size)[:, None])]
        seen = [part[:, None].expand(-1, tokens.shape[1], -1) for part in seen]
        if between.shape[1]:
            text = past.places(between, length)
            found.append(past.known(text))
            there = (between >= 0) & (text < past.real[rows][:, None])
            seen.append(there[:, None] & (between[:, None] < tokens[..., None]))
        by_head = []
        if sizes.kept:
            kept = past.kept.transpose(1, 2)[rows, when]
            seen.append(((kept[:, 0] >= 0) & (read > 0)[:, None])[:, None].expand(-1, tokens.shape[1], -1))
            by_head.append(kept)
        mask, when_read = _joined(seen), when[inverse // tokens.shape[1]]
        if not mask.shape[-1]:
            return y, lse, when_read
        none = ~mask.any(-1, keepdim=True)
        mask = mask | none
        before_y, before_lse = self._attend(q.flatten(0, 1)[tokens], past, rows, found, by_head, mask)
        before_lse = before_lse.masked_fill(none, _NOTHING)
        before_y = before_y.flatten(0, 1)[inverse]
        before_lse = before_lse.flatten(0, 1)[inverse]
        return *_as_one(y, lse, before_y, before_lse), when_read

    def _in_cut_slabs(
        self, q: Tensor, y: Tensor, lse: Tensor, past: Past, call: Call, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """Adds to the attention within windows, y and lse, what came in earlier calls of a slab that was cut: visual
        tokens of the same window, and text that stands between."""
        _, first, _, queries, keys, inverse, _ = layout.cut(self.layer_windows, q.device)
        if call.state is None or call.state.slab_tokens is None or call.state.slab_text is None:
            return y, lse
        if not queries.shape[0] or not keys.shape[1] + call.state.slab_text.shape[1]:
            return y, lse
        tokens, between = call.state.slab_tokens, call.state.slab_text
        # The state's tokens stand at places 0, 1, ... as they do in it.
        many, rows = tokens.shape[1], queries[:, 0] // layout.length
        number = torch.where(tokens < 0, many, tokens - first[:, None]).clamp(0, many)
        at = torch.zeros_like(F.pad(tokens, (0, 1)))
        at = at.scatter(1, number, torch.arange(many, device=q.device).expand_as(number))
        found = past.before + torch.cat((at[rows[:, None], keys.clamp(min=0)], between[rows].clamp(min=0)), dim=1)
        mask = _joined([keys >= 0, between[rows] >= 0])
        none = ~mask.any(1)[:, None, None]
        mask = (mask[:, None] | none).expand(-1, queries.shape[1], -1)
        cut_y, cut_lse = self._attend(q.flatten(0, 1)[queries], past, rows, [found], [], mask)
        cut_lse = cut_lse.masked_fill(none, _NOTHING)
        there, at = inverse >= 0, inverse.clamp(min=0)
        cut_lse = cut_lse.flatten(0, 1)[at].masked_fill(~there[..., None], _NOTHING)
        cut_y = cut_y.flatten(0, 1)[at].masked_fill(~there[..., None, None], 0)
        return _as_one(y, lse, cut_y, cut_lse)

    def _attend(
        self, q: Tensor, past: Past, rows: Tensor, found: list[Tensor], by_head: list[Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention of n chunks of queries (n, Q, H, P), each to `found` (n, J) and `by_head` (n, G, m) of its row's T
        tokens, with a mask of all of these."""
        total, groups = past.keys.shape[1:3]
        keys, values, broken = finite(past.keys, past.values)
        one = torch.cat(found, dim=1) + rows[:, None] * total
        keys_found, values_found = (t.flatten(0, 1)[one] for t in (keys, values))
        broken_found = broken.flatten()[one]
        if by_head:
            every = torch.cat(by_head, dim=2).clamp(min=0) + rows[:, None, None] * total
            broken_found = torch.cat((broken_found, broken.flatten()[every].amax(1)), dim=1)
            flat = (every * groups + torch.arange(groups, device=q.device)[:, None]).mT
            keys_found, values_found = (
                torch.cat((t, more.flatten(0, 2)[flat]), dim=1)
                for t, more in ((keys_found, keys), (values_found, values))
            )
        y, lse = attend_with_lse(q, keys_found, values_found, mask, self.shape.scale)
        poisoned = (mask & broken_found.bool()[:, None]).any(-1)[..., None]
        return y.masked_fill(poisoned[..., None], torch.nan), lse.masked_fill(poisoned, torch.nan)

    def far_mass(self, q: Tensor, past: Past, when: Tensor) -> Tensor:
        """(B, L, H): the log-sum-exp of the scores of what is far from each token. Quadratic in time."""
        groups, total, parts = self.shape.num_kv_heads, past.keys.shape[1], []
        keys = past.keys.transpose(1, 2).to(accumulate_dtype(q.dtype))
        first = past.start if past.back is None else take(past.start, past.back)
        for start in range(0, q.shape[1], _QUERIES):
            rows = slice(start, start + _QUERIES)
            far = past.entered[:, :, None] < when[:, None, rows, None]
            if past.numbers is not None:
                far = far & (torch.arange(total, device=q.device) >= first[:, rows, None])[:, None]
            queries = q[:, rows].unflatten(2, (groups, q.shape[2] // groups)).to(keys.dtype)
            scores = torch.einsum("bigrp,bgjp->bgrij", queries, keys) * self.shape.scale
            parts.append(scores.masked_fill(~far[:, :, None], -torch.inf).logsumexp(-1).flatten(1, 2).mT)
        return torch.cat(parts, dim=1)

    def keep(self, past: Past, call: Call) -> tuple[MMATEState, Tensor, Tensor]:
        """The state after a call, without the scan's; (B, G, T) bool, what has entered that by then; and (B,), after
        how many steps of the call that is. Where the call cuts a slab, the state before it, and its tokens."""
        sizes, device = self.sizes, past.keys.device
        batch, total, groups, _ = past.keys.shape
        end, slab = past.real, MMATEState()
        if call.layout is not None and call.layout.is_part:
            end, slab = self._cut(past, call.layout, call.state)
        last = torch.minimum(end, past.real - 1).clamp(min=0)[:, None]
        first, base = past.start.gather(1, last), past.base.gather(1, last)
        seen = end - first[:, 0]
        done = sizes.read_by_text(seen)[:, None]
        rows = torch.arange(batch, device=device)
        when = (base + done).clamp(0, past.kept.shape[2] - 1)

        def held(t: Tensor, ids: Tensor, there: Tensor) -> Tensor:
            """(B, G, n, X) of t (B, T, G, X), at ids (B, n) or (B, G, n), 0 where it is not there."""
            ids, there = (i if i.dim() == 3 else i[:, None].expand(-1, groups, -1) for i in (ids, there))
            found = t.transpose(1, 2).gather(2, ids.clamp(0, total - 1)[..., None].expand(-1, -1, -1, t.shape[3]))
            return found.masked_fill(~there[..., None], 0)

        place = end[:, None] - sizes.ring + torch.arange(sizes.ring, device=device)
        kept = past.kept.gather(2, when[:, None, :, None].expand(-1, groups, -1, sizes.kept))[:, :, 0]
        kept = kept.masked_fill((done == 0)[..., None], -1)
        sinks, there = past.sinks(rows, last[:, 0], sizes.sinks)
        if slab.slab_keys is not None:
            there = there & (torch.arange(sizes.sinks, device=device) < seen[:, None])
        # Token i of a row is at i % ring.
        turn = (torch.arange(sizes.ring, device=device) - seen[:, None]) % sizes.ring
        ring = ((past.before + place).gather(1, turn), (place >= first).gather(1, turn))
        parts = [(sinks, there), ring, (kept, kept >= 0)]
        keys, values = (torch.cat([held(t, *at) for at in parts], dim=2) for t in (past.keys, past.values))
        steps = torch.cat([held(past.steps, *at) for at in parts[1:]], dim=2)
        entered = past.entered < when[:, None]
        if past.numbers is not None:
            entered = entered & (torch.arange(total, device=device) >= first)[:, None]
        state = slab._replace(keys=keys, values=values, steps=steps, seen=seen)
        return state._replace(sinks=there) if sizes.sinks else state, entered, when[:, 0]

    def check_part(self, op: str, layout: TokenLayout, state: MMATEState | None, device: torch.device) -> None:
        """Raise ValueError where a part of an image or video can't go on from a state, or may not end where it does."""
        if torch.compiler.is_dynamo_compiling():
            if not self.shape.causal_windows:
                raise ValueError(
                    f"{op}: layout must be of whole videos where tokens see later ones, in a compiled graph"
                )
            return  # what follows reads the layout on the host
        known = layout.cut(self.layer_windows, device).rows
        check_began(op, layout, state)
        held = None if state is None else state.slab_tokens
        for i, ((row, *sizes), (first, count)) in enumerate(zip(layout.blocks.tolist(), layout.spans, strict=True)):
            wanted = known[row][1] if first else 0
            goes_on = first + count < math.prod(sizes) and known[row][0] < layout.length
            if (wanted or goes_on) and not self.shape.causal_windows:
                self._refuse_cut(op, layout, i)
            # Elsewhere to ask would be to wait.
            if not wanted or (held is not None and not on_host(held)):
                continue
            here = 0 if held is None else int((held[row] >= 0).sum())
            if here != wanted:
                raise ValueError(
                    f"{op}: layout must go on where the call before cut the video of row {row}, {here} tokens into a "
                    f"slab, got one that goes on after {wanted}"
                )

    def whole_frames(self, frames: int) -> list[int]:
        """Before which frames of an image or video the windows of every layer end."""
        (size, *_), _ = self.layer_windows.of(image=frames == 1)
        return whole_frames(frames, size, (0, size // 2), self.layer_windows.wrap == "mask")

    def _refuse_cut(self, op: str, layout: TokenLayout, block: int) -> None:
        """A cut within a slab whose tokens see later ones of it."""
        (row, frames, height, width), (first, count) = layout.blocks[block].tolist(), layout.spans[block]
        borders = self.whole_frames(frames)
        at = (first or count) / (height * width)
        near = [*[b for b in borders if b <= at][-1:], *[b for b in borders if b > at][:1]]
        where = f"nearest before frame {' or '.join(map(str, near))}" if near else "which this one does nowhere"
        raise ValueError(
            f"{op}: a video whose tokens see later ones must be cut where the windows of every layer end, {where}, got "
            f"a cut after {at:g} of {frames} frames in row {row}"
        )

    def _cut(self, past: Past, layout: TokenLayout, state: MMATEState | None) -> tuple[Tensor, MMATEState]:
        """Where the slab begins that a call cuts, (B,) places, past all where it cuts none; and what a state has of
        the tokens since then."""
        device = past.keys.device
        begin, *_, known = layout.cut(self.layer_windows, device)
        if all(at == layout.length for at, *_ in known):
            return past.real, MMATEState()
        place = begin.clamp(0, layout.length - 1)[:, None]
        place = (place if past.back is None else past.back.gather(1, place))[:, 0]
        end = torch.where(begin < 0, 0, torch.where(begin < layout.length, place, past.real))
        earlier = None if state is None else state.slab_tokens
        before = 0 if state is None or state.slab_text is None else state.slab_text.shape[1]
        # At most so many, and so many of text, whatever padding there is.
        many = max(layout.length - max(at, 0) + past.held * (at < 0) for at, *_ in known)
        some = max(text + before * (at < 0) for at, _, text in known)
        place = end[:, None] + torch.arange(many, device=device)
        there, place = place < past.real[:, None], place.clamp(max=past.start.shape[1] - 1)
        numbers = layout.numbers(device)
        if earlier is not None:
            numbers = torch.cat((earlier, numbers), dim=1)
        if past.order is not None:
            numbers = take(numbers, past.order)
        numbers = torch.where(there, take(numbers, place), -2)
        keys, values, steps = (
            take(t, past.before + place).masked_fill(~there[..., None, None], 0).transpose(1, 2)
            for t in (past.keys, past.values, past.steps)
        )
        text_first = (numbers != -1).byte().argsort(dim=1, stable=True)[:, :some]
        between = torch.where(take(numbers, text_first) == -1, text_first, -1)
        return end, MMATEState(
            slab_keys=keys, slab_values=values, slab_steps=steps, slab_tokens=numbers, slab_text=between
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, steps: Tensor, real: Tensor | None, state: MMATEState
    ) -> tuple[Near, MMATEState]:
        """One token of text, written to the state. q (B, 1, H, P), rotated, k and v (B, 1, G, P), steps
        (B, 1, G, H / G). Nothing leaves yet."""
        sizes, device = self.sizes, q.device
        keys, values, held, seen = state.keys, state.values, state.steps, state.seen
        assert keys is not None and values is not None and held is not None and seen is not None
        first, ring = sizes.sinks, sizes.ring
        newest = (seen % ring)[:, None]
        places = first + newest
        if first:
            places = torch.cat((places, torch.where(seen[:, None] < first, seen[:, None], places)), dim=1)

        def write(old: Tensor, new: Tensor, at: Tensor) -> None:
            at = at[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
            new = new.to(old.dtype).transpose(1, 2).expand(at.shape)
            if real is not None:
                new = torch.where(real[..., None, None], new, old.gather(2, at))
            old.scatter_(2, at, new)

        write(keys, k, places)
        write(values, v, places)
        write(held, steps, newest)
        number = torch.arange(ring, device=device)
        index = seen[:, None] - (newest - number) % ring
        gone = sizes.read_by_text(seen)[:, None] * sizes.leave
        lowest = torch.maximum(gone, seen[:, None] - sizes.window + 1) if self.nothing_beyond else gone
        # Padding, too, sees a key: a row with none would be NaN.
        near = (index >= lowest.clamp(min=0)) | (number == newest)
        kept = kept_of(sizes, seen, state.sinks) >= 0
        parts, sinks = [near, kept], state.sinks
        far = gone[:, 0] - kept.sum(1)
        if sinks is not None:
            place = torch.arange(first, device=device)
            before = sinks & (place < gone)
            far = far - before.sum(1)
            came = place == seen[:, None]
            sinks = sinks | (came if real is None else came & real)
            parts = [before, *parts]
        if self.nothing_beyond:
            parts = [near if part is near else torch.zeros_like(part) for part in parts]
            far = torch.zeros_like(far)
        mask = _joined(parts)
        if on_host(gone) and len(gone) and not bool(gone.any()):
            # The rest is empty, in every row.
            some = first + min(int(seen.max()) + 1, ring)
            keys, values, mask = keys[:, :, :some], values[:, :, :some], mask[:, :some]
        keys, values = (t.to(q.dtype).transpose(1, 2) for t in (keys, values))
        y, lse = attend_with_lse(q, keys, values, mask[:, None], self.shape.scale)
        total = seen + 1 if real is None else seen + real[:, 0]
        new = state._replace(seen=total, sinks=sinks)
        return Near(y, lse, far[:, None], torch.zeros_like(newest)), new

    def leave(self, before: Tensor, state: MMATEState) -> Left | None:
        """After a step that took rows from `before` to `state.seen` tokens: where a step of leaving is over, the oldest
        leave, and the kept ones are overwritten. What enters the scan's state then; None where that is nothing."""
        sizes, device = self.sizes, before.device
        keys, values, held, seen = state.keys, state.values, state.steps, state.seen
        assert keys is not None and values is not None and held is not None and seen is not None
        done = sizes.read_by_text(before)
        due = sizes.read_by_text(seen) > done
        if on_host(due) and not bool(due.any()):
            return None
        first, ring, room, groups = sizes.sinks, sizes.ring, sizes.kept, keys.shape[1]
        index = done[:, None] * sizes.leave + torch.arange(sizes.leave, device=device)
        stays = ~due[:, None]
        if state.sinks is not None:
            stays = stays | ((index < first) & state.sinks.gather(1, index.clamp(max=first - 1)))
        place = torch.arange(room, device=device)
        places = torch.cat(((ring + place).expand(done.shape[0], -1), index % ring), dim=1)

        def take_of(t: Tensor, at: Tensor) -> Tensor:
            return t.gather(2, at[..., None].expand(*at.shape, t.shape[3]))

        at = places[:, None].expand(-1, groups, -1)
        pool = (take_of(keys, first + at), take_of(values, first + at), take_of(held, at))
        leaving = torch.where(stays, -1, room + torch.arange(sizes.leave, device=device))[:, None]
        kept = kept_of(sizes, before, state.sinks)[:, None].expand(-1, groups, -1)
        every, entered = running_top(score(pool[2]), leaving, torch.zeros_like(stays[:, :1]), kept)
        chosen = every[:, :, 1]
        for t, of, begin in zip((keys, values, held), pool, (first + ring, first + ring, ring), strict=True):
            t[:, :, begin:].copy_(take_of(of, chosen.clamp(min=0)).masked_fill(chosen[..., None] < 0, 0))
        return Left(*pool, entered == 0)


def _as_one(y: Tensor, lse: Tensor, more_y: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Of two attentions, y and lse of one to the keys of both."""
    apart = more_lse - lse
    return torch.lerp(y, more_y, apart.sigmoid().to(y.dtype)[..., None]), lse - F.logsigmoid(-apart)


def _in_one_call(q: Tensor) -> bool:
    """Whether the op serves what is near: where a kernel does. Elsewhere PyTorch's own calls are faster than its
    reference, and a compiler fuses them."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is Tensor
        and serves("near_attention", q) == "cpu"
        and not _transforms.active()
        and not torch.is_autocast_enabled("cpu")
    )


def _joined(masks: list[Tensor]) -> Tensor:
    """Side by side. As numbers: PyTorch 2.13's compiler cannot join masks on a CPU."""
    return torch.cat([m.byte() for m in masks], dim=-1).bool()
