"""The gated norm after a scan: that of Mamba-2, and that of the gated delta rule."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _autograd, _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_flags, check_number, check_size
from .reference.gated_norm import gated_norm as reference

INPUTS = "Tensor x, Tensor z, Tensor? weight, int group_size, bool norm_before_gate, float eps"
SCHEMA = f"({INPUTS}) -> Tensor"
# Gradients of x, z, weight; an empty tensor where weight was None.
BWD_SCHEMA = f"(Tensor grad_out, {INPUTS}) -> Tensor[]"
DIFFERENTIABLE = (0, 1, 2)


def gated_norm(
    x: Tensor,
    z: Tensor,
    *,
    weight: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Gate by silu(z), and divide by the root mean square of each group of channels.

        out[t] = weight RMS(x[t] silu(z[t]))                 RMS(u) = u / sqrt(mean(u^2) + eps) of each group
        out[t] = weight RMS(x[t]) silu(z[t])                 with norm_before_gate

    Args:
        x: (B, L, D) float32, float64, bfloat16 or float16.
        z: (B, L, D) dtype of x. The gate, before silu.
        weight: (D,) float. Scale; 1 if None.
        group_size: channels that are normalised together; divides D. All D if None.
        norm_before_gate: False as Mamba-2 has it, True as the gated delta rule's layers do.
        eps: added to the mean square, >= 0.

    Returns:
        out: (B, L, D), dtype of x.

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a type or dtype does.

    Notes:
        Computes in float32 (float64 for float64). Deterministic, gradients included.

    Source: Mamba-2, arXiv:2405.21060; Gated DeltaNet, arXiv:2412.06464. Reference: linmu_ops/reference/gated_norm.py.
    """
    d = Dims("gated_norm")
    d("x", x, "B L D", FLOATS)
    d("z", z, "B L D", x.dtype)
    d.optional("weight", weight, "D", FLOATS)
    d.same_device(x, z=z, weight=weight)
    check_flags("gated_norm", norm_before_gate=norm_before_gate)
    if group_size is None:
        group_size = max(1, d["D"])
    check_size("gated_norm", "group_size", group_size)
    if d["D"] % group_size:
        raise ValueError(f"gated_norm: group_size must divide D={d['D']}, got {group_size}")
    if not check_number("gated_norm", "eps", eps) >= 0:
        raise ValueError(f"gated_norm: eps must be >= 0, got {eps}")
    weight = None if weight is None else weight.to(accumulate_dtype(x.dtype))
    return _registry.call("gated_norm", x, x, z, weight, group_size, norm_before_gate, float(eps))


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _bwd_reference(grad_out: Tensor, *inputs: Any) -> list[Tensor]:
    return _autograd.gradients(reference, inputs, DIFFERENTIABLE, (grad_out,))


def _bwd_fake(grad_out: Tensor, *inputs: Any) -> list[Tensor]:
    return _autograd.fakes(inputs, DIFFERENTIABLE)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.group_size, ctx.norm_before_gate, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, bwd_op: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, z, weight = ctx.saved_tensors
    dx, dz, dweight = bwd_op(grad_out, x, z, weight, ctx.group_size, ctx.norm_before_gate, ctx.eps)
    return dx, dz, None if weight is None else dweight, None, None, None


_registry.define_op(
    "gated_norm",
    SCHEMA,
    reference=reference,
    fake=_fake,
    bwd_schema=BWD_SCHEMA,
    bwd_reference=_bwd_reference,
    bwd_fake=_bwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
