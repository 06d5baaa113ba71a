"""Inputs of `ssd_step` of every kind, and what its reference gives."""

from __future__ import annotations

import torch

import linmu_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [  # B, H, Gx, Gb, Gc, P, N
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 4, 1, 1, 16, 24),
    (3, 6, 2, 2, 6, 5, 37),
    (1, 28, 4, 4, 28, 128, 128),
    (0, 2, 1, 1, 1, 4, 4),
]


def make_inputs(case, dtype, softplus=False, skip=False, mean=False):
    B, H, Gx, Gb, Gc, P, N = case
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = dict(
        state=torch.randn(B, H, P, N, dtype=acc), x=torch.randn(B, Gx, P).to(dtype),
        dt=torch.randn(B, H) if softplus else torch.rand(B, H), A=-torch.rand(H),
        B=torch.randn(B, Gb, N).to(dtype), C=torch.randn(B, Gc, N).to(dtype), dt_softplus=softplus,
    )  # fmt: skip
    if skip:
        inputs |= dict(D=torch.randn(H), dt_bias=torch.randn(H))
    if mean:  # no weight is below 0
        inputs |= {k: inputs[k].abs() for k in ("B", "C", "D") if k in inputs}
        state = torch.cat([inputs["state"], torch.rand(B, H, 1, N, dtype=acc)], 2)
        inputs |= dict(state=state, normalize=True)
    return inputs


def stepped(state, **inputs):
    y = linmu_ops.ssd_step(state, **inputs)
    return (*y, state) if isinstance(y, tuple) else (y, state)


def by_reference(**inputs):
    with linmu_ops.use_impl("ssd_step:reference"):
        return stepped(**inputs)
