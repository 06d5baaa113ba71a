"""Inputs of `causal_conv1d` of every kind, and what its reference gives."""

from __future__ import annotations

import torch

import linmu_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [  # B, L, D, K
    (1, 1, 1, 1),
    (2, 3, 5, 4),
    (2, 67, 33, 4),
    (1, 70, 16, 2),
    (3, 11, 40, 8),
    (2, 4, 8, 6),
    (1, 2, 19, 3),
    (1, 300, 70, 4),
]
EMPTY = [(2, 0, 8, 4), (0, 7, 8, 4), (2, 7, 0, 4)]


def make_inputs(case, dtype, full=False, activation=None):
    B, L, D, K = case
    inputs = dict(x=torch.randn(B, L, D).to(dtype), weight=torch.randn(D, K), activation=activation)
    if full:
        order = torch.stack([torch.randperm(L) for _ in range(B)]) if B else torch.zeros(0, L)
        inputs |= dict(
            bias=torch.randn(D),
            token_order=order.int(),
            seq_idx=(torch.arange(L) // 5).int().expand(B, L).gather(1, order.long().argsort(1)),
            initial_state=torch.randn(B, K - 1, D).to(dtype),
            return_final_state=True,
        )
    return inputs


def wrt(inputs):
    return [k for k in ("x", "weight", "bias", "initial_state") if k in inputs]


def by_reference(**inputs):
    with linmu_ops.use_impl("causal_conv1d:reference"):
        return linmu_ops.causal_conv1d(**inputs)
