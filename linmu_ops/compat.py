"""The functions that users of mamba_ssm and of causal-conv1d import, on our ops: on CPUs too.

    from linmu_ops.compat import mamba_chunk_scan_combined, selective_state_update    # of mamba_ssm.ops.triton
    from linmu_ops.compat import causal_conv1d_fn, causal_conv1d_update               # of causal_conv1d

Arguments, their order and what comes back are theirs, of mamba_ssm 2.3 and causal-conv1d 1.6. Each argument is honoured
or refused. Two of theirs say how to compute, not what: `chunk_size` and `state_dtype`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_size
from .causal_conv1d import causal_conv1d, check_filter
from .ssd_scan import ssd_scan
from .ssd_step import ssd_step

INTEGERS = (torch.int32, torch.int64)
NO_LIMIT = (0.0, float("inf"))


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT, return_final_states: bool = False, return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """`ssd_scan` as `mamba_ssm.ops.triton.ssd_combined` calls it; differentiable.

    Args:
        x: (B, L, H, P) float32, float64, bfloat16 or float16.
        dt: (B, L, H) float. Clamped to dt_limit, after the bias and softplus.
        A: (H,) float, <= 0.
        B, C: (B, L, G, N) float; G divides H.
        chunk_size: >= 1. The result does not depend on it: our kernels choose their own.
        D: (H,) or (H, P) float.
        z: (B, L, H, P) float. The output is multiplied by silu(z).
        dt_bias: (H,) float.
        initial_states: (B, H, P, N) float. The state before the first token.
        seq_idx: (B, L) int32 or int64. The state restarts where it changes.
        cu_seqlens: (n + 1,) int32 or int64. Where the sequences of the one row begin, and L at last. It goes with
            return_varlen_states, and seq_idx with both.
        return_final_states: also return the state after the last token.
        return_varlen_states: also return the state after each sequence.
        state_dtype: None or float32. States between chunks are float32 (float64 for float64 x) in any case.

    Returns:
        y (B, L, H, P), dtype of x; then the final state (B, H, P, N), and the sequences' (n, H, P, N), where asked for,
        float32 (or float64).

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a type or dtype does.
    """
    op = "mamba_chunk_scan_combined"
    d = Dims(op)
    d("x", x, "B L H P", FLOATS)
    d("dt", dt, "B L H", FLOATS)
    d("A", A, "H", FLOATS)
    d("B", B, "B L G N", FLOATS)
    d("C", C, "B L G N", FLOATS)
    d.divides("B", "G", "H")
    by_channel = isinstance(D, Tensor) and D.dim() == 2
    d.optional("D", D, "H P" if by_channel else "H", FLOATS)
    d.optional("z", z, "B L H P", FLOATS)
    d.optional("dt_bias", dt_bias, "H", FLOATS)
    d.optional("initial_states", initial_states, "B H P N", FLOATS)
    d.optional("seq_idx", seq_idx, "B L", INTEGERS)
    d.optional("cu_seqlens", cu_seqlens, "n+1", INTEGERS)
    d.same_device(
        x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx,
    )  # fmt: skip
    check_size(op, "chunk_size", chunk_size)
    if state_dtype not in (None, torch.float32):
        raise TypeError(f"{op}: state_dtype must be None or float32, got {str(state_dtype).removeprefix('torch.')}")
    if (cu_seqlens is not None) != return_varlen_states:
        got = "none" if cu_seqlens is None else "one"
        raise ValueError(
            f"{op}: cu_seqlens must be given with return_varlen_states, and not without, got {got}; seq_idx alone "
            "parts sequences"
        )
    acc = accumulate_dtype(x.dtype)
    if not dt_softplus or tuple(dt_limit) != NO_LIMIT:
        dt = dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias.to(acc)
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        dt_bias, dt_softplus = None, False
    state = None if initial_states is None else initial_states.to(acc)
    sequences = None if seq_idx is None else numbered(seq_idx)
    own: dict[str, Any] = dict(D=None if by_channel else D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    B, C = B.to(x.dtype), C.to(x.dtype)
    ends: tuple[Tensor, ...] = ()
    if cu_seqlens is None:
        y, last = ssd_scan(
            x, dt, A, B, C, **own, seq_idx=sequences, initial_state=state, return_final_state=True
        )  # fmt: skip
    else:
        bounds = _bounds(op, cu_seqlens, sequences, state, x.shape[0], x.shape[1])
        pieces = [[t[:, a:b] for t in (x, dt, B, C)] for a, b in itertools.pairwise(bounds)]
        parts = [ssd_scan(x, dt, A, B, C, **own, return_final_state=True) for x, dt, B, C in pieces]
        y, ends = torch.cat([part[0] for part in parts], dim=1), (torch.cat([part[1] for part in parts]),)
        # Empty sequences at the end begin after the last token.
        last = parts[max(bounds.index(x.shape[1]) - 1, 0)][1]
    if by_channel or z is not None:
        wide = y.to(acc)
        wide = wide + x.to(acc) * D.to(acc) if by_channel and D is not None else wide
        y = (wide if z is None else wide * F.silu(z.to(acc))).to(x.dtype)
    states = (*((last,) if return_final_states else ()), *ends)
    return (y, *states) if states else y


def numbered(seq_idx: Tensor) -> Tensor:
    """(B, L) int32 that changes where seq_idx does: 64 bits are not cut off, by which two sequences may differ."""
    if seq_idx.dtype == torch.int32:
        return seq_idx
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return begins[:, : seq_idx.shape[1]].cumsum(1, dtype=torch.int32)


def _bounds(
    op: str, cu_seqlens: Tensor, seq_idx: Tensor | None, state: Tensor | None, rows: int, length: int
) -> list[int]:
    """`cu_seqlens` as numbers, which must say what seq_idx says."""
    if rows != 1:
        raise ValueError(f"{op}: x must be of one row with cu_seqlens, got {rows}")
    if state is not None:
        raise ValueError(f"{op}: initial_states must be None with cu_seqlens, got a state")
    bounds: list[int] = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or sorted(bounds) != bounds:
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to L={length}, got {bounds}")
    starts = {a for a in bounds if 0 < a < length}
    found = None if seq_idx is None else {i + 1 for i in (seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero()[:, 0].tolist()}
    if found != starts and (found is not None or starts):
        got = "none" if found is None else sorted(found)
        raise ValueError(f"{op}: seq_idx must change where cu_seqlens does, at {sorted(starts)}, got {got}")
    return bounds


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`ssd_step` as `mamba_ssm.ops.triton.selective_state_update` calls it; `state` is updated in place.

    Each tensor may lack the axis of heads, as in Mamba-1: H is 1 then. A that is expanded from one number per head, as
    in Mamba-2, or per channel, runs on `ssd_step`; another A runs in plain PyTorch, and warns once.

    Args:
        state: (S, H, P, N) or (S, P, N) float. S is B, or more with state_batch_indices.
        x: (B, H, P) or (B, P) float32, float64, bfloat16 or float16.
        dt: (B, H, P) or (B, P) float.
        A: (H, P, N) or (P, N) float, <= 0.
        B, C: (B, G, N) or (B, N) float; G divides H.
        D: (H, P) or (P,) float.
        z: (B, H, P) or (B, P) float. The output is multiplied by silu(z).
        dt_bias: (H, P) or (P,) float.
        dt_softplus: apply softplus to dt (+ bias).
        state_batch_indices: (B,) int32 or int64. The row of `state` that a row of x updates. Below 0: none, and the
            output is 0. No row twice.

    Returns:
        y: as x.

    Raises:
        ValueError: a shape or device breaks the table above. TypeError: a dtype does.
        RuntimeError: an input requires grad while grad is enabled.
    """
    op = "selective_state_update"
    with_heads = isinstance(state, Tensor) and state.dim() > 3
    named = {"state": (state, 1), "x": (x, 1), "dt": (dt, 1), "A": (A, 0), "B": (B, 1), "C": (C, 1), "D": (D, 0),
             "z": (z, 1), "dt_bias": (dt_bias, 0)}  # fmt: skip
    axes = {"state": "S H P N", "x": "B H P", "dt": "B H P", "A": "H P N", "B": "B G N", "C": "B G N", "D": "H P",
            "z": "B H P", "dt_bias": "H P"}  # fmt: skip
    d = Dims(op)
    full: dict[str, Any] = {}
    for name, (t, axis) in named.items():
        if t is not None or name in ("state", "x", "dt", "A", "B", "C"):
            lacks = isinstance(t, Tensor) and t.dim() == len(axes[name].split()) - 1
            full[name] = t.unsqueeze(axis) if lacks and t is not None else t
            d(name, full[name], axes[name], FLOATS)
    d.divides("B", "G", "H")
    d.optional("state_batch_indices", state_batch_indices, "B", INTEGERS)
    if state_batch_indices is None and d["S"] != d["B"]:
        raise ValueError(f"{op}: state must have B={d['B']} rows without state_batch_indices, got {d['S']}")
    given = {name: t for name, t in full.items() if name != "x"}
    d.same_device(full["x"], **given, state_batch_indices=state_batch_indices)
    _no_gradient(op, *full.values())
    store = full.pop("state")
    if state_batch_indices is None:
        y = _update(store, **full, dt_softplus=dt_softplus)
    else:
        rows = state_batch_indices >= 0
        slots, per_row = state_batch_indices[rows].long(), ("x", "dt", "B", "C", "z")
        mine = store[slots]
        y = torch.zeros_like(full["x"])
        y[rows] = _update(
            mine, **{n: _of_rows(t, rows) if n in per_row else t for n, t in full.items()}, dt_softplus=dt_softplus
        )  # fmt: skip
        store[slots] = mine
    return y if with_heads else y[:, 0]


def _update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_softplus: bool, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step of `state` (B, H, P, N), in place."""
    acc = accumulate_dtype(x.dtype)
    batch, heads, channels, size = state.shape
    by_head = _one_value(2, dt) and _one_value(1, A, dt_bias) and _one_value(2, A)
    by_channel = not by_head and _one_value(2, A)
    if by_head or by_channel:
        # Channels that differ are heads of one channel each.
        shape = state.shape if by_head else (batch, heads * channels, 1, size)
        ours = state.to(acc).reshape(shape).contiguous()
        steps, rates, bias = (
            (dt[:, :, 0], A[:, 0, 0], None if dt_bias is None else dt_bias[:, 0])
            if by_head
            else (dt.flatten(1), A[:, :, 0].flatten(), None if dt_bias is None else dt_bias.flatten())
        )
        y = ssd_step(
            ours, x if by_head else x.reshape(batch, heads * channels, 1), steps, rates, B.to(x.dtype), C.to(x.dtype),
            dt_bias=bias, dt_softplus=dt_softplus,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        wide = y.reshape(x.shape).to(acc)
        if state.dtype != acc or not state.is_contiguous():
            state.copy_(ours.reshape(state.shape).to(state.dtype))  # PyTorch 2.13 loses the sign of a negative view
    else:
        _registry.warn_once(
            "selective_state_update",
            "selective_state_update: A differs along the state, as in Mamba-1, so a step runs in plain PyTorch",
        )
        step = dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias.to(acc)
        step = (F.softplus(step) if dt_softplus else step)[..., None]
        b, c = (t.to(acc).repeat_interleave(heads // t.shape[1], dim=1) for t in (B, C))
        new = state.to(acc) * (step * A.to(acc)).exp() + step * x.to(acc)[..., None] * b[:, :, None]
        state.copy_(new.to(state.dtype))
        wide = (new @ c[..., None])[..., 0]
    wide = wide if D is None else wide + x.to(acc) * D.to(acc)
    return (wide if z is None else wide * F.silu(z.to(acc))).to(x.dtype)


def _of_rows(t: Tensor, rows: Tensor) -> Tensor:
    """t[rows], expanded as t is."""
    expanded = t.shape[-1] > 1 and t.stride(-1) == 0
    return t[..., :1][rows].expand(-1, *t.shape[1:]) if expanded else t[rows]


def _one_value(axis: int, *tensors: Tensor | None) -> bool:
    """Whether each was expanded along an axis, so that it has one value there."""
    return all(t is None or t.stride(axis) == 0 or t.shape[axis] == 1 for t in tensors)


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`linmu_ops.causal_conv1d` as `causal_conv1d.causal_conv1d_fn`, whose channels come before tokens; differentiable.

    Args:
        x: (B, D, L) float32, float64, bfloat16 or float16, with any strides.
        weight: (D, K) float, 1 <= K <= 8.
        bias: (D,) float.
        seq_idx: (B, L) int32 or int64. Where it changes, taps read 0; where it is below 0, the output is 0.
        initial_states: (B, D, K-1) dtype of x. The inputs before the first token.
        return_final_states: also return the last K-1 inputs, those of another sequence 0.
        final_states_out: (B, D, K-1) dtype of x. Where to write them; with return_final_states only.
        activation: None, "silu" or "swish", which are the same.

    Returns:
        y (B, D, L), dtype of x; with return_final_states also (B, D, K-1).

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a dtype does.
    """
    op = "causal_conv1d_fn"
    d = Dims(op)
    d("x", x, "B D L", FLOATS)
    silu = _filter(d, weight, bias, activation)
    d.optional("seq_idx", seq_idx, "B L", INTEGERS)
    d.optional("initial_states", initial_states, "B D K-1", x.dtype)
    d.optional("final_states_out", final_states_out, "B D K-1", x.dtype)
    d.same_device(
        x, weight=weight, bias=bias, seq_idx=seq_idx, initial_states=initial_states, final_states_out=final_states_out
    )
    if final_states_out is not None and not return_final_states:
        raise ValueError(f"{op}: final_states_out must be None without return_final_states, got a tensor")
    y, last = causal_conv1d(
        x.transpose(1, 2), weight, bias, activation=silu, seq_idx=None if seq_idx is None else numbered(seq_idx),
        initial_state=None if initial_states is None else initial_states.transpose(1, 2), return_final_state=True,
    )  # fmt: skip
    y, last = y.transpose(1, 2), last.transpose(1, 2)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[:, None], 0)
    if not return_final_states:
        return y
    return y, last if final_states_out is None else final_states_out.copy_(last)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A few tokens of the convolution, as `causal_conv1d.causal_conv1d_update`; `conv_state` is updated in place.

    Args:
        x: (B, D) or (B, D, L) float32, float64, bfloat16 or float16.
        conv_state: (S, D, n) dtype of x, n >= K-1. The last n inputs, oldest first. S is B, or more with
            conv_state_indices.
        weight: (D, K) float, 1 <= K <= 8.
        bias: (D,) float.
        activation: None, "silu" or "swish", which are the same.
        cache_seqlens: (B,) int32 or int64. How many tokens came before. If given, conv_state is a circular buffer, in
            which token t has the place t % n.
        conv_state_indices: (B,) int32 or int64. The row of conv_state that a row of x updates. Below 0: none, and the
            output is 0. No row twice.

    Returns:
        y: as x.

    Raises:
        ValueError: a shape or device breaks the table above. TypeError: a dtype does.
        RuntimeError: an input requires grad while grad is enabled.
    """
    op = "causal_conv1d_update"
    d = Dims(op)
    single = isinstance(x, Tensor) and x.dim() == 2
    tokens = x[..., None] if single else x
    d("x", tokens, "B D L", FLOATS)
    silu = _filter(d, weight, bias, activation)
    d("conv_state", conv_state, "S D n", x.dtype)
    d.optional("cache_seqlens", cache_seqlens, "B", INTEGERS)
    d.optional("conv_state_indices", conv_state_indices, "B", INTEGERS)
    if d["n"] < d["K-1"]:
        raise ValueError(f"{op}: conv_state must hold n >= {d['K-1']} inputs, got {d['n']}")
    if conv_state_indices is None and d["S"] != d["B"]:
        raise ValueError(f"{op}: conv_state must have B={d['B']} rows without conv_state_indices, got {d['S']}")
    d.same_device(
        x, conv_state=conv_state, weight=weight, bias=bias, cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
    )  # fmt: skip
    _no_gradient(op, x, conv_state, weight, bias)
    if conv_state_indices is None:
        y = _convolve(tokens, conv_state, weight, bias, silu, cache_seqlens)
    else:
        rows = conv_state_indices >= 0
        slots = conv_state_indices[rows].long()
        mine, seen = conv_state[slots], None if cache_seqlens is None else cache_seqlens[rows]
        y = torch.zeros_like(tokens)
        y[rows] = _convolve(tokens[rows], mine, weight, bias, silu, seen)
        conv_state[slots] = mine
    return y[..., 0] if single else y


def _convolve(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: str | None, seen: Tensor | None
) -> Tensor:
    """(B, D, L) after the inputs of `state` (B, D, n), which is updated in place."""
    size, length, before = state.shape[2], x.shape[2], weight.shape[1] - 1
    if seen is None:
        last = state[..., size - before :]
    else:
        last = state.gather(2, _places(seen, -before, 0, state))
    y = causal_conv1d(x.transpose(1, 2), weight, bias, activation=silu, initial_state=last.transpose(1, 2))
    assert isinstance(y, Tensor)
    if seen is None:
        state.copy_(torch.cat([state, x], -1)[..., length:])
    else:
        kept = min(length, size)
        state.scatter_(2, _places(seen, length - kept, length, state), x[..., length - kept :])
    return y.transpose(1, 2)


def _places(seen: Tensor, start: int, end: int, state: Tensor) -> Tensor:
    """(B, D, end - start): where tokens `start` to `end` after the first `seen` (B,) are in a circular buffer."""
    at = torch.arange(start, end, device=state.device) + seen.long()[:, None]
    return (at % max(state.shape[2], 1))[:, None].expand(-1, state.shape[1], -1)


def _filter(d: Dims, weight: Tensor, bias: Tensor | None, activation: str | None) -> str | None:
    """Check the filter, and name the activation as our op does."""
    silu = check_filter(d, weight, bias, "silu" if activation == "swish" else activation)
    d.sizes["K-1"] = d["K"] - 1
    return "silu" if silu else None


def _no_gradient(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: has no gradient; run it under torch.no_grad()")
