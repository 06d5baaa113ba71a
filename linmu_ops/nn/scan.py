"""The scan of a block. It has the shape of attention, and runs backwards too over visual tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _transforms
from .._dims import accumulate_dtype, without_autocast
from .._directions import Reverse
from .._registry import serves
from ..context_parallel import ssd_scan as split_scan
from ..ssd_scan import ssd_scan
from ..ssd_step import ssd_step
from ._inputs import Call, Rotary, apply_rotary, ridge, split_heads
from .config import decay_range
from .shape import AttentionShape
from .state import STEPS, MMATEState, written_in_place

_STEP_RANGE = 5.0  # logs of step sizes are fitted within +- this
PADDING_DT = -1e4  # softplus of it is exactly 0 in float32: padding neither decays the state nor writes to it
_NORM_EPS = 1e-6
_MAMBA2_DT, _MAMBA2_A = (1e-3, 1e-1), (1.0, 16.0)  # ranges of dt and -A at the start of mamba_ssm's Mamba2


class Mean(NamedTuple):
    """What each token gets from a scan, before the output projection.

    Attributes:
        y: (B, L, H, P).
        log_total: (B, L, H), accumulate dtype. The log of the sum of its weights, where y is a weighted mean.
    """

    y: Tensor
    log_total: Tensor | None = None


class NarrowLinear(nn.Linear):
    """A linear map to one number, or to one per head. What replaces each `nn.Linear` by a quantised map takes no
    subclass: this one saves no memory, a decay needs its bits, and 4-bit kernels want outputs by the 32."""


class WideLinear(nn.Linear):
    """A linear map whose output is in the accumulate dtype, also under autocast: it is compared with scores, whose
    common part 16 bits cannot hold."""

    def forward(self, x: Tensor) -> Tensor:
        acc = accumulate_dtype(x.dtype)
        with without_autocast(x.device):
            return F.linear(x.to(acc), self.weight.to(acc), None if self.bias is None else self.bias.to(acc))


class Decaying(nn.Module):
    """A state that forgets: how it starts, and how its step sizes are fitted."""

    dt_proj: nn.Linear
    dt_bias: nn.Parameter

    def __init__(self, shape: AttentionShape, initial_decay: float | tuple[float, float] | None) -> None:
        super().__init__()
        self.shape, self.initial_decay = shape, initial_decay

    def reset_decay(self, proj: nn.Linear, bias: Tensor, A_log: Tensor) -> None:
        """Set dt and A of one direction to what `initial_decay` says."""
        H, decays = self.shape.num_heads, decay_range(self.initial_decay)
        if decays is None:  # as in mamba_ssm: dt log-uniform, -A uniform
            low, high = (math.log(t) for t in _MAMBA2_DT)
            dt = torch.empty(H).uniform_(low, high).exp()
            A_log.copy_(torch.empty(H).uniform_(*_MAMBA2_A).log())
            proj.reset_parameters()
        else:
            low, high = decays
            spread = torch.linspace(0, 1, H) if H > 1 else torch.zeros(1)
            memory = (1 - low) ** (spread - 1) * (1 - high) ** -spread  # geometric from 1/(1-low) to 1/(1-high)
            dt = -torch.log1p(-1 / memory)  # exp(-dt) = decay
            nn.init.zeros_(A_log)
            nn.init.zeros_(proj.weight)
        bias.copy_(torch.log(torch.expm1(dt)))  # softplus of it is dt

    @torch.no_grad()
    def fit_step_sizes(self, hidden_states: Tensor, attention: Tensor) -> None:
        """Fit the forward scan's step sizes, so that a token is written as strongly as attention reads it.

        log softplus(dt_proj z + dt_bias) is fitted to log attention by weighted ridge regression. Half the weight is
        spread evenly over tokens, and half goes by the attention they get, so that rare tokens count to which
        everything attends. The mean step size of a head stays what it was.

        Args:
            hidden_states: (n, D), inputs of the layer.
            attention: (n, H) >= 0, what each of these tokens gets per head, summed over queries, in units of the mean.
        """
        z = hidden_states.double()
        # Where a step is much smaller than 1, as they are, softplus is exp.
        before = _log_mean_exp(z @ self.dt_proj.weight.double().T) + self.dt_bias.double()
        for head, m in enumerate(attention.double().unbind(1)):
            target = m.clamp(math.exp(-_STEP_RANGE), math.exp(_STEP_RANGE)).log()
            weight, _ = ridge(z, target, 0.5 / len(m) + 0.5 * m / m.sum())
            self.dt_proj.weight[head] = weight.to(self.dt_proj.weight.dtype)
            self.dt_bias[head] = (before[head] - _log_mean_exp(z @ weight)).to(self.dt_bias.dtype)


def _log_mean_exp(t: Tensor) -> Tensor:
    return t.logsumexp(0) - math.log(len(t))


class Scan(Decaying):
    """Masked bidirectional scan in the shape of an attention layer (LinMU, arXiv:2601.01322, Eq. 1-3).

        C = W_C z,  B = W_B z,  X = W_X z           C: H heads, B and X: G heads, nothing repeated
        y> = scan of all tokens, visual tokens in the layer's major-scan order
        y< = reverse scan of visual tokens, restarted at every image or video
        y  = g y> + (1 - g) y<  on visual tokens,  y> on text

    C, B and X are what attention calls queries, keys and values. Text sees only what lies before it. There is no output
    projection.

    Args:
        shape: sizes and facts of the attention layer.
        reverse: run the reverse scan.
        major_scan: visit visual tokens in the layer's order; in place if False.
        initial_decay, initial_scale: as in `MMATEConfig`.
        literal: g is per token and head, and the reverse scan has B and C of its own.
        z_gate: multiply y by silu(W_z z + b).
        head_norm: apply RMSNorm to y per head.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        reverse: bool,
        major_scan: bool,
        initial_decay: float | tuple[float, float] | None,
        initial_scale: float | None,
        literal: bool = False,
        z_gate: bool = False,
        head_norm: bool = False,
    ) -> None:
        super().__init__(shape, initial_decay)
        self.reverse, self.major_scan, self.initial_scale = reverse, major_scan, initial_scale
        dim, H, P = shape.dim, shape.num_heads, shape.head_dim
        self.state_size = (P, P)
        self.c_proj, self.b_proj, self.x_proj = shape.projections()
        self.c_norm, self.b_norm = shape.norm(), shape.norm()
        self.scale = None if initial_scale is None else nn.Parameter(torch.empty(H))
        self.dt_proj = NarrowLinear(dim, H, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.reverse_c_proj = self.reverse_b_proj = self.gate_proj = None
        if reverse:
            self.reverse_dt_proj = NarrowLinear(dim, H, bias=False)
            self.reverse_dt_bias = nn.Parameter(torch.empty(H))
            self.reverse_A_log = nn.Parameter(torch.empty(H))
            self.gate = nn.Parameter(torch.empty(H))
            if literal:
                self.gate_proj = NarrowLinear(dim, H, bias=False)
                self.reverse_c_proj, self.reverse_b_proj, _ = shape.projections()
        self.z_proj = nn.Linear(dim, H * P) if z_gate else None
        self.head_norm = nn.Parameter(torch.empty(H, P)) if head_norm else None
        self.reset_new_parameters()

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Initialise every parameter that attention does not have."""
        if self.scale is not None:
            nn.init.constant_(self.scale, self.initial_scale)  # type: ignore[arg-type]
        for proj, bias, A_log in self._directions():
            self.reset_decay(proj, bias, A_log)
        if self.reverse:
            nn.init.zeros_(self.gate)
        if self.gate_proj is not None:
            nn.init.zeros_(self.gate_proj.weight)
        if self.reverse_c_proj is not None and self.reverse_b_proj is not None:
            self.reverse_c_proj.load_state_dict(self.c_proj.state_dict())
            self.reverse_b_proj.load_state_dict(self.b_proj.state_dict())
        if self.z_proj is not None:
            nn.init.zeros_(self.z_proj.weight)
            nn.init.constant_(self.z_proj.bias, 1.2784645)  # silu of it is 1
        if self.head_norm is not None:
            nn.init.ones_(self.head_norm)

    def _directions(self) -> list[tuple[nn.Linear, Tensor, Tensor]]:
        forward = (self.dt_proj, self.dt_bias, self.A_log)
        reverse = (self.reverse_dt_proj, self.reverse_dt_bias, self.reverse_A_log) if self.reverse else None
        return [forward, reverse] if reverse else [forward]

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply y by `factor`, through a parameter that has that effect."""
        if self.head_norm is not None:
            self.head_norm.mul_(factor)
        elif self.scale is not None:
            self.scale.mul_(factor)

    def forward(self, hidden_states: Tensor, call: Call) -> tuple[Mean, MMATEState]:
        """y of both directions, and the state after these tokens: `ssm`, where `call.keep` asks for it.

        A single token updates the `ssm` of `call.state` in place where `written_in_place`.
        """
        z, P, acc = hidden_states, self.shape.head_dim, accumulate_dtype(hidden_states.dtype)
        B, C = self._positioned(self.b_proj(z), self.c_proj(z), call.rotary)
        x = split_heads(self.x_proj(z), P)
        y, ssm = self._scan(z, x, B, C, call)
        if self.z_proj is not None:
            y = y * F.silu(self.z_proj(z)).to(y.dtype).view_as(y)
        if self.head_norm is not None:
            y = (F.rms_norm(y.to(acc), y.shape[-1:], eps=_NORM_EPS) * self.head_norm).to(y.dtype)
        return Mean(y), MMATEState(ssm=ssm)

    def _scan(self, z: Tensor, x: Tensor, B: Tensor, C: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        layout, acc = call.layout, accumulate_dtype(z.dtype)
        dt, A = _step_size(self.dt_proj(z), call.mask), -self.A_log.to(acc).exp()
        scan: dict[str, Any] = dict(dt_bias=self.dt_bias, dt_softplus=True)
        ssm = None if call.state is None else call.state.ssm
        few = layout is None and ssm is not None and call.context is None and _one_by_one(z)
        if few and ssm is not None and written_in_place():
            packed = ssm.contiguous()
            steps = [ssd_step(packed, x[:, i], dt[:, i], A, B[:, i], C[:, i], **scan) for i in range(z.shape[1])]
            if not ssm.is_contiguous():
                ssm.copy_(packed)
            return torch.stack([y for y in steps if isinstance(y, Tensor)], dim=1), ssm
        if layout is not None and self.reverse:
            gate = self.gate if self.gate_proj is None else self.gate_proj(z).to(acc) + self.gate
            reverse_B = reverse_C = None
            if self.reverse_b_proj is not None and self.reverse_c_proj is not None:
                reverse_B, reverse_C = self._positioned(self.reverse_b_proj(z), self.reverse_c_proj(z), call.rotary)
            reverse = Reverse(
                dt=_step_size(self.reverse_dt_proj(z), call.mask), A=-self.reverse_A_log.to(acc).exp(), B=reverse_B,
                C=reverse_C, dt_bias=self.reverse_dt_bias, mask=layout.visual_mask(z.device),
                seq_idx=layout.reverse_seq_idx(z.device),
            )  # fmt: skip
            scan |= dict(direction="both", gate=gate.to(acc).sigmoid(), reverse=reverse)
        order = layout.scan_order(self.shape.layer_idx, z.device) if layout is not None and self.major_scan else None
        whole_or_split: Callable[..., Tensor | tuple[Tensor, ...]]
        whole_or_split = ssd_scan if call.context is None else partial(split_scan, context=call.context)
        scanned = whole_or_split(
            x, dt, A, B, C, seq_idx=call.seq_idx, token_order=order, initial_state=ssm, return_final_state=call.keep,
            **scan,
        )  # fmt: skip
        return (scanned[0], scanned[-1]) if isinstance(scanned, tuple) else (scanned, None)

    def _positioned(self, keys: Tensor, queries: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """B and C: norm, rotate and scale, as attention does with k and q."""
        P, interleaved = self.shape.head_dim, self.shape.interleaved_rotary
        B, C = split_heads(keys, P), split_heads(queries, P)
        dtype = B.dtype
        B, C = self.b_norm(B).to(dtype), self.c_norm(C).to(dtype)
        B, C = apply_rotary(B, rotary, interleaved), apply_rotary(C, rotary, interleaved)
        scale: Tensor | float = 1.0  # as in Eq. 4
        if self.scale is not None:
            scale = (self.scale.to(accumulate_dtype(dtype)) * self.shape.scale)[:, None]
        return B, (C * scale).to(dtype)


def _one_by_one(z: Tensor) -> bool:
    """Whether tokens that go on from a state are steps: one is, and a few where a step is cheap."""
    cheap = not torch.compiler.is_compiling() and not _transforms.active() and serves("ssd_step", z) == "cpu"
    return z.shape[1] == 1 or (1 < z.shape[1] <= STEPS and cheap)


def _step_size(raw: Tensor, mask: Tensor | None) -> Tensor:
    return raw if mask is None else raw.masked_fill(~mask[..., None], PADDING_DT)
