"""Local-Swin: exact softmax attention inside small windows of visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dims import accumulate_dtype
from ..token_layout import TokenLayout
from ..window_attention import window_attention
from ._inputs import (
    Rotary,
    Triple,
    Windows,
    apply_rotary,
    check_inputs,
    first_tokens,
    last_tokens,
    number_sequences,
    real_tokens_first,
    split_heads,
    take,
    without_padding,
)
from .config import PAPER, MMATEConfig
from .state import MMATEState, check_state, continue_state, written_in_place
from .text_window import (
    Rule,
    Sinks,
    as_ring,
    attend,
    attend_with_mass,
    causal_window_attention,
    chunk_size,
    from_ring,
)

_QUERIES = 256  # of which the scores against a whole row are held at a time


class Near(NamedTuple):
    """What the tokens of its window give each token, before the output projection.

    Attributes:
        y: (B, L, H, P). Softmax attention over them; 0 where there is none.
        mass: (B, L, H), accumulate dtype. Log-sum-exp of their scores; -inf where there is none.
        beyond: (B, L) int64. How many other tokens lie before this one.
    """

    y: Tensor
    mass: Tensor
    beyond: Tensor


class LocalSwin(nn.Module):
    """Window attention on visual tokens, 0 on text (LinMU, arXiv:2601.01322, sections 2 and 3.1).

    Windows are alternately shifted fixed boxes of a (T, H, W) block; no causal mask inside. Attention's own rotary
    embedding at the original positions. With `text_window`, text attends causally over the last tokens of its row.
    Arguments as in `MMATE`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        layer_idx: int = 0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        project: bool = True,
        config: MMATEConfig = PAPER,
    ) -> None:
        """project: apply an output projection; without, `forward` gives `Near` in the place of the output."""
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.softmax_scale = self.head_dim**-0.5 if scale is None else scale
        self.layer_idx, self.config = layer_idx, config
        H, G, P = self.num_heads, self.num_kv_heads, self.head_dim
        self.q_proj = nn.Linear(dim, H * P, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, G * P, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, G * P, bias=qkv_bias)
        self.o_proj = nn.Linear(H * P, dim, bias=out_bias) if project else None
        self.q_norm = qk_norm(P) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(P) if qk_norm else nn.Identity()
        self.windows = layer_windows(config, layer_idx)
        span = [2 * w - 1 for w in config.window]
        self.bias = nn.Parameter(torch.zeros(H, *span)) if config.relative_bias else None

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layout: TokenLayout | None = None,
        grid: Sequence[int] | None = None,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        state: MMATEState | None = None,
        return_state: bool = False,
        seq_idx: Tensor | None = None,
    ) -> Tensor | Near | tuple[Tensor | Near, MMATEState]:
        """As `MMATE.forward`; of the state, all but `ssm` and `conv` is read and returned."""
        layout = check_inputs(
            "LocalSwin", hidden_states, self.dim, layout, grid, attention_mask, self.layer_idx, self.windows
        )
        if state is not None:
            check_state("LocalSwin", state, hidden_states.shape[0], self.config.sink_tokens + self.config.text_window)
        hidden_states, position_embeddings = without_padding(hidden_states, position_embeddings, attention_mask)
        seq_idx = number_sequences("LocalSwin", seq_idx, hidden_states, attention_mask, layout, state)
        keep = return_state or state is not None
        out: Tensor | Near
        if self.o_proj is None:
            out, new = self._near(hidden_states, layout, position_embeddings, attention_mask, state, keep, seq_idx)
        else:
            y, new = self._attend(hidden_states, layout, position_embeddings, attention_mask, state, keep, seq_idx)
            out = torch.zeros_like(hidden_states) if y is None else self.o_proj(y.flatten(2))
            if y is not None and self.o_proj.bias is not None and layout is not None and not self.config.text_window:
                out = out.masked_fill(~layout.visual_mask(out.device)[..., None], 0)
        new = continue_state(state, new)
        return (out, new) if return_state else out

    def _projected(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(p(z), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def _windows(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, rotary: Rotary | None, return_lse: bool
    ) -> Any:
        """`window_attention` of visual tokens."""
        window, shift, wrap, image_window, image_shift = self.windows
        cos, sin = rotary or (None, None)
        return window_attention(
            q, k, v, layout=layout, window=window, shift=shift, wrap=wrap, image_window=image_window,
            image_shift=image_shift, scale=self.softmax_scale, bias=self.bias, cos=cos, sin=sin,
            interleaved=self.config.rotary_interleaved, causal=self.config.causal_windows, return_lse=return_lse,
        )  # fmt: skip

    def _turned(self, q: Tensor, k: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        interleaved = self.config.rotary_interleaved
        return apply_rotary(q, rotary, interleaved), apply_rotary(k, rotary, interleaved)

    def _attend(
        self,
        z: Tensor,
        layout: TokenLayout | None,
        rotary: Rotary | None,
        attention_mask: Tensor | None,
        state: MMATEState | None,
        return_state: bool,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor | None, MMATEState]:
        """(B, L, H, P); None where no token attends, anything at text without a window."""
        if layout is None and not self.config.text_window:
            return None, MMATEState()
        q, k, v = self._projected(z)
        visual = None if layout is None else self._windows(q, k, v, layout, rotary, False)
        if not self.config.text_window:
            return visual, MMATEState()
        q, k = self._turned(q, k, rotary)
        if (last := self._before_step(z, layout, state)) is not None:
            y, _, _, new = self._step(q, k, v, attention_mask, last, attend)
            return y, new
        seen = _seen(z, state)
        order = None if attention_mask is None else real_tokens_first(attention_mask)
        text, _, new = self._text(
            q, k, v, attention_mask, order, seen, state, return_state, layout, attend, seq_idx=seq_idx
        )
        if visual is None or layout is None:
            return text, new
        return torch.where(layout.visual_mask(z.device)[..., None, None], visual, text), new

    def _near(
        self,
        z: Tensor,
        layout: TokenLayout | None,
        rotary: Rotary | None,
        attention_mask: Tensor | None,
        state: MMATEState | None,
        return_state: bool,
        seq_idx: Tensor | None,
    ) -> tuple[Near, MMATEState]:
        q, k, v = self._projected(z)
        turned_q, turned_k = self._turned(q, k, rotary)
        if (last := self._before_step(z, layout, state)) is not None:
            y, mass, beyond, new = self._step(turned_q, turned_k, v, attention_mask, last, attend_with_mass)
            return Near(y, mass, beyond), new
        visual = None if layout is None else layout.visual_mask(z.device)
        seen = _seen(z, state)
        real = z.new_ones(z.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask
        index = real.cumsum(1) - 1 + seen[:, None]  # of a token in its sequence, padding not counted
        start = None
        if seq_idx is not None:
            begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            start = torch.where(begins, index, 0).cummax(1).values
            index = index - start
        order = None if attention_mask is None else real_tokens_first(attention_mask)
        sinks = self._sinks(turned_k, v, real, visual, seen, state, order, start, seq_idx)
        text_window = self.config.text_window
        before = None if sinks is None else sinks.at_least(text_window, index)
        y, mass, new = self._text(
            turned_q, turned_k, v, attention_mask, order, seen, state, return_state, layout, attend_with_mass, sinks,
            before, seq_idx,
        )  # fmt: skip
        if sinks is not None and seq_idx is not None:
            y, mass = sinks.join(turned_q, y, mass, index, self.softmax_scale, text_window)
        count = (index + 1).clamp(max=text_window)
        if before is not None:
            count = count + before.sum(-1)
        if layout is not None and visual is not None:
            inside, inside_mass = self._windows(q, k, v, layout, rotary, True)
            inside_mass = inside_mass.masked_fill(~visual[..., None], 0)  # -inf would make NaN gradients
            inside_count = layout.window_rank(*self.windows, z.device)
            if sinks is not None:
                inside, inside_mass = sinks.join(turned_q, inside, inside_mass, index, self.softmax_scale)
                inside_count = inside_count + sinks.at_least(1, index).sum(-1)
            y = torch.where(visual[..., None, None], inside, y)
            mass = torch.where(visual[..., None], inside_mass, mass)
            count = torch.where(visual, inside_count, count)
        return Near(y, mass, (index + 1 - count).clamp(min=0)), new

    def _sinks(
        self,
        k: Tensor,
        v: Tensor,
        real: Tensor,
        visual: Tensor | None,
        seen: Tensor,
        state: MMATEState | None,
        order: Tensor | None,
        start: Tensor | None,
        seq_idx: Tensor | None,
    ) -> Sinks | None:
        """The first tokens of each row, from the state as far as they came before; with `start` (B, L), the places of
        the first ones of sequences among the row's tokens, those of each token's sequence."""
        n = self.config.sink_tokens
        if not n:
            return None
        if start is not None and seq_idx is not None:
            return self._sinks_of_sequences(k, v, real, visual, order, start, seq_idx)
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
        n = self.config.sink_tokens
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
        real: Tensor | None,
        order: Tensor | None,
        seen: Tensor,
        state: MMATEState | None,
        return_state: bool,
        layout: TokenLayout | None,
        rule: Rule,
        sinks: Sinks | None = None,
        before: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, MMATEState]:
        """Each text token by `rule` over the last `text_window` tokens of its sequence, padding not counted, and over
        the sinks that lie `before` these; not with seq_idx, where the caller adds them. Anything at visual tokens."""
        window = self.config.text_window
        batch, length, heads = q.shape[:3]
        valid = torch.ones(batch, length, dtype=torch.bool, device=q.device) if real is None else real
        new = MMATEState()
        if return_state:
            counted = valid if seq_idx is None else valid & (seq_idx == seq_idx[:, -1:])
            new = new._replace(seen=seen + counted.sum(1))
        if not window:
            nothing = q.new_full((batch, length, heads), -torch.inf, dtype=accumulate_dtype(q.dtype))
            return torch.zeros_like(q), nothing, new
        keys = values = filled = None
        if state is not None and state.keys is not None and state.values is not None:
            keys, values = (from_ring(ring[:, :, -window:], seen).to(k.dtype) for ring in (state.keys, state.values))
            filled = torch.arange(window, device=q.device) >= window - seen[:, None]
        if new.seen is not None:
            latest = [last_tokens(*both, window, real, order) for both in ((k, keys), (v, values))]
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
        if seq_idx is not None:
            sinks = before = None
        if order is not None:
            q, k, v, valid = (take(t, order) for t in (q, k, v, valid))
            seq_idx = None if seq_idx is None else take(seq_idx, order)
            before = None if before is None else take(before, order)
        # Of more than there are, most would be empty places. A graph serves all lengths.
        reach = min(window, length) if keys is None and not torch.compiler.is_compiling() else window
        y, mass = causal_window_attention(
            rule, q, k, v, valid, reach, self.softmax_scale, keys, values, filled, sinks, before,
            _chunks_with_text(layout, chunk_size(reach), order, valid), seq_idx,
        )  # fmt: skip
        if order is not None:
            back = order.argsort(1)
            y, mass = take(y, back), take(mass, back)
        return y, mass, new

    def _before_step(self, z: Tensor, layout: TokenLayout | None, state: MMATEState | None) -> MMATEState | None:
        """The state, where this is one token of text after others, of which text_window keeps some."""
        return state if layout is None and z.shape[1] == 1 and state is not None and state.keys is not None else None

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, state: MMATEState, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor, MMATEState]:
        """`_text` of one token of text: y, mass, how many tokens lie beyond its window (B, 1), the new state, whose
        keys and values are the old one's where `written_in_place`."""
        keys, values, seen = state.keys, state.values, state.seen
        assert keys is not None and values is not None and seen is not None
        window, groups = self.config.text_window, k.shape[2]
        first = keys.shape[2] - window
        total = seen + 1 if real is None else seen + real[:, 0]
        newest = seen % window
        places = first + newest[:, None]
        if first:
            places = torch.cat((places, torch.where(seen < first, seen, places[:, 0])[:, None]), dim=1)
        at = places[:, None, :, None].expand(-1, groups, -1, self.head_dim)

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
            # As numbers: PyTorch 2.13's compiler cannot join masks on a CPU.
            mask = torch.cat((before.byte(), mask.byte()), dim=1).bool()
            beyond = beyond - before.sum(1, keepdim=True)
        near_keys, near_values = keys, values
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            # The rest is empty, in every row.
            kept = first + min(int(seen.max()) + 1, window)
            near_keys, near_values, mask = keys[:, :, :kept], values[:, :, :kept], mask[:, :kept]
        near_keys, near_values = (t.to(q.dtype).transpose(1, 2) for t in (near_keys, near_values))
        y, mass = rule(q, near_keys, near_values, mask[:, None], self.softmax_scale)
        return y, mass, beyond, MMATEState(keys=keys, values=values, sinks=sinks, seen=total)

    @torch.no_grad()
    def mass_beyond(
        self,
        hidden_states: Tensor,
        *,
        layout: TokenLayout | None = None,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **ignored: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What causal attention gives to the tokens outside the window: the logs of the mass of the scores inside and
        outside, (B, L, H), and the number of tokens outside, (B, L) int64. Quadratic in time; arguments as
        `forward`."""
        hidden_states, position_embeddings = without_padding(hidden_states, position_embeddings, attention_mask)
        seq_idx = number_sequences("LocalSwin", seq_idx, hidden_states, attention_mask, layout, None)
        near, _ = self._near(hidden_states, layout, position_embeddings, attention_mask, None, False, seq_idx)
        q, k, _ = self._projected(hidden_states)
        q, k = self._turned(q, k, position_embeddings)
        real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if attention_mask is None else attention_mask
        parts = []
        for start in range(0, q.shape[1], _QUERIES):
            rows = slice(start, start + _QUERIES)
            earlier = torch.arange(q.shape[1], device=q.device) <= torch.arange(q.shape[1], device=q.device)[rows, None]
            seen = earlier & real[:, None]
            if seq_idx is not None:
                seen = seen & (seq_idx[:, rows, None] == seq_idx[:, None])
            parts.append(attend_with_mass(q[:, rows], k, k, seen, self.softmax_scale)[1])
        every = torch.cat(parts, dim=1).double()
        inside = near.mass.double()
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


def layer_windows(config: MMATEConfig, layer_idx: int) -> Windows:
    """The windows of a layer, shifted by half their size where it is odd."""

    def shift(window: Triple) -> Triple:
        t, h, w = window
        return (t // 2, h // 2, w // 2) if config.shift_alternate and layer_idx % 2 else (0, 0, 0)

    image = config.image_window
    return config.window, shift(config.window), config.wrap, image, None if image is None else shift(image)
