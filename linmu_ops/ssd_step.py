"""One token of `ssd_scan`, in place on the state: what decoding runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_flags
from .reference._visits import normalized
from .reference.ssd_step import ssd_step as reference
from .ssd_scan import _cuda_note, state_axes, widens

SCHEMA = (
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "bool dt_softplus, bool normalize) -> (Tensor, Tensor)"
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
    normalize: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of the forward scan; `state` is updated in place.

        state = exp(dt A) state + dt x (outer) B,    y = state C + D x

    Args:
        state: (B, H, P, N) float32 (float64 for float64 x), contiguous. Updated in place. With `normalize`
            (B, H, P+1, N): the last row belongs to the mass.
        x: (B, Gx, P) float32, float64, bfloat16 or float16. Value of this token.
        dt: (B, H) float. Step size, >= 0 after bias and softplus (not checked).
        A: (H,) float, <= 0 (not checked). Decay rate.
        B: (B, Gb, N) dtype of x.
        C: (B, Gc, N) dtype of x.
        D: (H,) float. Skip connection.
        dt_bias: (H,) float. Added to dt before softplus.
        dt_softplus: apply softplus to dt (+ bias).
        normalize: as in `ssd_scan`: y becomes a weighted mean of all x so far.

    Returns:
        y: (B, H, P), dtype of x. With normalize: (y, log_mass), log_mass (B, H) float32 (or float64).

    Raises:
        ValueError: a shape or device breaks the table above. TypeError: a dtype does.
        RuntimeError: an input requires grad while grad is enabled; use `ssd_scan` with L = 1.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 3. Reference: linmu_ops/reference/ssd_step.py.
    """
    check_flags("ssd_step", dt_softplus=dt_softplus, normalize=normalize)
    d = Dims("ssd_step")
    d("x", x, "B Gx P", FLOATS)
    acc = accumulate_dtype(x.dtype)
    d("dt", dt, "B H", FLOATS)
    d("state", state, state_axes(d, normalize), acc)
    d("A", A, "H", FLOATS)
    d("B", B, "B Gb N", x.dtype)
    d("C", C, "B Gc N", x.dtype)
    d.optional("D", D, "H", FLOATS)
    d.optional("dt_bias", dt_bias, "H", FLOATS)
    for name, part in (("x", "Gx"), ("B", "Gb"), ("C", "Gc")):
        d.divides(name, part, "H")
    given = dict(state=state, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    d.same_device(x, **given)
    if not state.is_contiguous():
        raise ValueError(f"ssd_step: state must be contiguous, got strides {state.stride()}")
    _registry.check_apart("ssd_step", "state", x=x, **given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *given.values())):
        raise RuntimeError("ssd_step: has no gradient; run it under torch.no_grad(), or use ssd_scan with L = 1")
    small = [None if t is None else t.to(acc) for t in (dt, A, D, dt_bias)]
    _registry.mark_written(state)
    wide = normalize and widens("ssd_step", x)
    rows = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2) if wide else x
    inputs = (state, rows, small[0], small[1], B, C, small[2], small[3], dt_softplus, normalize and not wide)
    y, log_mass = _registry.call("ssd_step", x, *inputs)
    if wide:
        y, mass = normalized(y.to(acc))
        return y.to(x.dtype), mass.log()
    return (y, log_mass) if normalize else y


def _fake(state: Tensor, x: Tensor, dt: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    mass = dt.shape[:2] if args[-1] else (0,)
    return x.new_empty(x.shape[0], dt.shape[1], x.shape[2]), x.new_empty(mass, dtype=accumulate_dtype(x.dtype))


_registry.define_op("ssd_step", SCHEMA, reference=reference, fake=_fake, notes={"cuda": _cuda_note})
