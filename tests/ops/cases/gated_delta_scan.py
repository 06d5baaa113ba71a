"""Inputs of `gated_delta_scan` to test with, and what its reference makes of them."""

from __future__ import annotations

import functools

import torch

import linmu_ops
from linmu_ops._directions import DIRECTIONS
from linmu_ops._testing import run_op
from linmu_ops.gated_delta_scan import DIFFERENTIABLE

__all__ = ["CASES", "DIRECTIONS", "DTYPES", "OPTIONS", "SMALL", "by_reference", "make_inputs", "scan", "used"]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [  # B, L, H, Gq, Gk, Gv, K, V; chunks are of 32 visits
    (1, 1, 4, 1, 1, 4, 3, 5),
    (2, 31, 4, 4, 4, 1, 5, 7),
    (1, 32, 4, 2, 2, 4, 16, 3),
    (1, 33, 6, 6, 3, 2, 17, 33),
    (1, 70, 2, 2, 2, 2, 64, 48),
    (1, 37, 16, 2, 2, 16, 8, 70),
]
SMALL = (2, 20, 8, 8, 2, 2, 6, 5)
OPTIONS = (
    "scale", "use_qk_l2norm_in_kernel", "seq_idx", "token_order", "initial_state", "return_final_state", "chunk_size",
    "reverse_q", "reverse_k", "reverse_g", "reverse_beta", "reverse_mask", "reverse_seq_idx", "gate", "head_gate",
)  # fmt: skip
scan = functools.partial(run_op, "gated_delta_scan")


def make_inputs(case, dtype=torch.float32, direction="both", options=(), seed=0):
    """`options` names the optional arguments to give; "all" gives every one that the direction takes."""
    g = torch.Generator().manual_seed(seed)
    B, L, H, Gq, Gk, Gv, K, V = case

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).float()

    def uniform(*shape):
        return torch.rand(*shape, generator=g)

    def segments():
        return (uniform(B, L) < 0.08).cumsum(1).int()

    def key():
        k = normal(B, L, Gk, K)
        return (k / k.norm(dim=-1, keepdim=True)).to(dtype)

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    i = dict(
        q=normal(B, L, Gq, K).to(dtype), k=key(), v=normal(B, L, Gv, V).to(dtype), g=-uniform(B, L, H),
        beta=uniform(B, L, H),
    )  # fmt: skip
    more = dict(
        scale=0.7, use_qk_l2norm_in_kernel=True, seq_idx=segments(),
        token_order=torch.stack([torch.randperm(L, generator=g) for _ in range(B)]).int() if B else segments(),
        initial_state=normal(B, H, K, V), return_final_state=True, chunk_size=16,
    )  # fmt: skip
    if direction != "forward":
        more |= dict(
            reverse_q=normal(B, L, Gq, K).to(dtype), reverse_k=key(), reverse_g=-uniform(B, L, H),
            reverse_beta=uniform(B, L, H), reverse_mask=uniform(B, L) < 0.7, reverse_seq_idx=segments(),
        )  # fmt: skip
    if direction == "both":
        more |= dict(gate=uniform(B, L, H), head_gate=uniform(H))
    i |= {k: v for k, v in more.items() if k in options or ("all" in options and k not in ("head_gate", "chunk_size"))}
    if "head_gate" in i:
        i["gate"] = i.pop("head_gate")
    for k in ("g", "beta", "reverse_g", "reverse_beta", "gate", "initial_state"):
        if k in i:
            i[k] = i[k].to(acc)
    return i | dict(direction=direction)


def by_reference(**inputs):
    with linmu_ops.use_impl("gated_delta_scan:reference"):
        return scan(**inputs)


def used(i):
    """The differentiable inputs the output depends on."""
    given = [k for k in DIFFERENTIABLE if k in i]
    return [k for k in given if not (i["direction"] == "reverse" and f"reverse_{k}" in i)]
