"""The windows of a block: exact softmax attention to a token's neighbours."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..context_parallel import window_attention as split_window_attention
from ..token_layout import Partition, TokenLayout
from ..window_attention import window_attention
from ._inputs import (
    Call,
    Rotary,
    Triple,
    apply_rotary,
    last_tokens,
    real_tokens_first,
    split_heads,
    take,
)
from .shape import AttentionShape
from .state import MMATEState, on_host, written_in_place
from .text_window import as_ring, attend, causal_window_attention, chunk_size, from_ring


class Windows(nn.Module):
    """Softmax attention to near tokens (LinMU, arXiv:2601.01322, sections 2 and 3.1).

    A visual token attends to its window, a box of its image or video. Layers with an odd index shift the boxes by half.
    Text attends to the last tokens of its row. Rotary embeddings are those of the original positions. There is no
    output projection.

    Args:
        shape: sizes and facts of the attention layer.
        window, image_window: sizes of a video's and an image's windows, as in `MMATEConfig`.
        text_window: text attends causally to the last this many tokens of its row; 0: text has no attention.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        window: Triple,
        image_window: Triple | None,
        text_window: int,
    ) -> None:
        super().__init__()
        self.shape, self.text_window = shape, text_window
        self.layer_windows = layer_windows(window, image_window, shape.layer_idx)
        self.q_proj, self.k_proj, self.v_proj = shape.projections()
        self.q_norm, self.k_norm = shape.norm(), shape.norm()

    @property
    def state_tokens(self) -> int:
        """Tokens whose keys a state has."""
        return self.text_window

    def forward(self, hidden_states: Tensor, call: Call) -> tuple[Tensor, MMATEState]:
        """y (B, L, H, P), 0 where there is no window; and the state after these tokens, without `ssm`, where
        `call.keep` asks for it.

        A single text token updates `call.state` in place where `written_in_place`.
        """
        layout, z = call.layout, hidden_states
        if layout is None and not self.text_window:
            return z.new_zeros(*z.shape[:2], self.shape.num_heads, self.shape.head_dim), MMATEState()
        q, k, v = self._projected(z)
        if not self.text_window:
            return self._visual(q, k, v, call), MMATEState()
        turned_q, turned_k = self._turned(q, k, call.rotary)
        if layout is None and z.shape[1] == 1 and call.state is not None and call.state.keys is not None:
            return self._step(turned_q, turned_k, v, call.mask, call.state)
        y, new = self._text(turned_q, turned_k, v, call)
        if layout is not None:
            y = torch.where(layout.visual_mask(z.device)[..., None, None], self._visual(q, k, v, call), y)
        return y, new

    def _projected(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(p(z), self.shape.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def _visual(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:
        """`window_attention` of visual tokens, 0 at text."""
        assert call.layout is not None
        window, shift, wrap, image_window, image_shift = self.layer_windows
        cos, sin = call.rotary or (None, None)
        attend_in = window_attention if call.context is None else partial(split_window_attention, context=call.context)
        return attend_in(
            q, k, v, layout=call.layout, window=window, shift=shift, wrap=wrap, image_window=image_window,
            image_shift=image_shift, scale=self.shape.scale, cos=cos, sin=sin,
            interleaved=self.shape.interleaved_rotary, causal=self.shape.causal_windows,
        )  # fmt: skip

    def _turned(self, q: Tensor, k: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        interleaved = self.shape.interleaved_rotary
        return apply_rotary(q, rotary, interleaved), apply_rotary(k, rotary, interleaved)

    def _text(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, MMATEState]:
        """Each text token over the last `text_window` tokens of its sequence, padding not counted. Anything at visual
        tokens."""
        window, state, seq_idx = self.text_window, call.state, call.seq_idx
        batch, length = q.shape[:2]
        seen = _seen(q, state)
        valid = torch.ones(batch, length, dtype=torch.bool, device=q.device) if call.mask is None else call.mask
        text = valid if call.layout is None else valid & ~call.layout.visual_mask(q.device)
        order = None if call.mask is None else real_tokens_first(call.mask)
        new = MMATEState()
        if call.keep:
            counted = valid if seq_idx is None else valid & (seq_idx == seq_idx[:, -1:])
            new = new._replace(seen=seen + counted.sum(1))
        keys = values = filled = None
        if state is not None and state.keys is not None and state.values is not None:
            keys, values = (from_ring(ring, seen).to(k.dtype) for ring in (state.keys, state.values))
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
            rings = [as_ring(t, new.seen) for t in latest]
            new = new._replace(keys=rings[0], values=rings[1])
        if order is not None:
            q, k, v, valid, text = (take(t, order) for t in (q, k, v, valid, text))
            seq_idx = None if seq_idx is None else take(seq_idx, order)
        # Of more than there are, most would be empty places. A graph serves all lengths.
        reach = min(window, length) if keys is None and not torch.compiler.is_compiling() else window
        y = causal_window_attention(
            q, k, v, valid, reach, self.shape.scale, keys, values, filled,
            chunks_with_text(call.layout, chunk_size(reach), order, text), seq_idx,
        )  # fmt: skip
        if call.context is not None and keys is not None and not length:
            y = y + keys[:0].sum()  # no token here needs them, but every rank takes part in their backward
        return y if order is None else take(y, order.argsort(1)), new

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, state: MMATEState
    ) -> tuple[Tensor, MMATEState]:
        """One token of text. The new state's keys and values are the old one's where `written_in_place`."""
        keys, values, seen = state.keys, state.values, state.seen
        assert keys is not None and values is not None and seen is not None
        window = self.text_window
        total = seen + 1 if real is None else seen + real[:, 0]
        newest = (seen % window)[:, None]
        at = newest[:, None, :, None].expand(-1, k.shape[2], -1, self.shape.head_dim)

        def written(old: Tensor, new: Tensor) -> Tensor:
            new = new.to(old.dtype).transpose(1, 2)
            if real is not None:
                new = torch.where(real[..., None, None], new, old.gather(2, at))
            return old.scatter_(2, at, new) if written_in_place() else old.scatter(2, at, new)

        keys, values = written(keys, k), written(values, v)
        slot = torch.arange(window, device=q.device)
        # Padding, too, sees a key: a row with none would be NaN.
        mask = (slot < total[:, None]) | (slot == newest)
        near_keys, near_values = keys, values
        if on_host(seen):
            # The rest is empty, in every row.
            kept = min(int(seen.max()) + 1, window)
            near_keys, near_values, mask = keys[:, :, :kept], values[:, :, :kept], mask[:, :kept]
        near_keys, near_values = (t.to(q.dtype).transpose(1, 2) for t in (near_keys, near_values))
        y = attend(q, near_keys, near_values, mask[:, None], self.shape.scale)
        return y, MMATEState(keys=keys, values=values, seen=total)


def _seen(z: Tensor, state: MMATEState | None) -> Tensor:
    """(B,) int64: tokens of each row before z (B, L, ...)."""
    return z.new_zeros(z.shape[0], dtype=torch.int64) if state is None or state.seen is None else state.seen


def chunks_with_text(layout: TokenLayout | None, size: int, moved: Tensor | None, text: Tensor) -> Tensor | None:
    """Chunks of `size` tokens that hold text; None for all: where it is not known on the host which.

    moved: anything where the tokens do not stand as in the layout. text: (B, L) bool, text that is not padding."""
    if layout is None or torch.compiler.is_compiling():
        return None
    if moved is None:
        return layout.text_chunks(size, text.device)
    if not on_host(text):
        return None
    return F.pad(text, (0, -text.shape[1] % size)).view(-1, size).any(1).nonzero()[:, 0]


def layer_windows(window: Triple, image_window: Triple | None, layer_idx: int) -> Partition:
    """The windows of a layer, shifted by half their size where it is odd."""

    def shift(size: Triple) -> Triple:
        t, h, w = size
        return (t // 2, h // 2, w // 2) if layer_idx % 2 else (0, 0, 0)

    image_shift = None if image_window is None else shift(image_window)
    return Partition(window, shift(window), "join", image_window, image_shift)
