"""Short causal convolution along the tokens, one filter per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _autograd, _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_flags
from .reference.causal_conv1d import causal_conv1d as reference

INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? seq_idx, Tensor? token_order, Tensor? initial_state"
SCHEMA = f"({INPUTS}, bool return_final_state) -> (Tensor, Tensor)"
# Gradients of x, weight, bias, initial_state; an empty tensor where the input was None.
BWD_SCHEMA = f"(Tensor grad_y, Tensor? grad_final_state, {INPUTS}) -> Tensor[]"
DIFFERENTIABLE = (0, 1, 2, 6)
MAX_WIDTH = 8


def check_filter(d: Dims, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Check what the convolution and its step have in common; True for silu."""
    d("weight", weight, "D K", FLOATS)
    d.optional("bias", bias, "D", FLOATS)
    if not 1 <= d["K"] <= MAX_WIDTH:
        raise ValueError(f"{d.op}: weight must have 1 <= K <= {MAX_WIDTH}, got K={d['K']}")
    if activation not in (None, "silu"):
        raise ValueError(f"{d.op}: activation must be None or 'silu', got {activation!r}")
    return activation == "silu"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    token_order: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over tokens visited in any order, with an optional SiLU.

        y[t, d] = act(bias[d] + sum_{j < K} weight[d, K-1-j] x[t-j, d])

    t counts visits: `token_order[b, t]` is the position visited at t. x, y and seq_idx are in token positions. A tap
    that would reach into another segment reads 0; so does one before the first visit, unless there is an initial state.

    Args:
        x: (B, L, D) float32, float64, bfloat16 or float16.
        weight: (D, K) float, 1 <= K <= 8. The last column multiplies the current token.
        bias: (D,) float.
        activation: None or "silu".
        seq_idx: (B, L) int32. A new segment starts at a visit whose index differs from the visit before.
        token_order: (B, L) int32. A permutation per row; the position visited at t. In place if None.
        initial_state: (B, K-1, D) dtype of x. The K-1 inputs before the first visit, oldest first.
        return_final_state: also return the K-1 inputs before the next visit, oldest first. Inputs of another segment
            than the last visit's are 0. Given as initial_state, they continue the convolution.

    Returns:
        y: (B, L, D), dtype of x. With return_final_state: (y, state), state (B, K-1, D), dtype of x.

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a dtype does.

    Notes:
        Sums in float32 (float64 for float64). Deterministic, gradients included.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 3.4; argument names of github.com/Dao-AILab/causal-conv1d, whose
    x is (B, D, L). Reference: linmu_ops/reference/causal_conv1d.py.
    """
    d = Dims("causal_conv1d")
    d("x", x, "B L D", FLOATS)
    check_flags("causal_conv1d", return_final_state=return_final_state)
    silu = check_filter(d, weight, bias, activation)
    d.optional("seq_idx", seq_idx, "B L", torch.int32)
    d.optional("token_order", token_order, "B L", torch.int32)
    if initial_state is not None:
        d.sizes["K-1"] = d["K"] - 1
        d("initial_state", initial_state, "B K-1 D", x.dtype)
    d.same_device(
        x, weight=weight, bias=bias, seq_idx=seq_idx, token_order=token_order, initial_state=initial_state
    )  # fmt: skip
    acc = accumulate_dtype(x.dtype)
    y, state = _registry.call(
        "causal_conv1d", x, x, weight.to(acc), None if bias is None else bias.to(acc), silu, seq_idx, token_order,
        initial_state, return_final_state,
    )  # fmt: skip
    return (y, state) if return_final_state else y


def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    state = (x.shape[0], weight.shape[1] - 1, x.shape[2]) if args[-1] else (0,)
    return x.new_empty(x.shape), x.new_empty(state)


def _bwd_reference(grad_y: Tensor, grad_final_state: Tensor | None, *inputs: Any) -> list[Tensor]:
    inputs = (*inputs, grad_final_state is not None)
    return _autograd.gradients(reference, inputs, DIFFERENTIABLE, (grad_y, grad_final_state))


def _bwd_fake(grad_y: Tensor, grad_final_state: Tensor | None, *inputs: Any) -> list[Tensor]:
    return _autograd.fakes(inputs, DIFFERENTIABLE)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.silu, seq_idx, token_order, initial_state, ctx.return_final_state = inputs
    ctx.save_for_backward(x, weight, bias, seq_idx, token_order, initial_state)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, bwd_op: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, seq_idx, token_order, initial_state = ctx.saved_tensors
    dx, dweight, dbias, dinitial = bwd_op(
        torch.zeros_like(x) if grad_y is None else grad_y, grad_state if ctx.return_final_state else None, x, weight,
        bias, ctx.silu, seq_idx, token_order, initial_state,
    )  # fmt: skip
    dbias, dinitial = (None if t is None else g for t, g in ((bias, dbias), (initial_state, dinitial)))
    return dx, dweight, dbias, None, None, None, dinitial, None


_registry.define_op(
    "causal_conv1d",
    SCHEMA,
    reference=reference,
    fake=_fake,
    bwd_schema=BWD_SCHEMA,
    bwd_reference=_bwd_reference,
    bwd_fake=_bwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
