"""Softmax attention of each token to a range of earlier ones, and to a list of some more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _autograd, _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_number
from .reference.near_attention import near_attention as reference

INPUTS = "Tensor low, Tensor high, Tensor which, Tensor listed, float scale"
SCHEMA = f"(Tensor q, Tensor k, Tensor v, {INPUTS}) -> (Tensor y, Tensor lse)"
BWD_SCHEMA = (
    f"(Tensor grad_y, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor lse, {INPUTS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)


def near_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    which: Tensor,
    listed: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One softmax over what is near a token and what is kept for it.

        y[i] = sum_j softmax_j(scale q[i] . k[j]) v[j],    lse[i] = log sum_j exp(scale q[i] . k[j])
        over j in low[i] .. high[i] - 1, and over the j of listed[which[i]]; none after i itself

    Of the T tokens that have keys, the last L are those that have queries, in order; the others came before. Nothing is
    masked or repeated in memory, and no row of scores is stored. The fewer lists neighbours see, the faster it is.

    Args:
        q: (B, L, H, P) float32, float64, bfloat16 or float16. Queries.
        k: (B, T, G, P) dtype of q, T >= L. Keys; G divides H, and query head h reads head h // (H / G).
        v: (B, T, G, P) dtype of q. Values.
        low: (B, L) int32, from 0 to T. First token of the range.
        high: (B, L) int32, from 0 to T. End of the range, which is empty where this is <= low.
        which: (B, G, L) int32, from -1 to n - 1. The list of a token, for each key/value head; -1: none.
        listed: (n, m) int32, from -1 to T - 1. Lists of tokens of the row that reads them; -1: nothing. What stands
            twice, or in the range too, counts twice.
        scale: factor of q . k; P ** -0.5 if None.

    Returns:
        y: (B, L, H, P), dtype of q. 0 where a token sees nothing.
        lse: (B, L, H) float32 (float64 for float64), -inf where a token sees nothing. It has a gradient.

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a dtype does.

    Notes:
        Accumulates in float32 (float64 for float64). Where the processor multiplies bfloat16, the forward of bfloat16
        takes attention weights rounded to it. Deterministic. What a token does not see does not reach it, finite or
        not.

    Reference: linmu_ops/reference/near_attention.py.
    """
    d = Dims("near_attention")
    d("q", q, "B L H P", FLOATS)
    d("k", k, "B T G P", q.dtype)
    d("v", v, "B T G P", q.dtype)
    d.divides("k", "G", "H")
    d("low", low, "B L", torch.int32)
    d("high", high, "B L", torch.int32)
    d("which", which, "B G L", torch.int32)
    d("listed", listed, "n m", torch.int32)
    if d["T"] < d["L"]:
        raise ValueError(f"near_attention: k must be of T >= L={d['L']} tokens, got {d['T']}")
    d.same_device(q, k=k, v=v, low=low, high=high, which=which, listed=listed)
    factor = d["P"] ** -0.5 if scale is None else check_number("near_attention", "scale", scale)
    y, lse = _registry.call("near_attention", q, q, k, v, low, high, which, listed, factor)
    return y, lse


def _fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _bwd_fake(
    grad_y: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _bwd_reference(
    grad_y: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _autograd.gradients(reference, (q, k, v, *args), (0, 1, 2), (grad_y, grad_lse))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _autograd.keep(ctx, inputs, output[1:])


def _backward(ctx: Any, bwd_op: Any, grad_y: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None and grad_lse is None:
        return (None,) * 8
    (lse,), (q, k, v, *places) = _autograd.kept(ctx)
    if grad_y is None:
        grad_y = torch.zeros_like(q)
    return (*bwd_op(grad_y, grad_lse, q, k, v, lse, *places), *(None,) * 5)


_registry.define_op(
    "near_attention",
    SCHEMA,
    reference=reference,
    fake=_fake,
    bwd_schema=BWD_SCHEMA,
    bwd_reference=_bwd_reference,
    bwd_fake=_bwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
