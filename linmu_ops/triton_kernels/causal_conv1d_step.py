"""Triton kernel of `causal_conv1d_step`: one program per (batch row, block of channels)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _step_kernel(
    state_ptr, y_ptr, x_ptr, weight_ptr, bias_ptr, D, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < D
    x = tl.load(x_ptr + b * D + offs, mask=inside, other=0.0)
    y = tl.load(weight_ptr + offs * K + K - 1, mask=inside, other=0.0) * x.to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs, mask=inside, other=0.0)
    for k in tl.static_range(K - 1):
        at = state_ptr + (b * (K - 1) + k) * D + offs
        past = tl.load(at, mask=inside, other=0.0)
        y += tl.load(weight_ptr + offs * K + k, mask=inside, other=0.0) * past.to(tl.float32)
        if k > 0:
            tl.store(at - D, past, mask=inside)
    if K > 1:
        tl.store(state_ptr + (b * (K - 1) + K - 2) * D + offs, x, mask=inside)
    if SILU:
        y *= 1.0 / (1.0 + tl.exp(-y))
    tl.store(y_ptr + b * D + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


def causal_conv1d_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Arguments and result of the dispatcher op `linmu::causal_conv1d_step`."""
    B, D = x.shape
    y = x.new_empty(B, D)
    if y.numel():
        block = min(1024, triton.next_power_of_2(D))
        _step_kernel[(B, triton.cdiv(D, block))](
            state, y, x, weight, bias, D, SILU=silu, HAS_BIAS=bias is not None,
            K=weight.shape[1], BLOCK=block,
        )  # fmt: skip
    return y
