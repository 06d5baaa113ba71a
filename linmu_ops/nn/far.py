"""Linear attention to what is far: a decaying state that holds what has left the windows and is not kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dims import accumulate_dtype, without_autocast
from ..far_attention import run as far_attention
from ..ssd_scan import ssd_scan
from ..ssd_step import ssd_step
from ._inputs import take
from .near import Near
from .past import Past
from .scan import Decaying, Mean, WideLinear
from .shape import AttentionShape

_NOTHING = -100.0  # stands for the log of a sum of no weights: of an infinite one, a difference may be no number
LAST = 2**40  # after all steps

T = TypeVar("T")


class Visits(NamedTuple):
    """A row of T + L visits for each of B rows and G key/value heads: the tokens that may enter, then those that read.

    Attributes:
        features: (B G, T + L, 1, N), of keys; 0 at tokens that read.
        values: (B G, T + L, 1, P), 0 at tokens that read, and at those that never enter.
        steps: (B G, T + L, H / G), likewise.
        order: (B G, T + L) int32, which is visited at a time.
        numbers: (B G, T + L) int32, which tell sequences apart; None where they are one.
    """

    features: Tensor
    values: Tensor
    steps: Tensor
    order: Tensor
    numbers: Tensor | None


class FarAttention(Decaying):
    """Linear attention under learned feature maps, over tokens that entered the state, which forgets.

        h = exp(-a dt) h + dt v (outer) f(k)   where a token enters;    y, total = h g(q) for values, and for ones

    f and g are a linear map per head, then a softmax over its channels. Keys, queries and values are those of the
    windows.

    Args:
        shape: sizes and facts of the attention layer.
        initial_decay, initial_scale, feature_dim, z_gate: as in `ExactConfig`.

    Attributes:
        in_ops: whether `exact_step` and `far_attention` compute it too.
    """

    in_ops = True

    def __init__(
        self,
        shape: AttentionShape,
        *,
        initial_decay: float | tuple[float, float],
        initial_scale: float,
        feature_dim: int,
        z_gate: bool,
    ) -> None:
        super().__init__(shape, initial_decay)
        self.initial_scale = initial_scale
        dim, H, G, P = shape.dim, shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.state_size = (P + 1, feature_dim)
        self.scale = nn.Parameter(torch.empty(H))
        self.b_map = nn.Parameter(torch.empty(G, P, feature_dim))
        self.c_map = nn.Parameter(torch.empty(H, P, feature_dim))
        self.dt_proj = WideLinear(dim, H, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.z_proj = nn.Linear(dim, H * P) if z_gate else None
        self._make_more()
        self.reset_new_parameters()

    def _make_more(self) -> None:
        """Make the parameters that a subclass has beside these."""

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Initialise every parameter that attention does not have."""
        nn.init.constant_(self.scale, self.initial_scale)
        for feature_map in (self.b_map, self.c_map):
            _, P, N = feature_map.shape
            signed = torch.cat((torch.eye(P), -torch.eye(P)), dim=1).repeat(1, -(-N // (2 * P)))
            feature_map.copy_(signed[:, :N].expand_as(feature_map))
        self.reset_decay(self.dt_proj, self.dt_bias, self.A_log)
        if self.z_proj is not None:
            nn.init.zeros_(self.z_proj.weight)
            nn.init.constant_(self.z_proj.bias, 1.2784645)  # silu of it is 1

    def log_weight(self) -> Tensor:
        """(H,): the log of what one far token adds to the sum of the weights, at first."""
        return F.softplus(self.dt_bias).log() - math.log(self.state_size[1])

    def forward(self, run: Callable[[], T]) -> T:
        """What `run` gives. It calls the methods below, which need the parameters: offloading brings these for a
        forward."""
        return run()

    def step_sizes(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, G, H / G), accumulate dtype: how strongly a token is written, > 0; 0 at padding."""
        steps = F.softplus(self.dt_proj(hidden_states) + self.dt_bias.to(accumulate_dtype(hidden_states.dtype)))
        steps = steps if mask is None else steps.masked_fill(~mask[..., None], 0)
        groups = self.shape.num_kv_heads
        return steps.unflatten(2, (groups, self.shape.num_heads // groups))

    def read(self, hidden_states: Tensor, q: Tensor, past: Past, near: Near, ssm: Tensor | None) -> Mean:
        """What is far from each token. q (B, L, H, P): rotated. near: what is near each. ssm: the state before them.

        For gradients, and where `join` does not serve. One `ssd_scan` of a row for each key/value head, as these keep
        different tokens. It visits tokens that enter, and tokens that read: these write nothing.
        """
        return self._gated(hidden_states, *self._read(self._queries(q), past, near.when, ssm))

    def join(
        self, hidden_states: Tensor, q: Tensor, past: Past, near: Near, rest: Tensor, ssm: Tensor | None,
        last: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """y (B, L, H, P) of what is near and far, in one op, and the state after the steps `last` (B,). rest (B, L, H):
        the share's. Other arguments as in `read`."""
        reads = torch.where(near.far > 0, near.when, -1).int()
        y = near.y.to(q.dtype).contiguous()
        state = far_attention(
            y, near.lse, rest, q, past.keys, past.values, past.steps, past.entered.int(), reads, self.b_map, self.c_map,
            self.scale, self._rates().flatten(), self.gate(hidden_states), ssm, None if last is None else last.int(),
            self.shape.scale,
        )  # fmt: skip
        return y, None if last is None else state

    def step(self, hidden_states: Tensor, q: Tensor, near: Near, ssm: Tensor) -> Mean:
        """What is far from one token, which is not written."""
        groups, P, N = self.shape.num_kv_heads, self.shape.head_dim, self.state_size[1]
        nothing, zero = q.new_zeros(q.shape[0], groups, P), q.new_zeros(q.shape[0], groups, N)
        dt = ssm.new_zeros(q.shape[0], self.shape.num_heads)
        y, log_total = ssd_step(
            ssm.contiguous(), nothing, dt, ssm.new_zeros(dt.shape[1]), zero, self._queries(q)[:, 0], normalize=True
        )
        return self._gated(hidden_states, y[:, None], log_total[:, None].clamp(min=_NOTHING))

    def gate(self, z: Tensor) -> Tensor | None:
        """What y is multiplied by the silu of: (..., H P), or None."""
        return None if self.z_proj is None else self.z_proj(z)

    def _gated(self, z: Tensor, y: Tensor, log_total: Tensor) -> Mean:
        gate = self.gate(z)
        if gate is not None:
            y = y * F.silu(gate).to(y.dtype).view_as(y)
        return Mean(y, log_total)

    def _queries(self, q: Tensor) -> Tensor:
        acc = accumulate_dtype(q.dtype)
        scale = (self.scale.to(acc) * self.shape.scale)[:, None]
        return (mapped(q, self.c_map) * scale).softmax(-1).to(q.dtype)

    def _features(self, keys: Tensor) -> Tensor:
        return mapped(keys, self.b_map).softmax(-1).to(keys.dtype)

    def _with_ones(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, 1), value=1.0)

    def _rates(self) -> Tensor:
        """(G, 1, H / G): how fast heads forget."""
        rates = self.A_log.to(accumulate_dtype(self.A_log.dtype)).exp()
        return rates.view(self.shape.num_kv_heads, 1, -1)

    def _read(self, C: Tensor, past: Past, when: Tensor, ssm: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, _, heads, _ = C.shape
        groups, total = self.shape.num_kv_heads, past.keys.shape[1]
        visits = self._visits(past, when)
        rates = self._rates().to(past.steps.dtype)
        dt = (visits.steps.unflatten(0, (batch, groups)) * rates).flatten(0, 1)
        if ssm is not None:
            ssm = (ssm.unflatten(1, (groups, heads // groups)) * rates[:, 0, :, None, None]).flatten(0, 1)
        y, log_total = ssd_scan(
            visits.values, dt, -dt.new_ones(heads // groups), visits.features, self._at_reads(C, total),
            token_order=visits.order, seq_idx=visits.numbers, initial_state=ssm, normalize=True,
        )  # fmt: skip
        # (B, L, G, H / G, ...). The scan writes what it decays by.
        y, log_total = (t[:, total:].unflatten(0, (batch, groups)).transpose(1, 2) for t in (y, log_total))
        log_total = log_total.clamp(min=_NOTHING) - rates[:, 0].log()
        return y.flatten(2, 3), log_total.flatten(2, 3)

    def _visits(self, past: Past, when: Tensor) -> Visits:
        """The visits of a call whose tokens read after the steps `when` (B, L)."""
        groups, steps, length = self.shape.num_kv_heads, past.kept.shape[2] - 1, when.shape[1]
        never = (past.entered == steps)[..., None]
        order = torch.where(never[..., 0], 2 * steps + 4, 2 * past.entered + 2)
        order = torch.cat((order, (2 * when + 1)[:, None].expand(-1, groups, -1)), dim=2)
        numbers = None
        if past.numbers is not None:
            # The state is that of the first sequence, which is so visited first.
            own = past.numbers
            numbers = torch.cat((own[:, :1].expand(-1, past.before), own, _of_tokens(own, past)), dim=1)
            order = order * (own.shape[1] + 2) + numbers[:, None].clamp(min=-1) + 1
            numbers = numbers.int()[:, None].expand(-1, groups, -1).flatten(0, 1)
        order = order.argsort(dim=2, stable=True).int().flatten(0, 1)
        keys, values = (t.masked_fill(never.transpose(1, 2), 0) for t in (past.keys, past.values))
        features, values = (
            F.pad(t.transpose(1, 2).flatten(0, 1), (0, 0, 0, length))[:, :, None]
            for t in (self._features(keys), values)
        )
        dt = past.steps.transpose(1, 2).masked_fill(never, 0).flatten(0, 1)
        return Visits(features, values, F.pad(dt, (0, 0, 0, length)), order, numbers)

    def _at_reads(self, queries: Tensor, total: int) -> Tensor:
        """(B, L, H, N) as of visits, (B G, T + L, H / G, N)."""
        groups = self.shape.num_kv_heads
        rows = queries.unflatten(2, (groups, queries.shape[2] // groups)).transpose(1, 2).flatten(0, 1)
        return F.pad(rows, (0, 0, 0, 0, total, 0))

    def enter(
        self,
        ssm: Tensor | None,
        keys: Tensor,
        values: Tensor,
        steps: Tensor,
        enters: Tensor,
        entered: Tensor | None = None,
    ) -> Tensor:
        """The state after the tokens of `enters` (B, G, n) bool entered it; keys and values (B, n, G, P), steps
        (B, n, G, H / G). entered (B, G, n): at which step each does; in order if None."""
        decay, new = self.entering(keys, values, steps, enters, entered)
        return new if ssm is None else ssm * decay[..., None, None] + new

    def entering(
        self, keys: Tensor, values: Tensor, steps: Tensor, enters: Tensor, entered: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `enter` does to a state: it decays it by (B, H), and adds (B, H, P + 1, N)."""
        acc = steps.dtype
        outside = ~enters.transpose(1, 2)[..., None]
        keys, values, dt = (t.masked_fill(outside, 0) for t in (keys, values, steps))
        dt = dt.transpose(1, 2)
        run = dt * self._rates().to(acc)
        if entered is None:
            run = run.cumsum(2)
            end = run[:, :, -1:]
        else:
            order = torch.where(enters, entered, LAST).argsort(dim=2, stable=True)
            run = run.gather(2, order[..., None].expand_as(run)).cumsum(2)
            end = run[:, :, -1:]
            run = run.gather(2, order.argsort(2)[..., None].expand_as(run))
        weight = dt * (run - end).exp()
        x = self._with_ones(values).to(acc).transpose(1, 2)
        weighted = (weight[..., None] * x[..., None, :]).flatten(3)  # (B, G, n, H / G (P + 8))
        with without_autocast(keys.device):
            new = weighted.mT @ self._features(keys).to(acc).transpose(1, 2)
        return (-end).exp().flatten(1), new.unflatten(2, (dt.shape[3], -1)).flatten(1, 2)


def mapped(t: Tensor, weight: Tensor) -> Tensor:
    """t (B, L, H, P) @ weight (H, P, N), in the accumulate dtype: 16 bits cannot hold what a softmax compares. einsum
    makes three times as many calls of it, which a step feels."""
    acc = accumulate_dtype(t.dtype)
    with without_autocast(t.device):
        out = torch.bmm(t.to(acc).flatten(0, 1).transpose(0, 1), weight.to(acc))
    return out.transpose(0, 1).unflatten(0, t.shape[:2])


def _of_tokens(places: Tensor, past: Past) -> Tensor:
    """(B, L) of places, as of the call's tokens."""
    return places if past.back is None else take(places, past.back)
