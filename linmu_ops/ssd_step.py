"""One token of `ssd_scan`, in place on the state: what decoding runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _registry
from ._dims import FLOATS, Dims, accumulate_dtype
from .reference.ssd_step import ssd_step as reference

SCHEMA = (
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "bool dt_softplus) -> Tensor"
)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step of the forward scan; `state` is updated in place.

        state = exp(dt A) state + dt x (outer) B,    y = state C + D x

    Args:
        state: (B, H, P, N) float32 (float64 for float64 x), contiguous. Updated in place.
        x: (B, Gx, P) float32, float64, bfloat16 or float16. Value of this token.
        dt: (B, H) float. Step size.
        A: (H,) float, <= 0. Decay rate.
        B: (B, Gb, N) dtype of x.
        C: (B, Gc, N) dtype of x.
        D: (H,) float. Skip connection.
        dt_bias: (H,) float. Added to dt before softplus.
        dt_softplus: apply softplus to dt (+ bias).

    Returns:
        y: (B, H, P), dtype of x.

    Raises:
        ValueError: a shape or device breaks the table above. TypeError: a dtype does.
        RuntimeError: an input requires grad while grad is enabled; use `ssd_scan` with L = 1.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 3. Reference: linmu_ops/reference/ssd_step.py.
    """
    d = Dims("ssd_step")
    d("x", x, "B Gx P", FLOATS)
    acc = accumulate_dtype(x.dtype)
    d("dt", dt, "B H", FLOATS)
    d("state", state, "B H P N", acc)
    d("A", A, "H", FLOATS)
    d("B", B, "B Gb N", x.dtype)
    d("C", C, "B Gc N", x.dtype)
    d.optional("D", D, "H", FLOATS)
    d.optional("dt_bias", dt_bias, "H", FLOATS)
    for name, part in (("x", "Gx"), ("B", "Gb"), ("C", "Gc")):
        d.divides(name, part, "H")
    d.same_device(x, state=state, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    if not state.is_contiguous():
        raise ValueError(f"ssd_step: state must be contiguous, got strides {state.stride()}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, x, dt, A, B, C, D, dt_bias)):
        raise RuntimeError("ssd_step: has no gradient; run it under torch.no_grad(), or use ssd_scan with L = 1")
    small = [None if t is None else t.to(acc) for t in (dt, A, D, dt_bias)]
    _registry.mark_written(state)
    return _registry.call("ssd_step", x, state, x, small[0], small[1], B, C, small[2], small[3], dt_softplus)


def _fake(state: Tensor, x: Tensor, dt: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], dt.shape[1], x.shape[2])


_registry.define_op("ssd_step", SCHEMA, reference=reference, fake=_fake)
