"""One token of `gated_delta_scan`, in place on the state: what decoding runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_flags
from .gated_delta_scan import default_scale
from .reference.gated_delta_step import gated_delta_step as reference

SCHEMA = (
    "(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, "
    "bool use_qk_l2norm_in_kernel) -> Tensor"
)


def gated_delta_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    """One step of the forward scan; `state` is updated in place.

        state = exp(g) (I - beta k k^T) state + beta k v^T,    y = scale state^T q

    Args:
        state: (B, H, K, V) float32 (float64 for float64 q), contiguous. Updated in place.
        q: (B, Gq, K) float32, float64, bfloat16 or float16. Query of this token.
        k: (B, Gk, K) dtype of q. Key, of length 1 or less.
        v: (B, Gv, V) dtype of q. Value.
        g: (B, H) float, <= 0. Log of the decay.
        beta: (B, H) float in [0, 1]. Learning rate.
        scale: of the query; K ** -0.5 if None.
        use_qk_l2norm_in_kernel: scale q and k to length 1 first, x / sqrt(|x|^2 + 1e-6).

    Returns:
        y: (B, H, V), dtype of q.

    Raises:
        ValueError: a shape or device breaks the table above. TypeError: a dtype does.
        RuntimeError: an input requires grad while grad is enabled; use `gated_delta_scan` with L = 1.

    Source: Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464, equation 10.
    Reference: linmu_ops/reference/gated_delta_step.py.
    """
    d = Dims("gated_delta_step")
    d("q", q, "B Gq K", FLOATS)
    acc = accumulate_dtype(q.dtype)
    d("g", g, "B H", FLOATS)
    d("k", k, "B Gk K", q.dtype)
    d("v", v, "B Gv V", q.dtype)
    d("state", state, "B H K V", acc)
    d("beta", beta, "B H", FLOATS)
    for name, part in (("q", "Gq"), ("k", "Gk"), ("v", "Gv")):
        d.divides(name, part, "H")
    given = dict(state=state, k=k, v=v, g=g, beta=beta)
    d.same_device(q, **given)
    factor = default_scale("gated_delta_step", scale, q)
    check_flags("gated_delta_step", use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
    if not state.is_contiguous():
        raise ValueError(f"gated_delta_step: state must be contiguous, got strides {state.stride()}")
    _registry.check_apart("gated_delta_step", "state", q=q, **given)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, *given.values())):
        raise RuntimeError(
            "gated_delta_step: has no gradient; run it under torch.no_grad(), or use gated_delta_scan with L = 1"
        )
    _registry.mark_written(state)
    return _registry.call(
        "gated_delta_step", q, state, q, k, v, g.to(acc), beta.to(acc), factor, use_qk_l2norm_in_kernel
    )


def _fake(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape[0], g.shape[1], v.shape[2])


_registry.define_op("gated_delta_step", SCHEMA, reference=reference, fake=_fake)
