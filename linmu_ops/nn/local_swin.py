"""Local-Swin: exact softmax attention inside small windows of visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..token_layout import TokenLayout
from ..window_attention import window_attention
from ._inputs import (
    Rotary,
    Triple,
    Windows,
    apply_rotary,
    check_inputs,
    last_tokens,
    real_tokens_first,
    take,
)
from .config import DEFAULTS, MMATEConfig
from .state import MMATEState, continue_state


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
        config: MMATEConfig = DEFAULTS,
    ) -> None:
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
        self.o_proj = nn.Linear(H * P, dim, bias=out_bias)
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
    ) -> Tensor | tuple[Tensor, MMATEState]:
        """As `MMATE.forward`; of the state, `keys`, `values` and `filled` are read and returned."""
        layout = check_inputs(
            "LocalSwin", hidden_states, self.dim, layout, grid, attention_mask, self.layer_idx, self.windows
        )
        keep = return_state or state is not None
        y, new = self.attend(hidden_states, layout, position_embeddings, attention_mask, state, keep)
        new = continue_state(state, new)
        y = torch.zeros_like(hidden_states) if y is None else y
        if self.o_proj.bias is not None and layout is not None and not self.config.text_window:
            y = y.masked_fill(~layout.visual_mask(y.device)[..., None], 0)
        return (y, new) if return_state else y

    def attend(
        self,
        z: Tensor,
        layout: TokenLayout | None,
        rotary: Rotary | None,
        attention_mask: Tensor | None,
        state: MMATEState | None,
        return_state: bool,
    ) -> tuple[Tensor | None, MMATEState]:
        """`forward` on checked inputs; None where no token attends. Text carries the output bias, unmasked."""
        config = self.config
        if layout is None and not config.text_window:
            return None, MMATEState()
        batch, length, _ = z.shape
        q, k, v = (proj(z).view(batch, length, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        visual = text = None
        new = MMATEState()
        if layout is not None:
            window, shift, wrap, image_window, image_shift = self.windows
            cos, sin = rotary or (None, None)
            visual = window_attention(
                q, k, v, layout=layout, window=window, shift=shift, wrap=wrap, image_window=image_window,
                image_shift=image_shift, scale=self.softmax_scale, bias=self.bias, cos=cos, sin=sin,
                interleaved=config.rotary_interleaved,
            )  # fmt: skip
            assert isinstance(visual, Tensor)
        if config.text_window:
            q, k = (apply_rotary(t, rotary, config.rotary_interleaved) for t in (q, k))
            text, new = self._text(q, k, v, attention_mask, state, return_state)
        if visual is not None and text is not None and layout is not None:
            visual = torch.where(layout.visual_mask(z.device)[..., None, None], visual, text)
        y = text if visual is None else visual
        assert y is not None
        return self.o_proj(y.reshape(batch, length, -1)), new

    def _text(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        state: MMATEState | None,
        return_state: bool,
    ) -> tuple[Tensor, MMATEState]:
        """Each token over the last `text_window` tokens of its row, padding not counted."""
        window = self.config.text_window
        batch, length = q.shape[:2]
        keys, values, filled = (None, None, None) if state is None else (state.keys, state.values, state.filled)
        real = attention_mask
        order = None if real is None else real_tokens_first(real)
        valid = torch.ones(batch, length, dtype=torch.bool, device=q.device) if real is None else real
        new = MMATEState()
        if return_state:
            new = MMATEState(
                keys=last_tokens(k, keys, window, real, order),
                values=last_tokens(v, values, window, real, order),
                filled=last_tokens(valid, filled, window, real, order),
            )
        if length == 1 and new.keys is not None and new.values is not None and new.filled is not None:
            # As above: padding sees the newest key.
            mask = torch.cat((new.filled[:, :-1], torch.ones_like(valid)), dim=1)
            y = _attend(q, new.keys, new.values, mask[:, None], self.softmax_scale)
        else:
            if order is not None:
                q, k, v, valid = (take(t, order) for t in (q, k, v, valid))
            y = causal_window_attention(q, k, v, valid, window, self.softmax_scale, keys, values, filled)
            if order is not None:
                y = take(y, order.argsort(1))
        return y, new


def layer_windows(config: MMATEConfig, layer_idx: int) -> Windows:
    """The windows of a layer, shifted by half their size where it is odd."""

    def shift(window: Triple) -> Triple:
        t, h, w = window
        return (t // 2, h // 2, w // 2) if config.shift_alternate and layer_idx % 2 else (0, 0, 0)

    image = config.image_window
    return config.window, shift(config.window), config.wrap, image, None if image is None else shift(image)


def causal_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    window: int,
    scale: float,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    filled: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of each token over the last `window` tokens, itself included; linear in L.

    q (B, L, H, P), k, v (B, L, G, P), valid (B, L) bool: not padding; keys, values (B, window, G, P) and filled
    (B, window): the tokens before. Blocks of `window` queries meet the keys of their own block and the one before.
    """
    batch, length, heads, _ = q.shape
    blocks = -(-length // window)
    pad = blocks * window - length
    q = F.pad(q, (0, 0, 0, 0, 0, pad)).view(batch * blocks, window, heads, -1)

    def pairs(t: Tensor, before: Tensor | None) -> Tensor:
        before = t.new_zeros(batch, window, *t.shape[2:]) if before is None else before
        after = t.new_zeros(batch, pad, *t.shape[2:])
        t = torch.cat((before, t, after), dim=1).view(batch, blocks + 1, window, *t.shape[2:])
        return torch.cat((t[:, :-1], t[:, 1:]), dim=2).flatten(0, 1)

    behind = torch.arange(window, device=q.device)[:, None] + window - torch.arange(2 * window, device=q.device)
    mask = ((behind >= 0) & (behind < window)) & pairs(valid, filled)[:, None]
    # A query sees itself even where it is padding: a row with no key at all would be NaN.
    mask = mask | (behind == 0)
    y = _attend(q, pairs(k, keys), pairs(v, values), mask, scale)
    return y.reshape(batch, blocks * window, heads, -1)[:, :length]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q (N, I, H, P), k, v (N, J, G, P), mask (N, I, J) bool -> (N, I, H, P)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)
