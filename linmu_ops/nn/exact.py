"""ExactMMATE: exact near a token, linear far from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._inputs import Call, ridge, without_padding
from .block import Block, WideLinear, root_mean_square
from .config import EXACT, ExactConfig
from .scan import Scan
from .state import MMATEState
from .windows import Windows

_SPAN = 8.0


class ExactMMATE(Block):
    """Exact near a token, linear far from it: what the attention of a pretrained causal decoder becomes.

        out = W_O (s y_near + (1 - s) y_far),      s = sigmoid(lse_near - log_total_far - share(z))

    y_near is softmax attention to the tokens of the window and to the sinks. y_far is the scan's weighted mean of all
    tokens, under learned feature maps. s is the share that one softmax over all tokens would leave to the near ones:

    - lse_near is the log-sum-exp of the near scores;
    - log_total_far is the log of the sum of the scan's weights;
    - share is a linear map of the input, one number per head. It says how the two compare.

    Where nothing lies beyond the window, s is 1, and a block made from attention *is* that attention.

    `Block` explains arguments and call, `ExactConfig` the options.

    Example:
        >>> block = ExactMMATE(dim=384, num_heads=6)
        >>> block(torch.randn(2, 1000, 384)).shape
        torch.Size([2, 1000, 384])
    """

    _name = "ExactMMATE"
    default_config: ClassVar[ExactConfig] = EXACT
    default_causal_windows = True
    config: ExactConfig
    scan: Scan
    windows: Windows

    def _build(self) -> None:
        config, shape = self.config, self.shape
        self.scan = Scan(
            shape, reverse=config.reverse, major_scan=False, initial_decay=config.initial_decay,
            initial_scale=config.initial_scale, z_gate=config.z_gate, feature_dim=config.feature_dim or shape.head_dim,
            weighted_mean=True,
        )  # fmt: skip
        self.windows = Windows(
            shape, window=config.window, image_window=config.image_window, text_window=config.text_window,
            sink_tokens=config.sink_tokens, with_lse=True,
        )  # fmt: skip
        self.share = WideLinear(shape.dim, shape.num_heads)
        self.o_proj = shape.output_projection()

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Initialise every parameter that attention does not have."""
        self.scan.reset_new_parameters()
        nn.init.zeros_(self.share.weight)
        nn.init.zeros_(self.share.bias)

    def _output_projection(self) -> nn.Module:
        return self.o_proj

    def _mix(self, hidden_states: Tensor, call: Call) -> tuple[Tensor, MMATEState]:
        near, state = self.windows(hidden_states, call)
        far, kept = self.scan(hidden_states, call)
        nothing_far = near.beyond[..., None] == 0
        # Where nothing is near, something else must be there, and the other way round: no -inf less -inf.
        rest = self.share(hidden_states).masked_fill(nothing_far & near.lse.isfinite(), -torch.inf)
        share = (near.lse - rest - far.log_total).sigmoid()
        y = torch.lerp(far.y, near.y, share.to(far.y.dtype)[..., None])
        return self.o_proj(y.flatten(2)), state._replace(ssm=kept.ssm)

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[tuple[Mapping[str, Any], Tensor]], weights: Sequence[Tensor] | None = None
    ) -> float:
        """Fit `share` so that s is what a softmax over all tokens would leave to the near ones.

        The fit is a ridge regression per head on the block's input. Its target is the log-sum-exp of the scores beyond
        the window, less log_total_far. The cost is quadratic in the length. `Block.calibrate` explains arguments and
        result.
        """
        batches = list(batches)
        seen, targets, counts = [], [], []
        for i, (inputs, _) in enumerate(batches):
            z, layout, grid, rotary, mask, seq_idx = (inputs.get(name) for name in _CALL)
            assert isinstance(z, Tensor)
            hidden, call = without_padding(z, self._call(z, layout, grid, rotary, mask, None, False, seq_idx))
            inside, rest, count = self.windows.lse_beyond(hidden, call)
            far, _ = self.scan(hidden, call)
            use = count > 0
            seen.append(hidden[use])
            # Outside of this range around `inside` sigmoid is all but constant.
            rest = torch.maximum(torch.minimum(rest, inside + _SPAN), inside - _SPAN)[use]
            # What the block adds to the linear map, as in `_mix`.
            targets.append(rest - far.log_total[use])
            counts.append(rest.new_ones(len(rest)) if weights is None else weights[i].to(rest)[use])
        z, target = torch.cat(seen).double(), torch.cat(targets)
        if len(z):
            weigh = torch.cat(counts)
            weight, bias = ridge(z, target, 0.5 / len(z) + 0.5 * weigh / weigh.sum().clamp(min=1e-20))
            self.share.weight.copy_(weight.T)
            self.share.bias.copy_(bias)
        return root_mean_square(batches, lambda inputs, target: target)


_CALL = ("hidden_states", "layout", "grid", "position_embeddings", "attention_mask", "seq_idx")
