"""Inputs of `causal_conv1d_step` of every kind, and what its reference gives."""

from __future__ import annotations

import torch

import linmu_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [(1, 1, 1), (2, 5, 4), (3, 67, 4), (1, 300, 2), (2, 33, 8), (5, 64, 3), (0, 4, 4), (2, 0, 4)]  # B, D, K


def make_inputs(case, dtype, bias=False, activation=None):
    B, D, K = case
    inputs = dict(
        state=torch.randn(B, K - 1, D).to(dtype), x=torch.randn(B, D).to(dtype), weight=torch.randn(D, K),
        activation=activation,
    )  # fmt: skip
    return inputs | dict(bias=torch.randn(D)) if bias else inputs


def stepped(state, **inputs):
    y = linmu_ops.causal_conv1d_step(state, **inputs)
    return y, state


def by_reference(**inputs):
    with linmu_ops.use_impl("causal_conv1d_step:reference"):
        return stepped(**inputs)
