"""Weighted sum of two branches and the norm after it, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _autograd, _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_number
from .reference.branch_mix_norm import branch_mix_norm as reference

INPUTS = "Tensor a, Tensor b, Tensor mix, Tensor? mask, Tensor? weight, Tensor? bias, str norm, float eps"  # fmt: skip
SCHEMA = f"({INPUTS}) -> Tensor"
# Gradients of a, b, mix, weight, bias; an empty tensor where the input was None.
BWD_SCHEMA = f"(Tensor grad_out, {INPUTS}) -> Tensor[]"
DIFFERENTIABLE = (0, 1, 2, 4, 5)
NORMS = ("layer", "rms", "none")


def branch_mix_norm(
    a: Tensor,
    b: Tensor,
    mix: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """Mix two branches and normalise over the last axis.

        out[t] = Norm(mix a[t] + (1 - mix) b[t])  where mask[t],    out[t] = Norm(a[t])  elsewhere

    Args:
        a: (B, L, D) float32, float64, bfloat16 or float16.
        b: (B, L, D) dtype of a. Not looked at where the mask is False.
        mix: (1,), (D,) or (B, L) float in (0, 1). Weight of a.
        mask: (B, L) bool. Tokens that have both branches; all if None.
        weight: (D,) float. Scale of the norm; 1 if None. Not with norm="none".
        bias: (D,) float. Offset of the norm; norm="layer" only.
        norm: "layer" (mean and variance), "rms" (root mean square) or "none".
        eps: added to the variance or mean square, >= 0.

    Returns:
        out: (B, L, D), dtype of a.

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a dtype does.

    Notes:
        Computes in float32 (float64 for float64). Deterministic, gradients included.

    Source: LinMU, arXiv:2601.01322 (the sum of its two branches). Reference: linmu_ops/reference/branch_mix_norm.py.
    """
    d = Dims("branch_mix_norm")
    d("a", a, "B L D", FLOATS)
    d("b", b, "B L D", a.dtype)
    # Of their rank alone: a comparison of a batch with another size is one that an export would have to keep.
    allowed = {1: ((1,), (d["D"],)), 2: ((d["B"], d["L"]),)}
    if isinstance(mix, Tensor) and tuple(mix.shape) not in allowed.get(mix.dim(), ()):
        raise ValueError(
            "branch_mix_norm: mix must be (1,), (D,) or (B, L) "
            f"with B={d['B']}, L={d['L']}, D={d['D']}, got shape {tuple(mix.shape)}"
        )
    d("mix", mix, "B L" if isinstance(mix, Tensor) and mix.dim() == 2 else "_", FLOATS)
    d.optional("mask", mask, "B L", torch.bool)
    d.optional("weight", weight, "D", FLOATS)
    d.optional("bias", bias, "D", FLOATS)
    d.same_device(a, b=b, mix=mix, mask=mask, weight=weight, bias=bias)
    if norm not in NORMS:
        raise ValueError(f"branch_mix_norm: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if weight is not None and norm == "none":
        raise ValueError("branch_mix_norm: weight needs norm='layer' or 'rms', got norm='none'")
    if bias is not None and norm != "layer":
        raise ValueError(f"branch_mix_norm: bias needs norm='layer', got norm={norm!r}")
    if not check_number("branch_mix_norm", "eps", eps) >= 0:
        raise ValueError(f"branch_mix_norm: eps must be >= 0, got {eps}")
    acc = accumulate_dtype(a.dtype)
    weight, bias = (None if t is None else t.to(acc) for t in (weight, bias))
    return _registry.call("branch_mix_norm", a, a, b, mix.to(acc), mask, weight, bias, norm, float(eps))


def _fake(a: Tensor, *args: Any) -> Tensor:
    return a.new_empty(a.shape)


def _bwd_reference(grad_out: Tensor, *inputs: Any) -> list[Tensor]:
    return _autograd.gradients(reference, inputs, DIFFERENTIABLE, (grad_out,))


def _bwd_fake(grad_out: Tensor, *inputs: Any) -> list[Tensor]:
    return _autograd.fakes(inputs, DIFFERENTIABLE)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, bwd_op: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    da, db, dmix, dweight, dbias = bwd_op(grad_out, *tensors, ctx.norm, ctx.eps)
    dweight, dbias = (None if t is None else g for t, g in zip(tensors[4:], (dweight, dbias), strict=True))
    return da, db, dmix, None, dweight, dbias, None, None


_registry.define_op(
    "branch_mix_norm",
    SCHEMA,
    reference=reference,
    fake=_fake,
    bwd_schema=BWD_SCHEMA,
    bwd_reference=_bwd_reference,
    bwd_fake=_bwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
