"""Inputs of `branch_mix_norm` of every kind, and what its reference gives."""

from __future__ import annotations

import torch

import linmu_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [(1, 1, 8), (2, 3, 5), (2, 67, 33), (2, 21, 64), (3, 11, 130)]  # B, L, D
EMPTY = [(2, 0, 8), (0, 7, 8)]
NORMS = ["layer", "rms", "none"]
MIXES = ["scalar", "channel", "token"]


def make_inputs(case, dtype, norm="layer", mix="scalar", masked=True):
    B, L, D = case
    shape = {"scalar": (1,), "channel": (D,), "token": (B, L)}[mix]
    inputs = dict(a=torch.randn(case).to(dtype), b=torch.randn(case).to(dtype), mix=torch.rand(shape), norm=norm)
    if masked:
        inputs |= dict(mask=torch.rand(B, L) < 0.6)
    if norm != "none":
        inputs |= dict(weight=torch.randn(D))
    if norm == "layer":
        inputs |= dict(bias=torch.randn(D))
    return inputs


def wrt(inputs):
    return [k for k in ("a", "b", "mix", "weight", "bias") if k in inputs]


def by_reference(**inputs):
    with linmu_ops.use_impl("branch_mix_norm:reference"):
        return linmu_ops.branch_mix_norm(**inputs)
