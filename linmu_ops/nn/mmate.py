"""M-MATE: the paper's block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dims import accumulate_dtype
from ..branch_mix_norm import branch_mix_norm
from ..token_layout import TokenLayout
from ._inputs import Call, check_began
from .block import Block, root_mean_square
from .config import PAPER, MMATEConfig
from .scan import NarrowLinear, Scan
from .state import MMATEState
from .windows import Windows

_NORM_EPS = 1e-6


class MMATE(Block):
    """The paper's block (LinMU, arXiv:2601.01322, Algorithm 1): a scan (Flex-MA) beside windows (Local-Swin).

        out = Norm(lambda y_flex + (1 - lambda) y_swin)  on visual tokens,    out = Norm(y_flex)  on text

    y_flex is the projected output of `scan`, y_swin that of `windows`. Both take the same (normed) hidden states. Norm
    is the identity unless the config is literal. With `text_window` text has both branches too.

    `Block` explains arguments and call, `MMATEConfig` the options.

    Attributes:
        scan_enabled, windows_enabled: False leaves a branch out of `forward`, as if the config had it off. Its
            parameters then get no gradient: freeze them. At least one branch must be on.
        mix: the logit of lambda. mix_proj: its linear map, where lambda is per token. norm: the final norm.

    Example:
        >>> block = MMATE(dim=384, num_heads=6)
        >>> block(torch.randn(2, 8 * 14 * 14, 384), grid=(8, 14, 14)).shape
        torch.Size([2, 1568, 384])
    """

    _name = "MMATE"
    default_config: ClassVar[MMATEConfig] = PAPER
    default_causal_windows = False
    config: MMATEConfig
    scan: Scan | None
    windows: Windows | None

    def _build(self) -> None:
        config, shape = self.config, self.shape
        self.scan = self.windows = self.scan_o_proj = self.windows_o_proj = self.mix_proj = None
        if config.flex:
            self.scan = Scan(
                shape, reverse=config.reverse, major_scan=config.major_scan, initial_decay=config.initial_decay,
                initial_scale=config.initial_scale, literal=config.literal, z_gate=config.z_gate,
                head_norm=config.head_norm,
            )  # fmt: skip
            self.scan_o_proj = shape.output_projection()
        if config.swin:
            self.windows = Windows(
                shape, window=config.window, image_window=config.image_window, text_window=config.text_window
            )
            self.windows_o_proj = shape.output_projection()
        self.scan_enabled, self.windows_enabled = config.flex, config.swin
        if config.flex and config.swin:
            self.mix = nn.Parameter(torch.empty(1))
            self.mix_proj = NarrowLinear(shape.dim, 1, bias=False) if config.literal else None
        self.norm = BranchNorm(shape.dim, "layer" if config.literal else "none")

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Initialise every parameter that attention does not have; lambda starts at 1/2."""
        if self.scan is not None:
            self.scan.reset_new_parameters()
        if self.scan is not None and self.windows is not None:
            nn.init.zeros_(self.mix)
        if self.mix_proj is not None:
            nn.init.zeros_(self.mix_proj.weight)
        self.norm.reset_parameters()

    def _output_projection(self) -> nn.Module:
        return self.get_submodule("windows_o_proj" if self.scan_o_proj is None else "scan_o_proj")

    def _check_part(self, layout: TokenLayout, state: MMATEState | None, device: torch.device) -> None:
        config = self.config
        if config.swin or config.reverse or config.major_scan:
            raise ValueError(
                "MMATE: layout must be of whole images and videos, as windows, reverse and major scan need all of one, "
                "got a part of one"
            )
        check_began(self._name, layout, state)

    def _check_context(self, has_state: bool) -> None:
        if has_state and self.config.text_window:
            raise ValueError("MMATE: state must be None, and not asked for, with a context and a text_window, got one")

    def _mix(self, hidden_states: Tensor, call: Call) -> tuple[Tensor, MMATEState]:
        a = b = None
        state = MMATEState()
        if self.scan is not None and self.scan_o_proj is not None and self.scan_enabled:
            far, kept = self.scan(hidden_states, call)
            state = state._replace(ssm=kept.ssm)
            a = self.scan_o_proj(far.y.flatten(2))
        attends = call.layout is not None or self.config.text_window
        mask = None  # the tokens that have windows; None for all
        if self.windows is not None and self.windows_o_proj is not None and self.windows_enabled and attends:
            near, kept = self.windows(hidden_states, call)
            state = kept._replace(ssm=state.ssm)
            b = self.windows_o_proj(near.flatten(2))
            if call.layout is not None and not self.config.text_window:
                mask = call.layout.visual_mask(hidden_states.device)
        if a is None:
            b = torch.zeros_like(hidden_states) if b is None else b
            return self.norm(b if mask is None else b.masked_fill(~mask[..., None], 0)), state
        if b is None:
            return self.norm(a), state
        logit = self.mix if self.mix_proj is None else self.mix_proj(hidden_states)[..., 0] + self.mix
        return self.norm(a, b, logit.to(accumulate_dtype(a.dtype)).sigmoid(), mask), state

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[tuple[Mapping[str, Any], Tensor]], weights: Sequence[Tensor] | None = None
    ) -> float:
        """Scale y_flex to the size of the targets. Call it after the weights are loaded, before training.

        The root mean squares over all tokens that are not padding become equal. The bias of the output projection is a
        copy of the teacher's and is not scaled: both sides are measured without it. `Block.calibrate` explains
        arguments and result; `weights` are not used.

        Raises:
            ValueError: the config is literal; the paper does not calibrate.
        """
        if self.config.literal:
            raise ValueError("MMATE: calibrate must not be called with literal=True, as the paper does not calibrate")
        batches = list(batches)
        target = root_mean_square(batches, lambda inputs, target: target)
        if self.scan is None or self.scan_o_proj is None:
            return target
        bias = 0 if self.scan_o_proj.bias is None else self.scan_o_proj.bias
        windows, self.windows_enabled = self.windows_enabled, False
        try:
            forward: Any = MMATE.forward  # a subclass may take its layout in another way
            size = root_mean_square(batches, lambda inputs, target: forward(self, **inputs) - bias)
        finally:
            self.windows_enabled = windows
        if size > 0:
            self.scan.rescale(root_mean_square(batches, lambda inputs, target: target - bias) / size)
        return target


class BranchNorm(nn.Module):
    """The norm after the mix: "layer", with a scale and a bias per channel, or "none"."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(dim)) if kind == "layer" else None
        self.bias = nn.Parameter(torch.zeros(dim)) if kind == "layer" else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Scale 1, bias 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(
        self, a: Tensor, b: Tensor | None = None, mix: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Norm(mix a + (1 - mix) b) where mask, Norm(a) elsewhere; Norm(a) without b."""
        if b is not None and mix is not None:
            return branch_mix_norm(
                a, b, mix, mask=mask, weight=self.weight, bias=self.bias, norm=self.kind, eps=_NORM_EPS
            )
        if self.weight is None or self.bias is None:
            return a
        acc = accumulate_dtype(a.dtype)
        return F.layer_norm(a.to(acc), a.shape[-1:], self.weight.to(acc), self.bias.to(acc), _NORM_EPS).to(a.dtype)
