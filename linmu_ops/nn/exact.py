"""ExactMMATE: near and kept tokens exact, far ones linear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import _transforms
from .._dims import accumulate_dtype
from .._registry import serves
from ..context_parallel import SlabLayout
from ..exact_step import NO_LIMIT
from ..exact_step import run as exact_step
from ..token_layout import TokenLayout
from ._inputs import Call, logistic, without_padding
from .block import Block, root_mean_square
from .borders import Borders
from .config import EXACT, ExactConfig
from .far import FarAttention
from .far_delta import FarDelta
from .near import Near, NearAttention
from .past import Past, past_of
from .scan import Mean, WideLinear
from .state import STEPS, MMATEState, on_host, written_in_place

_CLOSED = 8.0  # nats by which what is far counts less at first


class ExactMMATE(Block):
    """Exact near a token, linear far from it: what the attention of a pretrained causal decoder becomes.

        out = W_O (s y_exact + (1 - s) y_far),      s = sigmoid(lse_exact - log_total_far - share(z) + excess)

    Every earlier token is in one place. *Near* are the tokens of the window, and the sinks. *Kept* are those with the
    largest step sizes among the tokens that have left the window, so many for each key/value head. *Far* are all
    others: they have entered the scan's state, for good. Tokens leave min(text_window, 64) at a time, in their order.
    A visual token reads what has left where its slab begins: the frames whose windows begin together. What lies in
    another window of the slab is nowhere.

    y_exact is softmax attention to what is near or kept. y_far is the scan's weighted mean of what is far, under
    learned feature maps. s is the share that one softmax over all these would leave to the exact ones:

    - lse_exact is the log-sum-exp of their scores;
    - log_total_far is the log of the sum of the scan's weights, or, with far="delta", of the number of far tokens;
    - share is a linear map of the input, one number per head. It says how the two compare. It starts so that what is
      far hardly counts;
    - excess is log(number of far tokens / far_limit), or 0 where fewer are far. So what is far gains no weight with its
      number, once this is beyond what `calibrate` saw.

    Where nothing is far, s is 1, and a block made from attention *is* that attention. Without gradients, a call in
    which nothing is far runs neither maps nor scan: always on a CPU, elsewhere where the length alone tells.

    A video may be cut anywhere into several calls, with `TokenLayout.part` for their layouts: these give what one call
    gives, to rounding. After a cut the state also holds the slab's tokens so far, no more than a slab. A video whose
    rest does not come in the next call ends there. Without `causal_windows` tokens see later ones: then a video may be
    cut where the windows of every layer end, and an image nowhere.

    Where rows are split over processes (`context`), a rank gets what such a call would find in its state. It sends each
    later rank the keys and values of the tokens before its border that are in a state, of those since the slab began
    that the border cuts, and of the `kept_tokens` best of all that it has; and to all ranks B H ((P + 1) N + 1) numbers
    of what is far. This does not grow with the length of the row.

    `Block` explains arguments and call, `ExactConfig` the options.

    Attributes:
        far_limit: () int64, the largest number of far tokens that calibration saw; 2**62 before it, which is no limit.

    Example:
        >>> block = ExactMMATE(dim=384, num_heads=6)
        >>> block(torch.randn(2, 1000, 384)).shape
        torch.Size([2, 1000, 384])
    """

    _name = "ExactMMATE"
    default_config: ClassVar[ExactConfig] = EXACT
    default_causal_windows = True
    config: ExactConfig
    scan: FarAttention
    windows: NearAttention
    far_limit: Tensor

    def _build(self) -> None:
        config, shape = self.config, self.shape
        feature_dim = config.feature_dim or shape.head_dim
        if config.far == "delta":
            self.scan = FarDelta(
                shape, initial_decay=config.initial_decay, feature_dim=feature_dim, z_gate=config.z_gate
            )
        else:
            self.scan = FarAttention(
                shape, initial_decay=config.initial_decay, initial_scale=config.initial_scale, feature_dim=feature_dim,
                z_gate=config.z_gate,
            )  # fmt: skip
        self.windows = NearAttention(
            shape, window=config.window, image_window=config.image_window, text_window=config.text_window,
            sink_tokens=config.sink_tokens, kept_tokens=config.kept_tokens,
        )  # fmt: skip
        self.share = WideLinear(shape.dim, shape.num_heads)
        self.register_buffer("far_limit", torch.tensor(NO_LIMIT))
        self.o_proj = shape.output_projection()

    @torch.no_grad()
    def reset_new_parameters(self) -> None:
        """Initialise every parameter that attention does not have; far starts with a share near 0."""
        self.scan.reset_new_parameters()
        nn.init.zeros_(self.share.weight)
        self.far_limit.fill_(NO_LIMIT)
        # So that each far token counts the same at first, whatever step sizes and maps make of its weight.
        self.share.bias.copy_(-self.scan.log_weight() - _CLOSED)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Blocks were saved before there was a limit. A part of a block's tensors, as of adapters, says nothing of it.
        if all(prefix + name in state_dict for name, _ in self.named_parameters()):
            state_dict.setdefault(f"{prefix}far_limit", torch.tensor(NO_LIMIT))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _output_projection(self) -> nn.Module:
        return self.o_proj

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MMATEState:
        """The state before the first token: zeros. `Block.init_state` explains the arguments."""
        state, sizes = super().init_state(batch_size, dtype=dtype, device=device), self.windows.sizes
        ssm = state.ssm
        assert ssm is not None
        groups, heads = self.shape.num_kv_heads, self.shape.num_heads
        state = state._replace(steps=ssm.new_zeros(batch_size, groups, sizes.ring + sizes.kept, heads // groups))
        if not sizes.sinks:
            return state
        return state._replace(sinks=torch.zeros(batch_size, sizes.sinks, dtype=torch.bool, device=ssm.device))

    def _check_part(self, layout: TokenLayout, state: MMATEState | None, device: torch.device) -> None:
        self.windows.check_part(self._name, layout, state, device)

    def _check_context(self, has_state: bool) -> None:
        if has_state:
            raise ValueError("ExactMMATE: state must be None, and not asked for, with a context, got one")
        if isinstance(self.scan, FarDelta):
            raise ValueError('ExactMMATE: context must be None with far="delta", got one')

    def _split(self, call: Call, slab: SlabLayout, seq_idx: Tensor | None) -> Call:
        call = super()._split(call, slab, seq_idx)
        borders = Borders.of(slab, self.layer_windows, self.windows.sizes, call.mask, call.seq_idx)
        if not self.shape.causal_windows:
            borders.refuse_cuts(self._name)
        layout = borders.layout
        return call._replace(layout=layout if layout.has_visual or layout.is_part else None, borders=borders)

    def _mix(self, hidden_states: Tensor, call: Call) -> tuple[Tensor, MMATEState]:
        return self.scan(lambda: self._attend(hidden_states, call))

    def _attend(self, z: Tensor, call: Call) -> tuple[Tensor, MMATEState]:
        state = call.state
        if call.borders is not None:
            return self._attend_split(z, call, call.borders), MMATEState()
        if not z.shape[1]:
            empty = z.new_zeros(*z.shape[:2], self.shape.num_heads * self.shape.head_dim)
            return self.o_proj(empty), self.init_state(z.shape[0], dtype=z.dtype) if state is None else state
        in_place = state is not None and call.layout is None and written_in_place()
        in_place = in_place and state is not None and state.slab_keys is None
        if in_place and state is not None and z.shape[1] <= STEPS and self.scan.in_ops and _in_one_call(z, state):
            return self._steps_in_one_call(z, call, state), state
        if in_place and 1 < z.shape[1] <= STEPS and not self.scan.in_ops and not torch.compiler.is_compiling():
            outputs = []
            for i in range(z.shape[1]):
                cos, sin = (None if t is None else t[:, i : i + 1] for t in call.rotary or (None, None))
                turn = None if cos is None or sin is None else (cos, sin)
                real = None if call.mask is None else call.mask[:, i : i + 1]
                out, new = self._attend(z[:, i : i + 1], call._replace(rotary=turn, mask=real, state=state))
                outputs.append(out)
                state = new
            return torch.cat(outputs, dim=1), new
        in_place = in_place and z.shape[1] == 1
        q, k, v = self.windows.project(z)
        turned, keys = (self.windows.rotate(t, call.rotary) for t in (q, k))
        steps = self.scan.step_sizes(z, call.mask)
        if in_place and state is not None:
            return self._step(z, turned, keys, v, steps, call.mask, state)
        past = past_of(self.windows.sizes, keys, v, steps, call)
        near = self.windows(q, k, v, turned, past, call)
        ssm = None if state is None else state.ssm
        few = state is None and self._is_few(z)
        new, entered, last = self.windows.keep(past, call) if call.keep else (MMATEState(), None, None)
        nothing_far = few or _none(near.far)
        if not nothing_far and self.scan.in_ops and _far_in_one_call(turned, past, ssm):
            y, ssm = self.scan.join(z, turned, past, near, self._rest(z, near.far), ssm, last)
            return self.o_proj(y.flatten(2)), new._replace(ssm=ssm) if call.keep else new
        far = None if nothing_far else self.scan.read(z, turned, past, near, ssm)
        if entered is not None:
            if few or _none(entered):
                empty = steps.new_zeros(z.shape[0], self.shape.num_heads, *self.scan.state_size)
                ssm = empty if ssm is None else ssm
            else:
                ssm = self.scan.enter(ssm, past.keys, past.values, past.steps, entered, past.entered)
            new = new._replace(ssm=ssm)
        return self._joined(z, near, far), new

    def _attend_split(self, z: Tensor, call: Call, borders: Borders) -> Tensor:
        """A slab of rows that are split over ranks. Each of these makes the same collective calls."""
        q, k, v = self.windows.project(z)
        turned, keys = (self.windows.rotate(t, call.rotary) for t in (q, k))
        steps = self.scan.step_sizes(z, call.mask)
        state, nothing = borders.state(keys, v, steps)
        call = call._replace(state=state)
        past = past_of(self.windows.sizes, keys, v, steps, call) if z.shape[1] else None
        entering, nothing = borders.far(self.scan, past, (keys, v, steps), nothing)
        if past is None:
            return self.o_proj(z.new_zeros(*z.shape[:2], q.shape[2] * q.shape[3]) + nothing.to(z.dtype))
        near = self.windows(q, k, v, turned, past, call)
        near = near._replace(y=near.y + nothing.to(near.y.dtype))
        if _none(near.far):
            return self._joined(z, near, None)
        ssm = None if state is None else entering
        if _far_in_one_call(turned, past, ssm):
            y, _ = self.scan.join(z, turned, past, near, self._rest(z, near.far), ssm, None)
            return self.o_proj(y.flatten(2))
        return self._joined(z, near, self.scan.read(z, turned, past, near, ssm))

    def _is_few(self, z: Tensor) -> bool:
        """Whether so many tokens, the first of their row, are too few for one to be far."""
        sizes = self.windows.sizes
        return _may_leave_out() and z.shape[1] // sizes.leave * sizes.leave <= sizes.kept

    def _step(
        self, z: Tensor, q: Tensor, k: Tensor, v: Tensor, steps: Tensor, real: Tensor | None, state: MMATEState
    ) -> tuple[Tensor, MMATEState]:
        """One token of text, in place on the state."""
        assert state.ssm is not None and state.seen is not None
        near, new = self.windows.step(q, k, v, steps, real, state)
        out = self._joined(z, near, None if _none(near.far) else self.scan.step(z, q, near, state.ssm))
        self._leave(state.seen, new, k.dtype)
        return out, new

    def _steps_in_one_call(self, z: Tensor, call: Call, state: MMATEState) -> Tensor:
        """A few tokens of text, each between its projections in one op. Writes all of the state."""
        assert state.keys is not None and state.values is not None and state.steps is not None
        assert state.seen is not None and state.ssm is not None
        near, far, outputs, length = self.windows, self.scan, [], z.shape[1]
        # One token's axis is left out: each projection would fold it, and each argument of the op select from it. What
        # stands in for a projection, or hooks on to it, may count on it, and of strided rows PyTorch adds the bias
        # with another rounding.
        one = length == 1 and z.is_contiguous() and all(_is_alone(p) for p in self._projections())
        z = z[:, 0] if one else z
        q, k, v = near.project(z)
        dt = far.dt_proj(z)
        cos, sin = (None, None) if call.rotary is None else call.rotary
        share = gate = None
        limit = int(self.far_limit)
        for i in range(length):
            # Of what is not read where nothing is far, dt stands for the share.
            some = not near.nothing_beyond and near.sizes.may_be_far(state.seen)
            if some and share is None:
                share, gate = self.share(z), far.gate(z)
            rest, z_gate = (dt, None) if share is None else (share, gate)
            real = _at(call.mask, i)
            y, due = exact_step(
                state.keys, state.values, state.steps, state.sinks, state.seen, state.ssm,
                *((q, k, v, dt) if one else (q[:, i], k[:, i], v[:, i], dt[:, i])), far.dt_bias,
                rest if one else rest[:, i], far.c_map, far.scale, _at(cos, i), _at(sin, i),
                z_gate if one else _at(z_gate, i), real, near.sizes.window, self.shape.scale,
                self.shape.interleaved_rotary, near.nothing_beyond, limit,
            )  # fmt: skip
            outputs.append(y)
            if due.any():
                self._leave(state.seen - (1 if real is None else real.long()), state, k.dtype)
        return self.o_proj(outputs[0])[:, None] if one else self.o_proj(torch.stack(outputs, dim=1))

    def _projections(self) -> tuple[nn.Module, ...]:
        near, far = self.windows, self.scan
        maps = (near.q_proj, near.k_proj, near.v_proj, far.dt_proj, self.share, self.o_proj)
        return maps if far.z_proj is None else (*maps, far.z_proj)

    def _leave(self, before: Tensor, state: MMATEState, dtype: torch.dtype) -> None:
        """After a step that took rows from `before` tokens to those of `state`."""
        left = self.windows.leave(before, state)
        if left is not None and not _none(left.enters):
            assert state.ssm is not None
            keys, values = (t.transpose(1, 2).to(dtype) for t in left[:2])
            steps = left.steps.transpose(1, 2).to(state.ssm.dtype)
            state.ssm.copy_(self.scan.enter(state.ssm, keys, values, steps, left.enters))

    def _joined(self, z: Tensor, near: Near, far: Mean | None) -> Tensor:
        """Shares as in one softmax over what is near, kept or far. far: None where nothing is."""
        if far is None:
            return self.o_proj(near.y.flatten(2))
        rest = self._rest(z, near.far).masked_fill(near.far[..., None] == 0, -torch.inf)
        assert far.log_total is not None
        share = (rest + far.log_total - near.lse).sigmoid()
        y = torch.lerp(near.y.to(far.y.dtype), far.y, share.to(far.y.dtype)[..., None])
        return self.o_proj(y.flatten(2))

    def _rest(self, z: Tensor, far: Tensor) -> Tensor:
        """(B, L, H): what is added to the log of what is far, of which there are so many (B, L)."""
        share = self.share(z)
        if _none(far > self.far_limit):
            return share
        return share - (far.to(share.dtype) / self.far_limit).clamp(min=1).log()[..., None]

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[tuple[Mapping[str, Any], Tensor]], weights: Sequence[Tensor] | None = None
    ) -> float:
        """Fit `share` so that s is what a softmax over near, kept and far tokens would leave to the first two.

        The fit is a logistic regression per head on the block's input, by cross entropy: an error counts where it
        changes the share. From there the share of what is far is lowered, for a mean of untrained maps is no good one.
        `far_limit` becomes the largest number of far tokens that is met.
        The cost is quadratic in the length. `Block.calibrate` explains arguments and result.
        """
        batches = list(batches)
        seen, offsets, targets, counts, most = [], [], [], [], 0
        for i, (inputs, _) in enumerate(batches):
            z, layout, grid, rotary, mask, seq_idx = (inputs.get(name) for name in _CALL)
            assert isinstance(z, Tensor)
            hidden, call = without_padding(z, self._call(z, layout, grid, rotary, mask, None, False, seq_idx))
            near, far, beyond = self._far_mass(hidden, call)
            use = near.far > 0 if call.mask is None else (near.far > 0) & call.mask
            assert far.log_total is not None
            most = max(most, int(near.far[use].max())) if use.any() else most
            seen.append(hidden[use])
            offsets.append((near.lse - far.log_total)[use])
            targets.append((near.lse - beyond).sigmoid()[use])
            counts.append(targets[-1].new_ones(len(targets[-1])) if weights is None else weights[i].to(near.lse)[use])
        z = torch.cat(seen).double()
        if len(z):
            weigh = torch.cat(counts).double()
            weigh = 0.5 / len(z) + 0.5 * weigh / weigh.sum().clamp(min=1e-20)
            weight, bias = logistic(z, torch.cat(offsets), torch.cat(targets), weigh)
            self.share.weight.copy_(-weight.T)
            self.share.bias.copy_(-bias - _CLOSED)
            self.far_limit.fill_(most)
        return root_mean_square(batches, lambda inputs, target: target)

    def _far_mass(self, z: Tensor, call: Call) -> tuple[Near, Mean, Tensor]:
        """What a call makes near and far, and (B, L, H): the log-sum-exp of the scores of what is far. Quadratic."""
        q, k, v = self.windows.project(z)
        turned, keys = (self.windows.rotate(t, call.rotary) for t in (q, k))
        past = past_of(self.windows.sizes, keys, v, self.scan.step_sizes(z, call.mask), call)
        near = self.windows(q, k, v, turned, past, call)
        return near, self.scan.read(z, turned, past, near, None), self.windows.far_mass(turned, past, near.when)


def _is_alone(projection: nn.Module) -> bool:
    """Whether nobody but PyTorch sees what a projection takes and gives."""
    seen = projection._forward_hooks or projection._forward_pre_hooks or "forward" in vars(projection)
    return isinstance(projection, nn.Linear) and not seen


def _at(t: Tensor | None, token: int) -> Tensor | None:
    return None if t is None else t[:, token]


def _may_leave_out() -> bool:
    """Whether a call may leave out what changes nothing. A gradient would be missing then, in place of 0; and a graph
    is for all inputs."""
    return written_in_place() and not torch.compiler.is_compiling() and not _transforms.active()


def _none(which: Tensor) -> bool:
    """Whether it is known that all are 0. On a GPU the host would have to wait for it."""
    return on_host(which) and written_in_place() and not bool(which.any())


def _far_in_one_call(q: Tensor, past: Past, ssm: Tensor | None) -> bool:
    """Whether the op takes what is far from a prompt's tokens: where a kernel serves it, and no gradient is asked for.
    Sequences in one row are left to the scan."""
    return (
        type(q) is Tensor
        and past.numbers is None
        and serves("far_attention", q) == "cpu"
        and _may_leave_out()
        and not torch.is_autocast_enabled("cpu")
        and (ssm is None or ssm.dtype == accumulate_dtype(q.dtype))
    )


def _in_one_call(z: Tensor, state: MMATEState) -> bool:
    """Whether the op takes a step of these: where a kernel serves it. Elsewhere PyTorch's own calls are faster than its
    reference, and a compiler fuses them."""
    acc = accumulate_dtype(z.dtype)
    return (
        on_host(z)
        and serves("exact_step", z) == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and all(t is not None and t.dtype == z.dtype and t.is_contiguous() for t in (state.keys, state.values))
        and all(t is not None and t.dtype == acc and t.is_contiguous() for t in (state.steps, state.ssm))
        and all(t is None or t.is_contiguous() for t in (state.sinks, state.seen))
    )


_CALL = ("hidden_states", "layout", "grid", "position_embeddings", "attention_mask", "seq_idx")
