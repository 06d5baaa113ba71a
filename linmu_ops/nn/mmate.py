"""M-MATE: the block that takes an attention layer's place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dims import accumulate_dtype
from ..branch_mix_norm import branch_mix_norm
from ..token_layout import TokenLayout
from . import transfer
from ._inputs import Rotary, check_inputs, number_sequences, prepare_layout, ridge, without_padding
from .config import PAPER, MMATEConfig
from .flex_ma import FlexMA
from .local_swin import LocalSwin
from .state import MMATEState, activations, check_state, continue_state

_SPAN = 8.0


class MMATE(nn.Module):
    """Linear-time block in the place of an attention layer (LinMU, arXiv:2601.01322, Algorithm 1).

        out = Norm(lambda y_flex + (1 - lambda) y_swin)  on visual tokens,    out = Norm(y_flex)  on text

    y_flex is `FlexMA`'s output, y_swin `LocalSwin`'s, both of the same (normed) hidden states. Text is causal: no text
    token sees a later token (within a visual block that text interrupts, it sees the block's other visual tokens).

    Args:
        dim: model size D.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, a divisor of H; H if None.
        head_dim: head size P = N; D / H if None.
        layer_idx: sets the major-scan order (mod 4) and the window shift (mod 2).
        qkv_bias, out_bias: whether the projections from q, k, v, and to the output, have biases.
        qk_norm: makes the norm of queries and keys, given the head size; None for none.
        scale: the attention's softmax scale; 1/sqrt(head_dim) if None.
        config: every other choice.

    Attributes:
        flex, swin: the branches, None where the config has them off.
        flex_enabled, swin_enabled: a branch that is False is left out of `forward`, as if the config had it off, and
            its parameters get no gradient: freeze them. At least one must be on.
        mix: lambda's logit; mix_proj: its linear map where it is per token. norm: the final norm.

    Example:
        >>> block = MMATE(dim=384, num_heads=6)
        >>> block(torch.randn(2, 8 * 14 * 14, 384), grid=(8, 14, 14)).shape
        torch.Size([2, 1568, 384])
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
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"MMATE: num_kv_heads must divide num_heads={num_heads}, got {kv_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"MMATE: num_heads must divide dim={dim} where head_dim is not given, got {num_heads}")
        self.dim, self.layer_idx, self.config = dim, layer_idx, config
        shape = (dim, num_heads, kv_heads, head_dim)
        options: dict[str, Any] = dict(
            layer_idx=layer_idx, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm, scale=scale, config=config
        )
        self.flex = FlexMA(*shape, **options) if config.flex else None
        softmax = config.mix == "softmax"
        self.swin = LocalSwin(*shape, **options, project=not softmax) if config.swin else None
        self.flex_enabled, self.swin_enabled = config.flex, config.swin
        self.windows = None if self.swin is None else self.swin.windows
        self.mix_rest = WideLinear(dim, num_heads) if softmax else None
        if not softmax and self.flex is not None and self.swin is not None:
            self.mix = nn.Parameter(torch.empty(dim if config.mix == "channel" else 1))
            self.mix_proj = nn.Linear(dim, 1, bias=False) if config.mix == "token" else None
        self.norm = BranchNorm(dim, config.norm, config.norm_eps)
        self.reset_new_parameters()

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Initialise every parameter that attention does not have; all start neutral (see `MMATEConfig`)."""
        for branch in (self.flex, self.swin):
            if branch is not None:
                branch.reset_new_parameters()
        if self.mix_rest is not None:
            nn.init.zeros_(self.mix_rest.weight)
            nn.init.zeros_(self.mix_rest.bias)
        elif self.flex is not None and self.swin is not None:
            nn.init.constant_(self.mix, math.log(self.config.initial_mix / (1 - self.config.initial_mix)))
            if self.mix_proj is not None:
                nn.init.zeros_(self.mix_proj.weight)
        self.norm.reset_parameters()

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
    ) -> Tensor | tuple[Tensor, MMATEState]:
        """Mix tokens.

        Args:
            hidden_states: (B, L, D) float.
            layout: where the visual tokens of these L tokens are; no visual token if None.
            grid: (T, H, W) with T*H*W = L: every token is visual, in t, y, x order. Instead of layout.
            position_embeddings: (cos, sin), each (B or 1, L, R), R <= head size, of these L tokens.
            attention_mask: (B, L) bool, False at padding, which may lie anywhere among text. No other token sees it,
                whatever its hidden states and position embeddings hold.
            state: what an earlier call left. Under `torch.no_grad` or inference mode it is updated in place (its
                tensors keep their addresses). With gradients on, and inside a checkpoint, it is left as it is.
            return_state: also return the state after these tokens.
            seq_idx: (B, L) int32. Rows of several sequences: one begins at a token whose number differs from the one
                before. Each is as if it were alone; padding may have any number. A visual block lies in one sequence
                (checked on a CPU). Not with state; the state returned is that of the row's last sequence.

        Returns:
            out: (B, L, D). With return_state: (out, state); state is the one given if that was updated in place.
            The rows of padding are finite and mean nothing.

        Notes:
            Linear in L. One text token with a state and gradients off is one `ssd_step`. A visual block must lie
            within one call. A batch without visual tokens gives Local-Swin's, the reverse scan's and lambda's
            parameters no gradient: train on such batches under DDP with find_unused_parameters=True.
        """
        layout = check_inputs(
            "MMATE", hidden_states, self.dim, layout, grid, attention_mask, self.layer_idx, self.windows
        )
        if state is not None:
            check_state("MMATE", state, hidden_states.shape[0], self.config.sink_tokens + self.config.text_window)
        hidden_states, position_embeddings = without_padding(hidden_states, position_embeddings, attention_mask)
        seq_idx = number_sequences("MMATE", seq_idx, hidden_states, attention_mask, layout, state)
        keep = return_state or state is not None
        a = b = None
        flex_state = swin_state = MMATEState()
        # Called as modules, so that hooks see them: those of accelerate bring offloaded parameters.
        call: dict[str, Any] = dict(
            layout=layout, position_embeddings=position_embeddings, attention_mask=attention_mask, state=state,
            seq_idx=seq_idx,
        )  # fmt: skip
        near = None
        if self.mix_rest is not None and self.swin is not None and self.swin_enabled:
            out = self.swin(hidden_states, **call, return_state=keep)
            found, swin_state = out if keep else (out, swin_state)
            beyond = found.beyond[..., None]
            rest = self.mix_rest(hidden_states).to(found.mass.dtype)
            if not self.config.normalizer:
                rest = rest + beyond.clamp(min=1).to(rest.dtype).log()
            # Where nothing is near, something else must be there, and the other way round: no -inf less -inf.
            rest = rest.masked_fill((beyond == 0) & found.mass.isfinite(), -torch.inf)
            near = found.y, found.mass - rest
        if self.flex is not None and self.flex_enabled:
            out = self.flex(hidden_states, **call, return_state=keep, near=near)
            a, flex_state = out if keep else (out, flex_state)
        elif near is not None:
            raise RuntimeError("MMATE: flex_enabled must be True with mix='softmax': it has the output projection")
        attends = self.swin_enabled and (layout is not None or self.config.text_window)
        if self.mix_rest is None and self.swin is not None and attends:
            out = self.swin(hidden_states, **call, return_state=keep)
            b, swin_state = out if keep else (out, swin_state)
        mask = None if layout is None or self.config.text_window else layout.visual_mask(hidden_states.device)
        if a is not None and b is not None:
            logit = self.mix if self.mix_proj is None else self.mix_proj(hidden_states)[..., 0] + self.mix
            out = self.norm(a, b, logit.to(accumulate_dtype(a.dtype)).sigmoid(), mask)
        elif a is not None:
            out = self.norm(a)
        else:
            b = torch.zeros_like(hidden_states) if b is None else b
            out = self.norm(b if mask is None else b.masked_fill(~mask[..., None], 0))
        if not return_state and state is None:
            return out
        new = continue_state(state, MMATEState(*flex_state[:2], *swin_state[2:]))
        return (out, new) if return_state else out

    def prepare_layout(self, layout: TokenLayout, device: torch.device | str) -> None:
        """Compute what `forward` reads from `layout`, which keeps it. Before a compiled `forward`, whose graph cannot
        build it; needless otherwise, and for `grid`. Every layout so prepared runs through the same graph."""
        prepare_layout(layout, device, self.layer_idx, self.windows)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MMATEState:
        """The state before the first token: zeros. dtype and device of the hidden states; where None, those that the
        block's weights, quantised, offloaded or not, take."""
        projection = (self.flex or self.swin).get_submodule("o_proj")  # type: ignore[union-attr]
        own = activations(self, projection)
        dtype, device = dtype or own[0], device or own[1]
        config, state = self.config, MMATEState()
        if self.flex is not None:
            flex = self.flex
            shape = (batch_size, flex.num_heads, *flex.state_size)
            state = state._replace(ssm=torch.zeros(shape, dtype=accumulate_dtype(dtype), device=device))
            if flex.conv is not None:
                taps = (batch_size, config.conv_width - 1, sum(flex.sizes))
                state = state._replace(conv=torch.zeros(taps, dtype=dtype, device=device))
        if self.swin is not None and config.text_window:
            kept = config.sink_tokens + config.text_window
            shape = (batch_size, self.swin.num_kv_heads, kept, self.swin.head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            state = state._replace(keys=keys, values=values)
            if config.sink_tokens:
                sinks = torch.zeros(batch_size, config.sink_tokens, dtype=torch.bool, device=device)
                state = state._replace(sinks=sinks)
        if self.swin is not None and (self.mix_rest is not None or config.text_window):
            state = state._replace(seen=torch.zeros(batch_size, dtype=torch.int64, device=device))
        return state

    @classmethod
    def from_attention(cls, attention: nn.Module, *, layer_idx: int = 0, **options: Any) -> MMATE:
        """An `MMATE` with the shape, device, dtype and weights of an attention layer; see `transfer.from_attention`."""
        return transfer.from_attention(cls, attention, layer_idx=layer_idx, **options)

    def load_attention_weights(self, *args: Any, **kwargs: Any) -> list[transfer.TransferRow]:
        """Copy an attention layer's weights into both branches; see `transfer.load_attention_weights`."""
        return transfer.load_attention_weights(self, *args, **kwargs)

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[tuple[Mapping[str, Any], Tensor]], weights: Sequence[Tensor] | None = None
    ) -> float:
        """Give the block the size of what it replaces; after the weights are loaded, before training.

        First y_flex, then (unless norm="none") the output are scaled so that their root mean square over all tokens
        that are not padding is that of the targets. The output projection's bias, a copy of the teacher's, is not
        scaled with y_flex: both sides are measured without it. With mix="softmax", what stands for the tokens beyond
        the window is fitted to the mass that attention gives them, before all else: quadratic in the length.

        Args:
            batches: (arguments of `forward`, hidden_states among them; the teacher's output (B, L, D)).
            weights: for each batch (B, L) >= 0, how much a token counts where the rest is fitted, beside a count that
                all have and that is as much in all; None: all count the same.

        Returns:
            The targets' root mean square.
        """
        batches = list(batches)

        def rms(value: Callable[[Mapping[str, Any], Tensor], Tensor]) -> float:
            total, count = 0.0, 0
            for inputs, target in batches:
                mask, v = inputs.get("attention_mask"), value(inputs, target).double()
                v = v if mask is None else v[mask]
                total, count = total + v.square().sum().item(), count + v.numel()
            return math.sqrt(total / max(count, 1))

        if self.mix_rest is not None:
            self._fit_mix([inputs for inputs, _ in batches], weights)
        target = rms(lambda inputs, target: target)
        if self.flex is not None:
            flex = self.flex
            bias = 0 if flex.o_proj.bias is None else flex.o_proj.bias
            size = rms(lambda inputs, target: flex(**inputs) - bias)
            if size > 0:
                flex.rescale(rms(lambda inputs, target: target - bias) / size)
        if self.norm.weight is not None:
            forward: Any = MMATE.forward  # a subclass may take its layout in another way
            size = rms(lambda inputs, target: forward(self, **inputs))
            if size > 0:
                self.norm.weight.mul_(target / size)
        return target

    def _fit_mix(self, batches: Sequence[Mapping[str, Any]], weights: Sequence[Tensor] | None) -> None:
        """Ridge regression of the log mass of the scores beyond the window, a token's mean, on the input, per head."""
        assert self.flex is not None and self.swin is not None and self.mix_rest is not None
        seen, targets, counts = [], [], []
        for i, inputs in enumerate(batches):
            inside, rest, count = self.swin.mass_beyond(**inputs)
            use = count > 0
            seen.append(inputs["hidden_states"][use])
            # Outside of this range around `inside` sigmoid is all but constant.
            rest = torch.maximum(torch.minimum(rest, inside + _SPAN), inside - _SPAN)[use]
            # What the block adds to the linear map, as in `forward`.
            known = self.flex.log_total(**inputs) if self.config.normalizer else count.to(rest.dtype).log()[..., None]
            targets.append(rest - known[use])
            counts.append(rest.new_ones(len(rest)) if weights is None else weights[i].to(rest)[use])
        z, target = torch.cat(seen).double(), torch.cat(targets)
        if not len(z):
            return
        weigh = torch.cat(counts)
        weight, bias = ridge(z, target, 0.5 / len(z) + 0.5 * weigh / weigh.sum().clamp(min=1e-20))
        self.mix_rest.weight.copy_(weight.T)
        self.mix_rest.bias.copy_(bias)


class WideLinear(nn.Linear):
    """A linear map whose output is in the accumulate dtype, also under autocast: it is compared with scores, whose
    common part 16 bits cannot hold."""

    def forward(self, x: Tensor) -> Tensor:
        acc = accumulate_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(acc), self.weight.to(acc), None if self.bias is None else self.bias.to(acc))


class BranchNorm(nn.Module):
    """The norm after the mix: "layer", "rms" or "none", with a scale (and a bias, "layer") per channel."""

    def __init__(self, dim: int, norm: str, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = norm, eps
        self.weight = nn.Parameter(torch.ones(dim)) if norm != "none" else None
        self.bias = nn.Parameter(torch.zeros(dim)) if norm == "layer" else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, a: Tensor, b: Tensor | None = None, mix: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Norm(mix a + (1 - mix) b) where mask, Norm(a) elsewhere; Norm(a) without b."""
        if b is not None and mix is not None:
            return branch_mix_norm(
                a, b, mix, mask=mask, weight=self.weight, bias=self.bias, norm=self.kind, eps=self.eps
            )
        if self.weight is None:
            return a
        acc = accumulate_dtype(a.dtype)
        weight, wide = self.weight.to(acc), a.to(acc)
        if self.kind == "rms":
            return F.rms_norm(wide, wide.shape[-1:], weight, self.eps).to(a.dtype)
        bias = None if self.bias is None else self.bias.to(acc)
        return F.layer_norm(wide, wide.shape[-1:], weight, bias, self.eps).to(a.dtype)
