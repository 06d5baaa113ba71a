"""Attention to what is far by the gated delta rule: a state that overwrites what it holds under a key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dims import accumulate_dtype, without_autocast
from ..gated_delta_scan import gated_delta_scan
from ..reference.gated_delta_scan import l2norm
from .far import LAST, FarAttention, mapped
from .near import Near
from .past import Past
from .scan import Mean
from .shape import AttentionShape


class FarDelta(FarAttention):
    """The gated delta rule, over tokens that entered the state.

        b = c dt / (1 + c dt),  c = exp(beta_bias)
        S = exp(-a dt) (I - b f(k) f(k)^T) S + b f(k) v^T   where a token enters;    y = scale S^T g(q)

    f and g are a linear map per head, then a division by the length. What S holds under a key is moved towards the
    value, by the more the larger the step size dt: S minimises |S^T f(k) - v|^2 + |change of S|^2 / (c dt) (Longhorn,
    Liu et al., arXiv:2407.14207). y is no mean, and has no sum of weights: what is far counts by its number.

    Args:
        shape, initial_decay, feature_dim, z_gate: as of `FarAttention`.
    """

    in_ops = False

    def __init__(
        self, shape: AttentionShape, *, initial_decay: float | tuple[float, float], feature_dim: int, z_gate: bool
    ) -> None:
        super().__init__(shape, initial_decay=initial_decay, initial_scale=1.0, feature_dim=feature_dim, z_gate=z_gate)
        self.state_size = (feature_dim, shape.head_dim)

    def _make_more(self) -> None:
        self.beta_bias = nn.Parameter(torch.empty(self.shape.num_heads))

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Initialise every parameter that attention does not have. A token of the mean step size has b = 1/2."""
        super().reset_new_parameters()
        self.beta_bias.copy_(-F.softplus(self.dt_bias).log())

    def log_weight(self) -> Tensor:
        """(H,): the log of what one far token adds to what stands for the sum of the weights, at first."""
        return torch.zeros_like(self.dt_bias)

    def read(self, hidden_states: Tensor, q: Tensor, past: Past, near: Near, ssm: Tensor | None) -> Mean:
        """What is far from each token, as `FarAttention.read`; in one `gated_delta_scan`."""
        groups, total = self.shape.num_kv_heads, past.keys.shape[1]
        visits = self._visits(past, near.when)
        g, beta = self._written(visits.steps)
        y = gated_delta_scan(
            self._at_reads(self._queries(q), total), visits.features, visits.values, g, beta, scale=1.0,
            use_qk_l2norm_in_kernel=True, seq_idx=visits.numbers, token_order=visits.order,
            initial_state=None if ssm is None else self._by_group(ssm),
        )  # fmt: skip
        assert isinstance(y, Tensor)
        y = y[:, total:].unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3)
        return self._counted(hidden_states, y, near)

    def step(self, hidden_states: Tensor, q: Tensor, near: Near, ssm: Tensor) -> Mean:
        """What is far from one token, which is not written."""
        own = l2norm(self._queries(q)[:, 0].to(ssm.dtype))
        with without_autocast(q.device):
            y = (own[:, :, None] @ ssm)[:, :, 0]
        return self._counted(hidden_states, y[:, None].to(q.dtype), near)

    def _counted(self, z: Tensor, y: Tensor, near: Near) -> Mean:
        y = y * self.scale.to(y.dtype)[:, None]
        count = near.far.clamp(min=1).to(accumulate_dtype(y.dtype)).log()
        return self._gated(z, y, count[..., None].expand(y.shape[:3]))

    def _queries(self, q: Tensor) -> Tensor:
        return mapped(q, self.c_map).to(q.dtype)

    def _features(self, keys: Tensor) -> Tensor:
        return mapped(keys, self.b_map).to(keys.dtype)

    def _written(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """g and beta (B G, n, H / G) of step sizes."""
        acc, groups = steps.dtype, self.shape.num_kv_heads
        dt = steps.unflatten(0, (-1, groups))
        written = dt * self.beta_bias.to(acc).exp().view(groups, 1, -1)
        return (-dt * self._rates().to(acc)).flatten(0, 1), (written / (1 + written)).flatten(0, 1)

    def _by_group(self, ssm: Tensor) -> Tensor:
        """(B, H, N, P) as (B G, H / G, N, P)."""
        return ssm.unflatten(1, (self.shape.num_kv_heads, -1)).flatten(0, 1)

    def enter(
        self,
        ssm: Tensor | None,
        keys: Tensor,
        values: Tensor,
        steps: Tensor,
        enters: Tensor,
        entered: Tensor | None = None,
    ) -> Tensor:
        """The state after tokens entered it, as `FarAttention.enter`."""
        outside = ~enters.transpose(1, 2)[..., None]
        keys, values, dt = (t.masked_fill(outside, 0) for t in (keys, values, steps))
        features, values = (t.transpose(1, 2).flatten(0, 1)[:, :, None] for t in (self._features(keys), values))
        order = None
        if entered is not None:
            order = torch.where(enters, entered, LAST).argsort(dim=2, stable=True).int().flatten(0, 1)
        g, beta = self._written(dt.transpose(1, 2).flatten(0, 1))
        _, new = gated_delta_scan(
            torch.zeros_like(features), features, values, g, beta, scale=1.0, use_qk_l2norm_in_kernel=True,
            token_order=order, initial_state=None if ssm is None else self._by_group(ssm), return_final_state=True,
        )  # fmt: skip
        return new.unflatten(0, (-1, self.shape.num_kv_heads)).flatten(1, 2)
