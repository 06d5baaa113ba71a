"""Triton kernel of `gated_delta_step`: one pass over the state, one program per (batch, head, slice of V)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gated_delta_step_kernel(
    state_ptr, y_ptr, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, scale, H, Gq, Gk, Gv, K, V, NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    offs_k, offs_v = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < K, offs_v < V
    q = tl.load(q_ptr + (b * Gq + h // (H // Gq)) * K + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + (b * Gk + h // (H // Gk)) * K + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + (b * Gv + h // (H // Gv)) * V + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    if NORMALIZE:
        q = q / tl.sqrt(tl.sum(q * q, axis=0) + 1e-6)
        k = k / tl.sqrt(tl.sum(k * k, axis=0) + 1e-6)
    at = state_ptr + (bh * K + offs_k)[:, None] * V + offs_v[None, :]
    inside = mask_k[:, None] & mask_v[None, :]
    state = tl.load(at, mask=inside, other=0.0) * tl.exp(tl.load(g_ptr + bh))
    error = v - tl.sum(k[:, None] * state, axis=0)
    state += k[:, None] * (tl.load(beta_ptr + bh) * error)[None, :]
    tl.store(at, state, mask=inside)
    y = tl.sum(q[:, None] * state, axis=0) * scale
    tl.store(y_ptr + bh * V + offs_v, y.to(y_ptr.dtype.element_ty), mask=mask_v)


def gated_delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float,
    use_qk_l2norm_in_kernel: bool,
) -> Tensor:  # fmt: skip
    """Arguments and result of the dispatcher op `linmu::gated_delta_step`."""
    batch, H, K, V = state.shape
    y = q.new_zeros(batch, H, V)
    if state.numel():
        block_k = triton.next_power_of_2(K)
        block_v = max(1, min(triton.next_power_of_2(V), 4096 // block_k))
        _gated_delta_step_kernel[(batch * H, triton.cdiv(V, block_v))](
            state, y, q, k, v, g, beta, scale, H, q.shape[1], k.shape[1], v.shape[1], K, V,
            NORMALIZE=use_qk_l2norm_in_kernel, BLOCK_K=block_k, BLOCK_V=block_v,
        )  # fmt: skip
    return y
