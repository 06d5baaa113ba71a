"""Triton kernels of `causal_conv1d`: one program per (batch row, block of visits, block of channels)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._visits import checked_order, segment_ids, token_rows

BLOCK_T, BLOCK_D = 32, 64


@triton.jit
def _before(
    x_ptr, initial_ptr, order_ptr, seq_ptr, seg, b, t, valid, offs_d, mask_d, j, length, D, K,
    HAS_ORDER: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """x at visit t - j, (T, D) float32: from the initial state before the first visit, 0 across a restart; and where
    there is one, (T)."""
    s = t - j
    there = valid & (s >= 0)
    same = valid
    if HAS_SEQ:
        other = tl.load(seq_ptr + b.to(tl.int64) * length + s, mask=there, other=0)
        same = valid & (other == seg)
        there = there & same
    rows = token_rows(order_ptr, b, s, there, length, HAS_ORDER)
    x = tl.load(x_ptr + rows[:, None] * D + offs_d[None, :], mask=there[:, None] & mask_d[None, :], other=0.0)
    x = x.to(tl.float32)
    if HAS_INITIAL:
        early = same & (s < 0)
        at = initial_ptr + (b.to(tl.int64) * (K - 1) + (K - 1 + s))[:, None] * D + offs_d[None, :]
        x += tl.load(at, mask=early[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        there = there | early
    return x, there


@triton.jit(do_not_specialize=["length", "blocks"])
def _conv_kernel(
    out_ptr, partial_ptr, grad_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, order_ptr, seq_ptr, length, D, blocks,
    BACKWARD: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_SEQ: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Forward: y at token positions. Backward: the gradient before the activation, (B, L, D) float32 in visiting order,
    and what this block adds to each filter tap and to the bias, (blocks, K + 1, D)."""
    i, b = tl.program_id(0), tl.program_id(1)
    t = i * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid, mask_d = t < length, offs_d < D
    seg = tl.zeros_like(t)
    if HAS_SEQ:
        seg = tl.load(seq_ptr + b.to(tl.int64) * length + t, mask=valid, other=0)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
    for j in tl.static_range(K - 1, -1, -1):
        x, _ = _before(x_ptr, initial_ptr, order_ptr, seq_ptr, seg, b, t, valid, offs_d, mask_d, j, length, D, K,
                       HAS_ORDER, HAS_SEQ, HAS_INITIAL)  # fmt: skip
        total += tl.load(weight_ptr + offs_d * K + (K - 1 - j), mask=mask_d, other=0.0)[None, :] * x
    sigmoid = 1.0 / (1.0 + tl.exp(-total))
    rows = token_rows(order_ptr, b, t, valid, length, HAS_ORDER)
    inside = valid[:, None] & mask_d[None, :]
    if not BACKWARD:
        y = total * sigmoid if SILU else total
        tl.store(out_ptr + rows[:, None] * D + offs_d[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        grad = tl.load(grad_ptr + rows[:, None] * D + offs_d[None, :], mask=inside, other=0.0).to(tl.float32)
        if SILU:
            grad *= sigmoid * (1.0 + total * (1.0 - sigmoid))
        at = (b.to(tl.int64) * length + t)[:, None] * D + offs_d[None, :]
        tl.store(out_ptr + at, grad, mask=inside)
        base = partial_ptr + (b.to(tl.int64) * blocks + i) * (K + 1) * D + offs_d
        for j in tl.static_range(K):
            x, there = _before(x_ptr, initial_ptr, order_ptr, seq_ptr, seg, b, t, valid, offs_d, mask_d, j, length, D,
                               K, HAS_ORDER, HAS_SEQ, HAS_INITIAL)  # fmt: skip
            product = tl.where(there[:, None], grad * x, 0.0)  # a tap that is cut gets no gradient, even of a NaN
            tl.store(base + (K - 1 - j) * D, tl.sum(product, axis=0), mask=mask_d)
        tl.store(base + K * D, tl.sum(grad, axis=0), mask=mask_d)


@triton.jit(do_not_specialize=["length"])
def _input_grad_kernel(
    dx_ptr, dinitial_ptr, dpre_ptr, weight_ptr, order_ptr, seq_ptr, length, D, HAS_INITIAL: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_SEQ: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx at token positions for visits >= 0; visits -(K-1)..-1 are the initial state."""
    b = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T) - (K - 1)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d, valid = offs_d < D, t < length
    base = b.to(tl.int64) * length
    seg = tl.zeros_like(t)
    if HAS_SEQ:
        seg = tl.load(seq_ptr + base + t, mask=valid & (t >= 0), other=0)
    dx = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for j in tl.static_range(K):
        there = (t + j >= 0) & (t + j < length)
        if HAS_SEQ:
            there = there & (tl.load(seq_ptr + base + t + j, mask=there, other=-1) == seg)
        at = (base + t + j)[:, None] * D + offs_d[None, :]
        grad = tl.load(dpre_ptr + at, mask=there[:, None] & mask_d[None, :], other=0.0)
        dx += tl.load(weight_ptr + offs_d * K + (K - 1 - j), mask=mask_d, other=0.0)[None, :] * grad
    now = valid & (t >= 0)
    rows = token_rows(order_ptr, b, t, now, length, HAS_ORDER)
    at = rows[:, None] * D + offs_d[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=now[:, None] & mask_d[None, :])
    if HAS_INITIAL:
        at = (b.to(tl.int64) * (K - 1) + K - 1 + t)[:, None] * D + offs_d[None, :]
        tl.store(dinitial_ptr + at, dx.to(dinitial_ptr.dtype.element_ty), mask=(t < 0)[:, None] & mask_d[None, :])


def _last_visits(x: Tensor, order: Tensor | None, seg: Tensor | None, before: int) -> tuple[Tensor, Tensor]:
    """Positions of the last `before` visits (negative: in the initial state), and which share the last segment."""
    B, L, _ = x.shape
    t = torch.arange(L - before, L, device=x.device).expand(B, before)
    position = t if order is None or L == 0 else torch.where(t >= 0, order.gather(1, t.clamp(min=0)), t)
    if seg is None or L == 0:
        return position, torch.ones_like(t, dtype=torch.bool)
    own = torch.where(t >= 0, seg.gather(1, t.clamp(min=0)), 0)
    return position, own == seg[:, -1:]


class _Call:
    """Contiguous inputs and flags of one call."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, seq_idx: Tensor | None,
        token_order: Tensor | None, initial_state: Tensor | None,
    ) -> None:  # fmt: skip
        if x.dtype == torch.float64:
            raise NotImplementedError(
                "causal_conv1d: the Triton kernels take float32, bfloat16 or float16, got float64"
            )
        self.order = checked_order("causal_conv1d", token_order)
        self.token_order = None if token_order is None else token_order.contiguous()
        self.seg = segment_ids(seq_idx, self.order)
        self.x, self.weight, self.bias = x.contiguous(), weight.contiguous(), bias
        self.initial = None if initial_state is None else initial_state.contiguous()
        self.blocks = triton.cdiv(x.shape[1], BLOCK_T)
        self.flags: dict[str, Any] = dict(
            HAS_INITIAL=initial_state is not None, HAS_ORDER=token_order is not None, HAS_SEQ=seq_idx is not None,
            K=weight.shape[1], BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        )  # fmt: skip
        self.silu = silu

    def launch(self, out: Tensor, partial: Tensor | None, grad: Tensor | None) -> None:
        B, L, D = self.x.shape
        _conv_kernel[(self.blocks, B, triton.cdiv(D, BLOCK_D))](
            out, partial, grad, self.x, self.weight, self.bias, self.initial, self.token_order, self.seg, L, D,
            self.blocks, BACKWARD=grad is not None, SILU=self.silu, HAS_BIAS=self.bias is not None, **self.flags,
        )  # fmt: skip


def causal_conv1d(*args: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results of the dispatcher op `linmu::causal_conv1d`."""
    *inputs, return_final_state = args
    call = _Call(*inputs)
    x, before = call.x, call.weight.shape[1] - 1
    y = torch.empty_like(x)
    if y.numel():
        call.launch(y, None, None)
    if not return_final_state:
        return y, x.new_empty(0)
    past = x.new_zeros(x.shape[0], before, x.shape[2]) if call.initial is None else call.initial
    position, same = _last_visits(x, call.order, call.seg, before)
    line = torch.cat([past, x], dim=1)
    last = line.gather(1, (position + before)[..., None].expand(-1, -1, x.shape[2]))
    return y, torch.where(same[..., None], last, 0.0).to(x.dtype)


def causal_conv1d_bwd(grad_y: Tensor, grad_final_state: Tensor | None, *inputs: Any) -> list[Tensor]:
    """Arguments and results of the dispatcher op `linmu::causal_conv1d_bwd`."""
    call = _Call(*inputs)
    x, K = call.x, call.weight.shape[1]
    B, L, D = x.shape
    dx = torch.zeros_like(x)
    dinitial = x.new_empty(0) if call.initial is None else torch.zeros_like(call.initial)
    partial = torch.zeros(B, call.blocks, K + 1, D, dtype=torch.float32, device=x.device)
    if x.numel():
        dpre = torch.empty(B, L, D, dtype=torch.float32, device=x.device)
        call.launch(dpre, partial, grad_y.contiguous())
        _input_grad_kernel[(triton.cdiv(L + K - 1, BLOCK_T), B, triton.cdiv(D, BLOCK_D))](
            dx, dinitial, dpre, call.weight, call.token_order, call.seg, L, D, **call.flags
        )
    if grad_final_state is not None and K > 1:
        position, same = _last_visits(x, call.order, call.seg, K - 1)
        grad = torch.where(same[..., None], grad_final_state, 0.0).to(x.dtype)
        # Each position occurs once, so a scatter of sums is a scatter of single values: deterministic.
        line = torch.zeros(B, K - 1 + L, D, dtype=x.dtype, device=x.device)
        line.scatter_(1, (position + K - 1)[..., None].expand(-1, -1, D), grad)
        dx = dx + line[:, K - 1 :]
        dinitial = dinitial if call.initial is None else dinitial + line[:, : K - 1]
    sums = partial.sum((0, 1))  # (K + 1, D)
    dbias = x.new_empty(0) if call.bias is None else sums[K].clone()
    return [dx, sums[:K].t().contiguous(), dbias, dinitial]
