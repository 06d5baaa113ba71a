"""Inputs of `window_attention` of every kind, and what its reference gives."""

from __future__ import annotations

import math

import torch

import linmu_ops
from linmu_ops import TokenLayout, window_attention

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRID = dict(B=2, H=4, G=2, P=16)
CASES = {
    "1d": dict(B=2, H=2, G=2, P=8, grid=(37,), window=(8,)),
    "1d-shift-bias": dict(B=1, H=2, G=1, P=6, grid=(37,), window=(8,), shift=(3,), bias=True),
    "2d-shift-mask-bias": GRID | dict(grid=(7, 12), window=(4, 5), shift=(2, 2), wrap="mask", bias=True),
    "2d-rotary": GRID | dict(grid=(9, 6), window=(4, 4), shift=(1, 3), rotary=16),
    "2d-partial-rotary": GRID | dict(grid=(9, 6), window=(4, 4), rotary=6, shared=True),
    "2d-interleaved": GRID | dict(grid=(9, 6), window=(4, 4), rotary=10, interleaved=True, bias=True),
    "3d-shift": GRID | dict(grid=(5, 6, 7), window=(4, 3, 3), shift=(2, 1, 1), rotary=16, bias=True),
    "3d-gqa": dict(B=1, H=14, G=2, P=24, grid=(4, 4, 4), window=(4, 2, 2), shift=(2, 1, 1), rotary=24),
    "odd-head": dict(B=1, H=3, G=3, P=37, grid=(6, 5), window=(4, 4), shift=(2, 2), bias=True),
    "wide-head": dict(B=1, H=2, G=1, P=136, grid=(6, 6), window=(3, 3)),
    "several-query-blocks": dict(B=1, H=2, G=1, P=32, grid=(13, 13), window=(13, 13), bias=True, rotary=32),
    "several-key-blocks": dict(B=1, H=2, G=1, P=8, grid=(700,), window=(650,)),
    "causal": dict(B=2, H=2, G=2, P=8, grid=(37,), window=(8,), shift=(3,), causal=True),
    "causal-joined-bias": GRID | dict(grid=(5, 6, 7), window=(4, 3, 3), shift=(2, 1, 1), bias=True, causal=True),
    "causal-query-blocks": dict(B=1, H=2, G=1, P=16, grid=(9, 15), window=(9, 15), rotary=16, causal=True),
    "causal-key-blocks": dict(B=1, H=2, G=1, P=8, grid=(700,), window=(650,), shift=(300,), causal=True),
    "blocks": GRID | dict(blocks=True, window=(3, 2, 3), shift=(1, 1, 1), rotary=8),
    "blocks-image-window": GRID | dict(blocks=True, window=(2, 2, 2), image_window=(1, 4, 3), image_shift=(0, 2, 1)),
    "blocks-scale": GRID | dict(blocks=True, window=(9, 9, 9), scale=-0.3, bias=True, wrap="mask"),
    "blocks-causal": GRID | dict(blocks=True, window=(3, 2, 3), shift=(1, 1, 1), scale=-0.3, causal=True),
}


def make_layout(B):
    """Blocks of different sizes in every row, one interrupted by text, text before, between and after."""
    blocks, positions = [], []
    for row in range(B):
        for at, sizes in ((2, (3, 3, 4)), (55, (1, 5, 4)), (76, (2, 2, 2) if row else (1, 1, 1))):
            blocks.append((row, *sizes))
            n = math.prod(sizes)
            positions += [at + i + i // (sizes[1] * sizes[2]) for i in range(n)]  # one text token between frames
    return TokenLayout(blocks, positions, B, 90)


def make_inputs(case, dtype, seed=0):
    case = dict(case)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, H, G, P = (case.pop(k) for k in "BHGP")
    layout = make_layout(B) if case.pop("blocks", False) else None
    L = layout.length if layout else math.prod(case["grid"])
    R, rows = case.pop("rotary", 0), 1 if case.pop("shared", False) else B
    inputs = dict(q=randn(B, L, H, P).to(dtype), k=randn(B, L, G, P).to(dtype), v=randn(B, L, G, P).to(dtype))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if case.pop("bias", False):
        inputs["bias"] = randn(H, *(2 * w - 1 for w in case["window"])).to(acc)
    if R:
        angle = 3 * randn(rows, L, R // 2)
        angle = angle.repeat_interleave(2, -1) if case.get("interleaved") else torch.cat((angle, angle), -1)
        inputs |= dict(cos=angle.cos().to(acc), sin=angle.sin().to(acc))
    return inputs | case | (dict(layout=layout) if layout else {})


def by_reference(**inputs):
    with linmu_ops.use_impl("window_attention:reference"):
        return window_attention(**inputs)


def with_lse(attend):
    """Of both results: no mask, which no tolerance knows, and the log-sum-exp of some tokens alone."""

    def call(**inputs):
        out, lse = attend(**inputs, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    return call


LSE_CASES = {
    "one-token": dict(B=1, H=4, G=2, P=16, grid=(5, 6), window=(1, 1), bias=True, causal=True),
    "some-of-one-token": dict(B=1, H=2, G=1, P=8, grid=(9,), window=(4,), bias=True),
    "more-keys-than-the-backward-holds": dict(B=1, H=2, G=1, P=8, grid=(1100,), window=(1090,), bias=True),
    "and-causal": dict(B=1, H=2, G=1, P=8, grid=(1100,), window=(1090,), shift=(400,), causal=True, bias=True),
}
LSE_CASES |= {k: CASES[k] for k in (
    "1d-shift-bias", "2d-interleaved", "3d-gqa", "odd-head", "several-query-blocks", "causal", "causal-joined-bias",
    "causal-query-blocks", "causal-key-blocks", "blocks", "blocks-scale", "blocks-causal",
)}  # fmt: skip
