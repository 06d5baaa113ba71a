"""Inputs of `gated_norm` of every kind, and what its reference gives."""

from __future__ import annotations

import torch

import linmu_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [(1, 1, 8, 1), (2, 3, 5, 1), (2, 67, 11, 3), (2, 21, 64, 2), (3, 11, 130, 1)]  # B, L, size of a group, groups
EMPTY = [(2, 0, 8, 1), (0, 7, 8, 2)]


def make_inputs(case, dtype, norm_before_gate=False):
    B, L, size, groups = case
    x, z = (torch.randn(B, L, size * groups).to(dtype) for _ in range(2))
    return dict(x=x, z=z, weight=torch.randn(size * groups), group_size=size, norm_before_gate=norm_before_gate)


def wrt(inputs):
    return [k for k in ("x", "z", "weight") if k in inputs]


def by_reference(**inputs):
    with linmu_ops.use_impl("gated_norm:reference"):
        return linmu_ops.gated_norm(**inputs)
