"""One token of `causal_conv1d`, in place on the state: what decoding runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _registry
from ._dims import FLOATS, Dims, accumulate_dtype
from .causal_conv1d import check_filter
from .reference.causal_conv1d_step import causal_conv1d_step as reference

SCHEMA = "(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor"


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """One step of the causal convolution; `state` is updated in place.

        y[d] = act(bias[d] + weight[d, K-1] x[d] + sum_{0 < j < K} weight[d, K-1-j] state[n-j, d])

    Args:
        state: (B, n, D) dtype of x, n >= K-1, contiguous, or the transpose of a contiguous (B, D, n). The last n
            inputs, oldest first; x is appended to it, and the oldest is dropped.
        x: (B, D) float32, float64, bfloat16 or float16. Input of this token.
        weight: (D, K) float, 1 <= K <= 8. The last column multiplies x.
        bias: (D,) float.
        activation: None or "silu".

    Returns:
        y: (B, D), dtype of x.

    Raises:
        ValueError: a shape or device breaks the table above. TypeError: a dtype does.
        RuntimeError: an input requires grad while grad is enabled; use `causal_conv1d` with L = 1.

    Source: as `causal_conv1d`. Reference: linmu_ops/reference/causal_conv1d_step.py.
    """
    d = Dims("causal_conv1d_step")
    d("x", x, "B D", FLOATS)
    silu = check_filter(d, weight, bias, activation)
    d("state", state, "B n D", x.dtype)
    if d["n"] < d["K"] - 1:
        raise ValueError(f"causal_conv1d_step: state must hold n >= {d['K'] - 1} inputs, got {d['n']}")
    given = dict(state=state, weight=weight, bias=bias)
    d.same_device(x, **given)
    if not (state.is_contiguous() or state.mT.is_contiguous()):
        raise ValueError(
            f"causal_conv1d_step: state must be contiguous, or the transpose of what is, got strides {state.stride()}"
        )
    _registry.check_apart("causal_conv1d_step", "state", x=x, **given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *given.values())):
        raise RuntimeError(
            "causal_conv1d_step: has no gradient; run it under torch.no_grad(), or use causal_conv1d with L = 1"
        )
    acc = accumulate_dtype(x.dtype)
    bias = None if bias is None else bias.to(acc)
    _registry.mark_written(state)
    return _registry.call("causal_conv1d_step", x, state, x, weight.to(acc), bias, silu)


def _packed_alone(asked: _registry.Asked) -> str | None:
    state, weight = asked["state"], asked["weight"]
    if state is None or weight is None or (state.is_contiguous() and state.shape[1] == weight.shape[1] - 1):
        return None
    return "its kernel takes a contiguous state of K-1 inputs"


def _fake(state: Tensor, x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


_registry.define_op(
    "causal_conv1d_step",
    SCHEMA,
    reference=reference,
    fake=_fake,
    limits={"cuda": _packed_alone, "triton": _packed_alone},
)
