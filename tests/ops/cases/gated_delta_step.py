"""Inputs of `gated_delta_step` to test with, and what its reference makes of them."""

from __future__ import annotations

import torch

import linmu_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [  # B, H, Gq, Gk, Gv, K, V
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 4, 1, 1, 24, 16),
    (3, 6, 2, 2, 6, 5, 37),
    (1, 28, 4, 4, 28, 128, 128),
    (1, 4, 4, 4, 4, 7, 200),
    (0, 2, 1, 1, 1, 4, 4),
]


def make_inputs(case, dtype, **options):
    B, H, Gq, Gk, Gv, K, V = case
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    k = torch.nn.functional.normalize(torch.randn(B, Gk, K), dim=-1)
    return dict(
        state=torch.randn(B, H, K, V, dtype=acc), q=torch.randn(B, Gq, K).to(dtype), k=k.to(dtype),
        v=torch.randn(B, Gv, V).to(dtype), g=-torch.rand(B, H), beta=torch.rand(B, H), **options,
    )  # fmt: skip


def stepped(state, **inputs):
    y = linmu_ops.gated_delta_step(state, **inputs)
    return y, state


def by_reference(**inputs):
    with linmu_ops.use_impl("gated_delta_step:reference"):
        return stepped(**inputs)
