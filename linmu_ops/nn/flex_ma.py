"""Flex-MA: one scan over all tokens, one backwards over visual tokens, mixed by a gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dims import accumulate_dtype
from ..ssd_scan import ssd_scan
from ..ssd_step import ssd_step
from ..token_layout import TokenLayout
from ._inputs import Rotary, apply_rotary, check_inputs, number_sequences, ridge, split_heads, without_padding
from .config import PAPER, MMATEConfig
from .conv import CausalConv1d
from .state import MMATEState, continue_state, written_in_place

_STEP_RANGE = 5.0  # logs of step sizes are fitted within +- this
# Channels that the normaliser adds to X: a one, and zeros so that rows of 16-bit numbers stay aligned to 16 bytes.
_ADDED = 8
_NOTHING = -100.0  # the log of a sum of no weights
PADDING_DT = -1e4  # softplus of it is exactly 0 in float32: padding neither decays the state nor writes to it


class FlexMA(nn.Module):
    """Masked bidirectional scan in the shape of an attention layer (LinMU, arXiv:2601.01322, Eq. 1-3).

        C = W_C z,  B = W_B z,  X = W_X z           C: H heads, B and X: G heads, nothing repeated
        y> = scan of all tokens, visual tokens in the layer's major-scan order
        y< = reverse scan of visual tokens, restarted at every visual block
        y  = g y> + (1 - g) y<  on visual tokens,  y> on text;          out = W_O y

    Text sees what lies before it and nothing else. Arguments as in `MMATE`.
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
        config: MMATEConfig = PAPER,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.softmax_scale = self.head_dim**-0.5 if scale is None else scale
        self.layer_idx, self.config = layer_idx, config
        H, G, P = self.num_heads, self.num_kv_heads, self.head_dim
        self.c_proj = nn.Linear(dim, H * P, bias=qkv_bias)
        self.b_proj = nn.Linear(dim, G * P, bias=qkv_bias)
        self.x_proj = nn.Linear(dim, G * P, bias=qkv_bias)
        self.o_proj = nn.Linear(H * P, dim, bias=out_bias)
        self.c_norm = qk_norm(P) if qk_norm else nn.Identity()
        self.b_norm = qk_norm(P) if qk_norm else nn.Identity()
        self.scale = nn.Parameter(torch.empty(H))
        learned = config.feature_map == "hedgehog"
        N = self.state_size[1]
        self.b_map = nn.Parameter(torch.empty(G, P, N)) if learned else None
        self.c_map = nn.Parameter(torch.empty(H, P, N)) if learned else None
        self.dt_proj = nn.Linear(dim, H, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        separate = config.reverse and config.reverse_projections == "separate"
        if config.reverse:
            self.reverse_dt_proj = nn.Linear(dim, H, bias=False)
            self.reverse_dt_bias = nn.Parameter(torch.empty(H))
            self.reverse_A_log = nn.Parameter(torch.empty(H))
            self.gate = nn.Parameter(torch.empty(H))
        self.gate_proj = nn.Linear(dim, H, bias=False) if config.reverse and config.gate == "token" else None
        self.reverse_c_proj = nn.Linear(dim, H * P, bias=qkv_bias) if separate else None
        self.reverse_b_proj = nn.Linear(dim, G * P, bias=qkv_bias) if separate else None
        self.sizes = [G * P, G * P, H * P] + ([G * P, H * P] if separate else [])  # x, B, C, reverse B, reverse C
        self.conv = CausalConv1d(sum(self.sizes), config.conv_width) if config.conv_width else None
        self.z_proj = nn.Linear(dim, H * P) if config.z_gate else None
        self.head_norm = nn.Parameter(torch.empty(H, P)) if config.head_norm else None
        self.D = nn.Parameter(torch.empty(H)) if config.skip else None
        self.reset_new_parameters()

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Initialise every parameter that attention does not have; all start neutral (see `MMATEConfig`)."""
        H, (low, high) = self.num_heads, self.config.decays
        spread = torch.linspace(0, 1, H) if H > 1 else torch.zeros(1)
        memory = (1 - low) ** (spread - 1) * (1 - high) ** -spread  # geometric from 1/(1-low) to 1/(1-high)
        dt_bias = torch.log(torch.expm1(-torch.log1p(-1 / memory)))  # softplus(dt_bias) = -log(decay)
        nn.init.constant_(self.scale, self.config.initial_scale)
        for feature_map in (self.b_map, self.c_map):
            if feature_map is not None:
                _, P, N = feature_map.shape
                signed = torch.cat((torch.eye(P), -torch.eye(P)), dim=1).repeat(1, -(-N // (2 * P)))
                feature_map.copy_(signed[:, :N].expand_as(feature_map))
        for proj, bias, A_log in self._directions():
            nn.init.zeros_(proj.weight)
            bias.copy_(dt_bias)
            nn.init.zeros_(A_log)
        if self.config.reverse:
            nn.init.constant_(self.gate, math.log(self.config.initial_gate / (1 - self.config.initial_gate)))
        if self.gate_proj is not None:
            nn.init.zeros_(self.gate_proj.weight)
        if self.reverse_c_proj is not None and self.reverse_b_proj is not None:
            self.reverse_c_proj.load_state_dict(self.c_proj.state_dict())
            self.reverse_b_proj.load_state_dict(self.b_proj.state_dict())
        if self.conv is not None:
            self.conv.reset_parameters()
        if self.z_proj is not None:
            nn.init.zeros_(self.z_proj.weight)
            nn.init.constant_(self.z_proj.bias, 1.2784645)  # silu of it is 1
        if self.head_norm is not None:
            nn.init.ones_(self.head_norm)
        if self.D is not None:
            nn.init.zeros_(self.D)

    @property
    def state_size(self) -> tuple[int, int]:
        """Channels of X, the normaliser's included, and of B: a head's state."""
        return self.head_dim + (_ADDED if self.config.normalizer else 0), self.config.feature_dim or self.head_dim

    def _directions(self) -> list[tuple[nn.Linear, Tensor, Tensor]]:
        forward = (self.dt_proj, self.dt_bias, self.A_log)
        reverse = (self.reverse_dt_proj, self.reverse_dt_bias, self.reverse_A_log) if self.config.reverse else None
        return [forward, reverse] if reverse else [forward]

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the output (but for D and the output bias) by `factor`, through a parameter that has that effect;
        a mean of X stays as it is."""
        if self.head_norm is not None:
            self.head_norm.mul_(factor)
        elif not self.config.normalizer:
            self.scale.mul_(factor**0.5 if self.config.feature_map == "relu2" else factor)

    @torch.no_grad()
    def fit_step_sizes(self, hidden_states: Tensor, mass: Tensor) -> None:
        """Set the forward scan's step sizes such that tokens are written as attention reads them.

        log softplus(dt_proj z + dt_bias) is fitted to log mass by weighted ridge regression, half the weight spread
        evenly over tokens and half by their mass, so that rare tokens that everything attends to count. The mean step
        size of a head stays what it was.

        Args:
            hidden_states: (n, D), inputs of the layer.
            mass: (n, H) >= 0, the attention each of these tokens gets per head, in units of a token's mean.
        """
        z = hidden_states.double()
        for head, m in enumerate(mass.double().unbind(1)):
            target = m.clamp(math.exp(-_STEP_RANGE), math.exp(_STEP_RANGE)).log()
            weight, bias = ridge(z, target, 0.5 / len(m) + 0.5 * m / m.sum())
            self.dt_proj.weight[head] = weight.to(self.dt_proj.weight.dtype)
            # Where a step is much smaller than 1, as they are, softplus is exp.
            self.dt_bias[head] += (bias - (z @ weight + bias).exp().mean().log()).to(self.dt_bias.dtype)

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
        near: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, MMATEState]:
        """As `MMATE.forward`; of the state, `ssm` and `conv` are read and returned.

        near: (B, L, H, P) and (B, L, H), another y and the logit of its share of what is projected; with the
            normaliser, plus the log of this.
        """
        layout = check_inputs("FlexMA", hidden_states, self.dim, layout, grid, attention_mask, self.layer_idx, None)
        hidden_states, position_embeddings = without_padding(hidden_states, position_embeddings, attention_mask)
        seq_idx = number_sequences("FlexMA", seq_idx, hidden_states, attention_mask, layout, state)
        keep = return_state or state is not None
        y, log_total, new = self._scan(hidden_states, layout, position_embeddings, attention_mask, state, keep, seq_idx)
        if self.z_proj is not None:
            y = y * F.silu(self.z_proj(hidden_states)).to(y.dtype).view_as(y)
        if self.head_norm is not None:
            normed = F.rms_norm(y.to(accumulate_dtype(hidden_states.dtype)), y.shape[-1:], eps=self.config.norm_eps)
            y = (normed * self.head_norm).to(y.dtype)
        if near is not None:
            share = (near[1] if log_total is None else near[1] - log_total).sigmoid()
            y = torch.lerp(y, near[0], share.to(y.dtype)[..., None])
        out, new = self.o_proj(y.flatten(2)), continue_state(state, new)
        return (out, new) if return_state else out

    def _scan(
        self,
        z: Tensor,
        layout: TokenLayout | None,
        rotary: Rotary | None,
        attention_mask: Tensor | None,
        state: MMATEState | None,
        return_state: bool,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, MMATEState]:
        """y (B, L, H, P) of both directions; with the normaliser, that mean of X and the log of the sum of its weights
        (B, L, H). One token without gradients updates `state` in place; else a new state is made, an empty one without
        `return_state`."""
        config, device, acc = self.config, z.device, accumulate_dtype(z.dtype)
        length, P = z.shape[1], self.head_dim
        order = layout.scan_order(self.layer_idx, device) if layout is not None and config.major_scan else None
        parts = [self.x_proj(z), self.b_proj(z), self.c_proj(z)]
        if self.reverse_b_proj is not None and self.reverse_c_proj is not None:
            parts += [self.reverse_b_proj(z), self.reverse_c_proj(z)]
        conv_state = None
        if self.conv is not None:
            before = None if state is None else state.conv
            mixed, conv_state = self.conv(
                torch.cat(parts, dim=-1), order, attention_mask, before, return_state, seq_idx
            )
            parts = list(mixed.split(self.sizes, dim=-1))
        x, B, C, *reverse = (split_heads(t, P) for t in parts)
        B, C = self._position(B, C, rotary)
        if reverse:
            reverse = list(self._position(reverse[0], reverse[1], rotary))
        if config.normalizer:
            x = torch.cat([x, F.pad(x.new_ones(1), (0, _ADDED - 1)).expand(*x.shape[:3], -1)], dim=-1)
        dt, A = _step_size(self.dt_proj(z), attention_mask), -self.A_log.to(acc).exp()
        scan: dict[str, Any] = dict(D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        ssm = None if state is None else state.ssm
        if length == 1 and layout is None and ssm is not None and written_in_place():
            y = ssd_step(ssm, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **scan)[:, None]
        else:
            if layout is not None and config.reverse:
                gate = self.gate if self.gate_proj is None else self.gate_proj(z).to(acc) + self.gate
                scan |= dict(
                    direction="both", gate=gate.to(acc).sigmoid(), reverse_mask=layout.visual_mask(device),
                    reverse_seq_idx=layout.reverse_seq_idx(device),
                    reverse_dt=_step_size(self.reverse_dt_proj(z), attention_mask),
                    reverse_dt_bias=self.reverse_dt_bias, reverse_A=-self.reverse_A_log.to(acc).exp(),
                    reverse_B=reverse[0] if reverse else None, reverse_C=reverse[1] if reverse else None,
                )  # fmt: skip
            out = ssd_scan(
                x, dt, A, B, C, seq_idx=seq_idx, token_order=order, initial_state=ssm,
                return_final_state=return_state, **scan,
            )  # fmt: skip
            y, ssm = out if isinstance(out, tuple) else (out, None)
        log_total = None
        if config.normalizer:
            y, added = y.split([P, _ADDED], dim=-1)
            written = added[..., 0] > 0
            total = added[..., 0].to(acc).where(written, 1)
            y = (y.to(acc) * total.reciprocal()[..., None]).to(y.dtype)
            log_total = total.log().where(written, _NOTHING)
        return y, log_total, MMATEState(ssm=ssm, conv=conv_state)

    @torch.no_grad()
    def log_total(
        self,
        hidden_states: Tensor,
        *,
        layout: TokenLayout | None = None,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **ignored: object,
    ) -> Tensor:
        """With the normaliser: the log of the sum of the weights in its mean, (B, L, H). Arguments as `forward`."""
        z, rotary = without_padding(hidden_states, position_embeddings, attention_mask)
        seq_idx = number_sequences("FlexMA", seq_idx, z, attention_mask, layout, None)
        _, total, _ = self._scan(z, layout, rotary, attention_mask, None, False, seq_idx)
        assert total is not None
        return total

    def _position(self, B: Tensor, C: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Norm, scale and rotate, as attention does with k and q; then the feature map."""
        rotary = rotary if self.config.rotary else None
        dtype, interleaved = B.dtype, self.config.rotary_interleaved
        B, C = self.b_norm(B).to(dtype), self.c_norm(C).to(dtype)
        B, C = apply_rotary(B, rotary, interleaved), apply_rotary(C, rotary, interleaved)
        scale = (self.scale.to(accumulate_dtype(dtype)) * self.softmax_scale)[:, None]
        if self.b_map is not None and self.c_map is not None:
            B, C = _mapped(B, self.b_map), _mapped(C, self.c_map) * scale
            return B.softmax(-1).to(dtype), C.softmax(-1).to(dtype)
        C = (C * scale).to(dtype)
        return (B.relu().square(), C.relu().square()) if self.config.feature_map == "relu2" else (B, C)


def _mapped(t: Tensor, weight: Tensor) -> Tensor:
    """t (B, L, H, P) @ weight (H, P, N), in the accumulate dtype: 16 bits cannot hold what a softmax compares. einsum
    makes three times as many calls of it, which a step feels."""
    acc = accumulate_dtype(t.dtype)
    with torch.autocast(t.device.type, enabled=False):
        mapped = torch.bmm(t.to(acc).flatten(0, 1).transpose(0, 1), weight.to(acc))
    return mapped.transpose(0, 1).unflatten(0, t.shape[:2])


def _step_size(raw: Tensor, attention_mask: Tensor | None) -> Tensor:
    return raw if attention_mask is None else raw.masked_fill(~attention_mask[..., None], PADDING_DT)
