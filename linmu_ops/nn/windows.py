"""The windows of a block: exact softmax attention to a token's neighbours."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..context_parallel import window_attention as split_window_attention
from ..token_layout import TokenLayout
from ..window_attention import window_attention
from ._inputs import (
    Call,
    Rotary,
    Triple,
    apply_rotary,
    first_tokens,
    last_tokens,
    real_tokens_first,
    split_heads,
    take,
)
from ._inputs import Windows as LayerWindows
from .shape import AttentionShape
from .state import MMATEState, written_in_place
from .text_window import (
    Rule,
    Sinks,
    as_ring,
    attend,
    attend_with_lse,
    causal_window_attention,
    chunk_size,
    from_ring,
)

_QUERIES = 256  # of which the scores against a whole row are held at a time


class Near(NamedTuple):
    """What each token gets from its window, before the output projection.

    Attributes:
        y: (B, L, H, P). Softmax attention to the tokens of the window; 0 where there are none.
        lse: (B, L, H), accumulate dtype. Log-sum-exp of their scores, -inf where there are none. None without
            `with_lse`.
        beyond: (B, L) int64. How many tokens lie before this one and outside of its window. None without `with_lse`.
    """

    y: Tensor
    lse: Tensor | None
    beyond: Tensor | None


class Windows(nn.Module):
    """Softmax attention to near tokens (LinMU, arXiv:2601.01322, sections 2 and 3.1).

    A visual token attends to its window, a box of its image or video. Layers with an odd index shift the boxes by half.
    Text attends to the last tokens of its row. Rotary embeddings are those of the original positions. There is no
    output projection.

    Args:
        shape: sizes and facts of the attention layer.
        window, image_window: sizes of a video's and an image's windows, as in `MMATEConfig`.
        text_window: text attends causally to the last this many tokens of its row; 0: text has no attention.
        sink_tokens: every later token sees the first this many tokens of its row, as far as they are text. Needs
            with_lse and text_window.
        with_lse: also give the log-sum-exp of the scores, and how many tokens lie beyond the window.

    Attributes:
        nothing_beyond: True where the replaced attention has no longer window than this one. Text then sees no sinks,
            and no token counts as beyond its window.
    """

    nothing_beyond = False

    def __init__(
        self,
        shape: AttentionShape,
        *,
        window: Triple,
        image_window: Triple | None,
        text_window: int,
        sink_tokens: int = 0,
        with_lse: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.text_window, self.sink_tokens, self.with_lse = shape, text_window, sink_tokens, with_lse
        self.layer_windows = layer_windows(window, image_window, shape.layer_idx)
        self.q_proj, self.k_proj, self.v_proj = shape.projections()
        self.q_norm, self.k_norm = shape.norm(), shape.norm()

    def forward(self, hidden_states: Tensor, call: Call) -> tuple[Near, MMATEState]:
        """What is near each token, and the state after these tokens: all but `ssm`, where `call.keep` asks for it.

        A single text token updates `call.state` in place where `written_in_place`.
        """
        layout, z = call.layout, hidden_states
        if layout is None and not self.text_window and not self.with_lse:
            shape = (*z.shape[:2], self.shape.num_heads, self.shape.head_dim)
            return Near(z.new_zeros(shape), None, None), MMATEState()
        q, k, v = self._projected(z)
        if not self.text_window and not self.with_lse:
            return Near(self._visual(q, k, v, call), None, None), MMATEState()
        rule = attend_with_lse if self.with_lse else attend
        turned_q, turned_k = self._turned(q, k, call.rotary)
        if layout is None and z.shape[1] == 1 and call.state is not None and call.state.keys is not None:
            return self._step(turned_q, turned_k, v, call.mask, call.state, rule)
        visual = None if layout is None else layout.visual_mask(z.device)
        seen = _seen(z, call.state)
        real = z.new_ones(z.shape[:2], dtype=torch.bool) if call.mask is None else call.mask
        index = real.cumsum(1) - 1 + seen[:, None]  # of a token in its sequence, padding not counted
        start = None
        if call.seq_idx is not None:
            begins = F.pad(call.seq_idx[:, 1:] != call.seq_idx[:, :-1], (1, 0))
            start = torch.where(begins, index, 0).cummax(1).values
            index = index - start
        order = None if call.mask is None else real_tokens_first(call.mask)
        sinks = self._sinks(turned_k, v, real, visual, seen, order, start, call)
        before = None if sinks is None or self.nothing_beyond else sinks.at_least(self.text_window, index)
        y, lse, new = self._text(turned_q, turned_k, v, order, seen, call, rule, sinks, before)
        if sinks is not None and call.seq_idx is not None and not self.nothing_beyond:
            y, lse = sinks.join(turned_q, y, lse, index, self.shape.scale, self.text_window)
        count = (index + 1).clamp(max=self.text_window)
        if before is not None:
            count = count + before.sum(-1)
        if layout is not None and visual is not None and self.with_lse:
            inside, inside_lse = self._visual(q, k, v, call)
            inside_lse = inside_lse.masked_fill(~visual[..., None], 0)  # -inf would make NaN gradients
            inside_count = layout.window_rank(*self.layer_windows, z.device)
            if sinks is not None:
                inside, inside_lse = sinks.join(turned_q, inside, inside_lse, index, self.shape.scale)
                inside_count = inside_count + sinks.at_least(1, index).sum(-1)
            y = torch.where(visual[..., None, None], inside, y)
            lse = torch.where(visual[..., None], inside_lse, lse)
            count = torch.where(visual, inside_count, count)
        elif layout is not None and visual is not None:
            y = torch.where(visual[..., None, None], self._visual(q, k, v, call), y)
        if not self.with_lse:
            return Near(y, None, None), new
        return Near(y, lse, self._told((index + 1 - count).clamp(min=0), visual)), new

    def _told(self, beyond: Tensor, visual: Tensor | None = None) -> Tensor:
        if not self.nothing_beyond:
            return beyond
        return torch.zeros_like(beyond) if visual is None else beyond.masked_fill(~visual, 0)

    def _projected(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(p(z), self.shape.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def _visual(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:
        """`window_attention` of visual tokens, 0 at text; with `with_lse` the pair that it gives."""
        assert call.layout is not None
        window, shift, wrap, image_window, image_shift = self.layer_windows
        cos, sin = call.rotary or (None, None)
        attend_in = window_attention if call.context is None else partial(split_window_attention, context=call.context)
        return attend_in(
            q, k, v, layout=call.layout, window=window, shift=shift, wrap=wrap, image_window=image_window,
            image_shift=image_shift, scale=self.shape.scale, cos=cos, sin=sin,
            interleaved=self.shape.interleaved_rotary, causal=self.shape.causal_windows, return_lse=self.with_lse,
        )  # fmt: skip

    def _turned(self, q: Tensor, k: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        interleaved = self.shape.interleaved_rotary
        return apply_rotary(q, rotary, interleaved), apply_rotary(k, rotary, interleaved)

    def _sinks(
        self,
        k: Tensor,
        v: Tensor,
        real: Tensor,
        visual: Tensor | None,
        seen: Tensor,
        order: Tensor | None,
        start: Tensor | None,
        call: Call,
    ) -> Sinks | None:
        """The first tokens of each row, from the state as far as they came before; with `start` (B, L), the places of
        the first ones of sequences among the row's tokens, those of each token's sequence."""
        n = self.sink_tokens
        if not n:
            return None
        state = call.state
        if start is not None and call.seq_idx is not None:
            return self._sinks_of_sequences(k, v, real, visual, order, start, call.seq_idx)
        at = torch.arange(n, device=k.device) - seen[:, None]
        keys, values, there = (None, None, None) if state is None else (state.keys, state.values, state.sinks)
        keys, values = (None if t is None else t[:, :, :n].transpose(1, 2).to(k.dtype) for t in (keys, values))
        text = torch.ones_like(real) if visual is None else ~visual
        came = first_tokens(text, there, at, order) & (at < real.sum(1, keepdim=True))
        return Sinks(first_tokens(k, keys, at, order), first_tokens(v, values, at, order), came)

    def _sinks_of_sequences(
        self,
        k: Tensor,
        v: Tensor,
        real: Tensor,
        visual: Tensor | None,
        order: Tensor | None,
        start: Tensor,
        seq_idx: Tensor,
    ) -> Sinks:
        batch, length = real.shape
        n = self.sink_tokens
        ranks = start[..., None] + torch.arange(n, device=k.device)
        at = ranks.clamp(max=max(length - 1, 0)).flatten(1)
        at = at if order is None else order.gather(1, at)
        keys, values, number = (take(t, at).unflatten(1, (length, n)) for t in (k, v, seq_idx))
        there = (number == seq_idx[..., None]) & (ranks < real.sum(1)[:, None, None])
        if visual is not None:
            there = there & ~take(visual, at).view(batch, length, n)
        return Sinks(keys, values, there)

    def _text(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        order: Tensor | None,
        seen: Tensor,
        call: Call,
        rule: Rule,
        sinks: Sinks | None,
        before: Tensor | None,
    ) -> tuple[Tensor, Tensor, MMATEState]:
        """Each text token by `rule` over the last `text_window` tokens of its sequence, padding not counted, and over
        the sinks that lie `before` these; not with seq_idx, where the caller adds them. Anything at visual tokens."""
        window, state, seq_idx = self.text_window, call.state, call.seq_idx
        batch, length = q.shape[:2]
        valid = torch.ones(batch, length, dtype=torch.bool, device=q.device) if call.mask is None else call.mask
        new = MMATEState()
        if call.keep:
            counted = valid if seq_idx is None else valid & (seq_idx == seq_idx[:, -1:])
            new = new._replace(seen=seen + counted.sum(1))
        keys = values = filled = None
        if state is not None and state.keys is not None and state.values is not None:
            keys, values = (from_ring(ring[:, :, -window:], seen).to(k.dtype) for ring in (state.keys, state.values))
            filled = torch.arange(window, device=q.device) >= window - seen[:, None]
        if call.context is not None:
            keys, values, filled = call.context.tokens_before(window, k, v, mask=call.mask, seq_idx=seq_idx)
            if seq_idx is not None:
                seq_idx = seq_idx - seq_idx[:, :1]  # what came before has the number 0
        if new.seen is not None:
            latest = [last_tokens(*both, window, call.mask, order) for both in ((k, keys), (v, values))]
            if seq_idx is not None:
                others = torch.arange(window, device=q.device) < window - new.seen[:, None]
                latest = [t.masked_fill(others[..., None, None], 0) for t in latest]
                sinks = None if sinks is None else sinks.of_the_last(valid)
            rings = [as_ring(t, new.seen) for t in latest]
            if sinks is not None:
                first = (sinks.keys.transpose(1, 2), sinks.values.transpose(1, 2))
                rings = [torch.cat(both, dim=2) for both in zip(first, rings, strict=True)]
            there = None if sinks is None else sinks.there
            new = new._replace(keys=rings[0], values=rings[1], sinks=there)
        if seq_idx is not None or before is None:
            sinks = before = None
        if order is not None:
            q, k, v, valid = (take(t, order) for t in (q, k, v, valid))
            seq_idx = None if seq_idx is None else take(seq_idx, order)
            before = None if before is None else take(before, order)
        # Of more than there are, most would be empty places. A graph serves all lengths.
        reach = min(window, length) if keys is None and not torch.compiler.is_compiling() else window
        y, lse = causal_window_attention(
            rule, q, k, v, valid, reach, self.shape.scale, keys, values, filled, sinks, before,
            _chunks_with_text(call.layout, chunk_size(reach), order, valid), seq_idx,
        )  # fmt: skip
        if call.context is not None and keys is not None and not length:
            y = y + keys[:0].sum()  # no token here needs them, but every rank takes part in their backward
        if order is not None:
            back = order.argsort(1)
            y, lse = take(y, back), take(lse, back)
        return y, lse, new

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, state: MMATEState, rule: Rule
    ) -> tuple[Near, MMATEState]:
        """One token of text. The new state's keys and values are the old one's where `written_in_place`."""
        keys, values, seen = state.keys, state.values, state.seen
        assert keys is not None and values is not None and seen is not None
        window, groups = self.text_window, k.shape[2]
        first = keys.shape[2] - window
        total = seen + 1 if real is None else seen + real[:, 0]
        newest = seen % window
        places = first + newest[:, None]
        if first:
            places = torch.cat((places, torch.where(seen < first, seen, places[:, 0])[:, None]), dim=1)
        at = places[:, None, :, None].expand(-1, groups, -1, self.shape.head_dim)

        def written(old: Tensor, new: Tensor) -> Tensor:
            new = new.to(old.dtype).transpose(1, 2)
            if not written_in_place():
                # A place that is scattered to twice, with the same key, would be given its gradient twice.
                hit = (torch.arange(old.shape[2], device=old.device) == places[..., None]).any(1)
                return torch.where((hit if real is None else hit & real)[:, None, :, None], new, old)
            new = new.expand(at.shape)
            if real is not None:
                new = torch.where(real[..., None, None], new, old.gather(2, at))
            return old.scatter_(2, at, new)

        keys, values = written(keys, k), written(values, v)
        slot = torch.arange(window, device=q.device)
        # Padding, too, sees a key: a row with none would be NaN.
        mask = (slot < total[:, None]) | (slot == newest[:, None])
        beyond, sinks = (total - window)[:, None].clamp(min=0), state.sinks
        if sinks is not None:
            place = torch.arange(first, device=q.device)
            came = (place == seen[:, None]) if real is None else (place == seen[:, None]) & real
            sinks = sinks | came
            before = sinks & (place < (total - window)[:, None])
            if self.nothing_beyond:
                before = torch.zeros_like(before)
            # As numbers: PyTorch 2.13's compiler cannot join masks on a CPU.
            mask = torch.cat((before.byte(), mask.byte()), dim=1).bool()
            beyond = beyond - before.sum(1, keepdim=True)
        near_keys, near_values = keys, values
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            # The rest is empty, in every row.
            kept = first + min(int(seen.max()) + 1, window)
            near_keys, near_values, mask = keys[:, :, :kept], values[:, :, :kept], mask[:, :kept]
        near_keys, near_values = (t.to(q.dtype).transpose(1, 2) for t in (near_keys, near_values))
        y, lse = rule(q, near_keys, near_values, mask[:, None], self.shape.scale)
        near = Near(y, lse, self._told(beyond)) if self.with_lse else Near(y, None, None)
        return near, MMATEState(keys=keys, values=values, sinks=sinks, seen=total)

    @torch.no_grad()
    def lse_beyond(self, hidden_states: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """What causal attention gives to the tokens outside the window: the log-sum-exps of the scores inside and
        outside, (B, L, H), and the number of tokens outside, (B, L) int64. Quadratic in time."""
        near, _ = self(hidden_states, call)
        assert near.lse is not None and near.beyond is not None
        q, k, _ = self._projected(hidden_states)
        q, k = self._turned(q, k, call.rotary)
        real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if call.mask is None else call.mask
        parts = []
        for start in range(0, q.shape[1], _QUERIES):
            rows = slice(start, start + _QUERIES)
            earlier = torch.arange(q.shape[1], device=q.device) <= torch.arange(q.shape[1], device=q.device)[rows, None]
            seen = earlier & real[:, None]
            if call.seq_idx is not None:
                seen = seen & (call.seq_idx[:, rows, None] == call.seq_idx[:, None])
            parts.append(attend_with_lse(q[:, rows], k, k, seen, self.shape.scale)[1])
        every = torch.cat(parts, dim=1).double()
        inside = near.lse.double()
        rest = (1 - (inside - every).exp()).clamp(min=0).log() + every
        return inside, rest, near.beyond * real


def _seen(z: Tensor, state: MMATEState | None) -> Tensor:
    """(B,) int64: tokens of each row before z (B, L, D)."""
    return z.new_zeros(z.shape[0], dtype=torch.int64) if state is None or state.seen is None else state.seen


def _chunks_with_text(layout: TokenLayout | None, size: int, order: Tensor | None, valid: Tensor) -> Tensor | None:
    """Chunks of `size` tokens, in `order`, that hold text; None for all: where it is not known on the host which.

    valid (B, L) bool: which tokens, in order, are not padding."""
    if layout is None or torch.compiler.is_compiling():
        return None
    if order is None:
        return layout.text_chunks(size, valid.device)
    if valid.device.type != "cpu":
        return None
    text = take(~layout.visual_mask(), order) & valid
    return F.pad(text, (0, -text.shape[1] % size)).view(-1, size).any(1).nonzero()[:, 0]


def layer_windows(window: Triple, image_window: Triple | None, layer_idx: int) -> LayerWindows:
    """The windows of a layer, shifted by half their size where it is odd."""

    def shift(size: Triple) -> Triple:
        t, h, w = size
        return (t // 2, h // 2, w // 2) if layer_idx % 2 else (0, 0, 0)

    return window, shift(window), "join", image_window, None if image_window is None else shift(image_window)
