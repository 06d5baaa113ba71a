"""What is far from each token of `ExactMMATE`, mixed into what is near: what a prompt runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_number
from .reference.far_attention import far_attention as reference

SCHEMA = (
    "(Tensor(a!) y, Tensor lse, Tensor rest, Tensor q, Tensor k, Tensor v, Tensor steps, Tensor entered, Tensor when, "
    "Tensor b_map, Tensor c_map, Tensor scale, Tensor rates, Tensor? z_gate, Tensor? initial_state, Tensor? last, "
    "float softmax_scale) -> Tensor"
)


def far_attention(
    y: Tensor,
    lse: Tensor,
    rest: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: Tensor,
    entered: Tensor,
    when: Tensor,
    b_map: Tensor,
    c_map: Tensor,
    scale: Tensor,
    rates: Tensor,
    *,
    z_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    last: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor | None:
    """Gives each token its share of what is far from it. y, what it gets from what is near, is updated in place.

        y = (1 - share) y + share y_far,    share = sigmoid(rest + log total - lse)

    Tokens enter a decaying state at steps 0, 1, ...; those of one step in order. A token reads what is there after so
    many steps. One that enters at t writes, and one that reads gets, by feature maps f and g:

        h = exp(-rates steps[t]) h + steps[t] v[t] (outer) f(k[t]);    y_far = silu(z_gate) h g(q) / total
        f(k) = softmax(b_map k),    g(q) = softmax(scale softmax_scale c_map q)

    total is what h g(q) is for values of 1. Where it is below 2**-100, y_far is 0 and its log is -100.

    Args:
        y: (B, L, H, P) dtype of q, contiguous. Updated in place.
        lse: (B, L, H) float. Log-sum-exp of the scores that y is of.
        rest: (B, L, H) float. How what is far compares.
        q: (B, L, H, P) float32, float64, bfloat16 or float16. Queries, rotated.
        k: (B, T, G, P) dtype of q. Rotated keys; G divides H, and query head h reads head h // (H / G).
        v: (B, T, G, P) dtype of q. Values.
        steps: (B, T, G, H/G) float, >= 0. How strongly a token is written.
        entered: (B, G, T) int32, from -1 to T. The step at which a token enters; -1: it never does.
        when: (B, L) int32, from -1 to T. After how many steps a token reads; -1: its y stays as it is.
        b_map: (G, P, N) float. Map of the keys to features.
        c_map: (H, P, N) float. Map of the queries to features.
        scale: (H,) float.
        rates: (H,) float, >= 0. How fast heads forget.
        z_gate: (B, L, HP) dtype of q. Gate of y_far, before silu.
        initial_state: (B, H, P+1, N) float32 (float64 for float64 q). State before the steps; its last row is of the
            weights.
        last: (B,) int32, from 0 to T. After how many steps the state is returned.
        softmax_scale: of the scores; P ** -0.5 if None.

    Returns:
        The state (B, H, P+1, N), float32 (or float64), after `last` steps; None without `last`.

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a dtype does. RuntimeError: an input
        requires grad while grad is enabled; `ExactMMATE` has gradients.

    Notes:
        Accumulates in float32 (float64 for float64). Deterministic. What never enters, and what enters later, does not
        reach a token, finite or not.

    Reference: linmu_ops/reference/far_attention.py.
    """
    d = Dims("far_attention")
    d("q", q, "B L H P", FLOATS)
    acc = accumulate_dtype(q.dtype)
    d("k", k, "B T G P", q.dtype)
    d.divides("k", "G", "H")
    d("v", v, "B T G P", q.dtype)
    d("y", y, "B L H P", q.dtype)
    d.sizes |= {"H/G": d["H"] // d["G"], "HP": d["H"] * d["P"], "P+1": d["P"] + 1}
    d("lse", lse, "B L H", FLOATS)
    d("rest", rest, "B L H", FLOATS)
    d("steps", steps, "B T G H/G", FLOATS)
    d("entered", entered, "B G T", torch.int32)
    d("when", when, "B L", torch.int32)
    d("b_map", b_map, "G P N", FLOATS)
    d("c_map", c_map, "H P N", FLOATS)
    d("scale", scale, "H", FLOATS)
    d("rates", rates, "H", FLOATS)
    d.optional("z_gate", z_gate, "B L HP", q.dtype)
    d.optional("initial_state", initial_state, "B H P+1 N", acc)
    d.optional("last", last, "B", torch.int32)
    given = dict(
        y=y, lse=lse, rest=rest, k=k, v=v, steps=steps, entered=entered, when=when, b_map=b_map, c_map=c_map,
        scale=scale, rates=rates, z_gate=z_gate, initial_state=initial_state, last=last,
    )  # fmt: skip
    d.same_device(q, **given)
    if not y.is_contiguous():
        raise ValueError(f"far_attention: y must be contiguous, got strides {y.stride()}")
    _registry.check_apart("far_attention", "y", q=q, **given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, *given.values())):
        raise RuntimeError("far_attention: has no gradient; run it under torch.no_grad(), or use ExactMMATE")
    factor = q.shape[3] ** -0.5
    if softmax_scale is not None:
        factor = check_number("far_attention", "softmax_scale", softmax_scale)
    state = run(
        y, lse, rest, q, k, v, steps, entered, when, b_map, c_map, scale, rates, z_gate, initial_state, last, factor
    )
    return None if last is None else state


def run(
    y: Tensor, lse: Tensor, rest: Tensor, q: Tensor, k: Tensor, v: Tensor, steps: Tensor, entered: Tensor, when: Tensor,
    b_map: Tensor, c_map: Tensor, scale: Tensor, rates: Tensor, *others: Any,
) -> Tensor:  # fmt: skip
    """The op without Python's checks, in the order of its schema: of a block, whose shapes are right."""
    acc = accumulate_dtype(q.dtype)
    _registry.mark_written(y)
    lse, rest, steps, b_map, c_map, scale, rates = (t.to(acc) for t in (lse, rest, steps, b_map, c_map, scale, rates))
    return _registry.call(
        "far_attention", q, y, lse, rest, q, k, v, steps, entered, when, b_map, c_map, scale, rates, *others
    )


def _fake(*args: Any) -> Tensor:
    q, c_map, last = args[3], args[10], args[15]
    shape = (0,) if last is None else (q.shape[0], q.shape[2], q.shape[3] + 1, c_map.shape[2])
    return q.new_empty(shape, dtype=accumulate_dtype(q.dtype))


_registry.define_op("far_attention", SCHEMA, reference=reference, fake=_fake)
