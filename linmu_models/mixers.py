"""transformers' linear layers as a whole: a decoded token in few calls, and the gated norm in one.

A layer's own forward spends a decoded token on what surrounds the kernels: views, expansions, casts, copies of states.
Here its states are written in place, and each value is read where it lies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linmu_ops import _registry

Forward = Callable[..., Any]
WIDEST = 8  # of our convolution


def _of_one_token(decode: Forward) -> Forward:
    """A layer's forward, of `decode` where it serves and of transformers' own elsewhere."""

    @functools.wraps(decode)
    def forward(
        theirs: Forward, mixer: Any, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, *,
        cache_params: Any = None, **given: Any,
    ) -> Any:  # fmt: skip
        cache = cache_params if cache is None else cache  # its name up to transformers 5.23
        states = _states(mixer, hidden_states, cache, attention_mask)
        if states is None:
            return theirs(mixer, hidden_states, cache, attention_mask, **given)
        return decode(mixer, hidden_states, *states)

    return forward


@_of_one_token
def mamba2(mixer: Any, hidden_states: Tensor, window: Tensor, state: Tensor) -> Any:
    """The forward of a Mamba-2 layer."""
    batch, groups, size = len(hidden_states), mixer.n_groups, mixer.ssm_state_size
    multiplied = hasattr(mixer, "mup_vector")  # Falcon-H1
    projected = mixer.in_proj(hidden_states * mixer.ssm_in_multiplier if multiplied else hidden_states)
    if multiplied:
        projected = projected * mixer.mup_vector
    inner = mixer.intermediate_size
    gate, line, dt = projected.split([inner, mixer.conv_dim, mixer.num_heads], -1)
    line = _convolve(mixer, window, line[:, 0])
    x, B, C = line.split([inner, groups * size, groups * size], -1)
    y, _ = _registry.call(
        "ssd_step", x, state, x.view(batch, mixer.num_heads, mixer.head_dim), dt[:, 0].float(),
        mixer.A_log.float().exp().neg_(), B.view(batch, groups, size), C.view(batch, groups, size), mixer.D.float(),
        mixer.dt_bias.float(), True, False,
    )  # fmt: skip
    y = y.view(batch, 1, inner)
    y = mixer.norm(y, gate) if getattr(mixer, "mamba_rms_norm", True) else y * F.silu(gate)
    return mixer.out_proj(y.to(hidden_states.dtype))


@_of_one_token
def gated_delta(mixer: Any, hidden_states: Tensor, window: Tensor, state: Tensor) -> Any:
    """The forward of a layer of the gated delta rule."""
    batch, keys, values, key_dim = len(hidden_states), mixer.head_k_dim, mixer.head_v_dim, mixer.key_dim
    if "in_proj_qkvz" in mixer._modules:  # Qwen3-Next, which has the parts of a head side by side
        *qkv, z, b, a = mixer.fix_query_key_value_ordering(
            mixer.in_proj_qkvz(hidden_states), mixer.in_proj_ba(hidden_states)
        )
        line = torch.cat([t.reshape(batch, -1) for t in qkv], -1)
    else:
        line = mixer.in_proj_qkv(hidden_states)[:, 0]
        z, b, a = (part(hidden_states) for part in (mixer.in_proj_z, mixer.in_proj_b, mixer.in_proj_a))
    line = _convolve(mixer, window, line)
    q, k, v = line.split([key_dim, key_dim, mixer.value_dim], -1)
    decay = F.softplus(a[:, 0].float() + mixer.dt_bias).mul_(mixer.A_log.float().exp()).neg_()
    y = _registry.call(
        "gated_delta_step", q, state, q.view(batch, -1, keys), k.view(batch, -1, keys), v.view(batch, -1, values),
        decay.float(), b[:, 0].sigmoid().float(), keys**-0.5, True,
    )  # fmt: skip
    y = mixer.norm(y.view(-1, values), z.reshape(-1, values))
    return mixer.out_proj(y.view(batch, 1, -1))


def _states(
    mixer: Any, hidden_states: Tensor, cache: Any, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The window of the convolution (B, n, D) and the state of the scan, if this is a token that we take: one, without
    gradients, after others, on a CPU, with states that are written in place."""
    if (
        cache is None
        or attention_mask is not None
        or hidden_states.shape[1] != 1
        or hidden_states.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or mixer.activation not in ("silu", "swish")
        or "_hf_hook" in vars(mixer.conv1d)  # accelerate brings its weights when a forward is called
    ):
        return None
    from transformers.cache_utils import LinearAttentionLayer

    layer = cache.layers[mixer.layer_idx]
    if (
        not isinstance(layer, LinearAttentionLayer)
        or type(layer).update_recurrent_state is not LinearAttentionLayer.update_recurrent_state
        or layer.record_past
        or not layer.has_previous_state[0]
        or not layer.is_recurrent_states_initialized[0]
    ):
        return None
    window, state = layer.conv_states[0], layer.recurrent_states[0]
    if window is None or state is None or not (window.is_contiguous() and state.is_contiguous()):
        return None
    fits = mixer.conv1d.weight.shape[-1] - 1 <= min(window.shape[2], WIDEST - 1)
    if not fits or window.dtype != hidden_states.dtype or state.dtype != torch.float32:
        return None
    for written in (window, state):
        _registry.mark_written(written)
    return window.mT, state


def _convolve(mixer: Any, window: Tensor, x: Tensor) -> Tensor:
    weight, bias = mixer.conv1d.weight.squeeze(1).float(), mixer.conv1d.bias
    out: Tensor = _registry.call(
        "causal_conv1d_step", x, window, x, weight, None if bias is None else bias.float(), True
    )
    return out


def gate_then_norm(theirs: Forward, norm: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """The gated norm of Mamba-2: x silu(gate), then each group by its root mean square."""
    if gate is None or not _takes(norm, hidden_states, gate):
        out: Tensor = theirs(norm, hidden_states, gate)
        return out
    return _normed(norm, hidden_states, gate, norm.group_size, False)


def norm_then_gate(theirs: Forward, norm: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """The gated norm of the delta rule: x by its root mean square, then times silu(gate)."""
    if not _takes(norm, hidden_states, gate):
        out: Tensor = theirs(norm, hidden_states, gate)
        return out
    return _normed(norm, hidden_states, gate, hidden_states.shape[-1], True)


def _normed(norm: Any, x: Tensor, gate: Tensor, size: int, before: bool) -> Tensor:
    rows, by = (t if t.dim() == 3 else t.reshape(1, -1, t.shape[-1]) for t in (x, gate))
    out: Tensor = _registry.call("gated_norm", x, rows, by, norm.weight, size, before, norm.variance_epsilon)
    return out.view(x.shape)


def _takes(norm: Any, x: Tensor, gate: Tensor) -> bool:
    """float32 on a CPU: narrower, transformers rounds on the way. Compiled, the layer's own is fused with the rest."""
    fits = x.dtype == gate.dtype == norm.weight.dtype == torch.float32 and x.device.type == "cpu"
    return fits and x.shape == gate.shape and not torch.compiler.is_compiling()
