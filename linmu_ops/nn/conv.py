"""The optional short convolution of Flex-MA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..causal_conv1d import causal_conv1d
from ..causal_conv1d_step import causal_conv1d_step
from ._inputs import expand_as, last_tokens, real_tokens_first
from .state import written_in_place


class CausalConv1d(nn.Module):
    """Causal depthwise convolution along the visiting order; starts as the identity.

    Padding is visited after every token of its row, so that no tap ever reaches it, wherever it lies.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[:, -1])
        nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        order: Tensor | None,
        attention_mask: Tensor | None,
        state: Tensor | None,
        return_state: bool,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, L, channels), order (B, L) int32, state (B, K - 1, channels) -> y, new state (or None).

        seq_idx (B, L) int32, as `number_sequences` makes it: no tap reaches into another sequence.
        """
        if x.shape[1] == 1 and state is not None and written_in_place():
            # Of its own where it may not be written to as it is: under an autocast that began or ended in between, or
            # in a row of padding.
            new = state.clone() if attention_mask is not None else state
            new = new.to(x.dtype)
            y = causal_conv1d_step(new, x[:, 0], self.weight, self.bias)[:, None]
            if new is not state:
                state.copy_(new if attention_mask is None else torch.where(expand_as(attention_mask, new), new, state))
            return y, state
        state = None if state is None else state.to(x.dtype)
        if attention_mask is None:
            out = causal_conv1d(
                x, self.weight, self.bias, seq_idx=seq_idx, token_order=order, initial_state=state,
                return_final_state=return_state,
            )  # fmt: skip
            return out if isinstance(out, tuple) else (out, None)
        if order is None:
            visits = real_tokens_first(attention_mask)
        else:
            visits = order.long().gather(1, real_tokens_first(attention_mask.gather(1, order.long())))
        taps = self.weight.shape[1] - 1
        last = last_tokens(x, state, taps, attention_mask, visits) if return_state else None
        if last is not None and seq_idx is not None:
            owner = last_tokens(seq_idx + 1, None, taps, attention_mask, visits)
            last = last.masked_fill(expand_as(owner != seq_idx[:, -1:] + 1, last), 0)
        out = causal_conv1d(x, self.weight, self.bias, seq_idx=seq_idx, token_order=visits.int(), initial_state=state)
        assert isinstance(out, Tensor)
        return out, last
