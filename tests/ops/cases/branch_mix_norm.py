"""Inputs of `branch_mix_norm` of every kind, and what its reference gives."""

from __future__ import annotations

import torch

import linmu_ops
from linmu_ops._testing import assert_within_twice, check_against_reference

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


def check_gradient_of_a_scalar_mix(case, dtype, norm):
    # Ten draws in one comparison: of a single number, PyTorch's own error may be 0 by luck.
    draws = [make_inputs(case, dtype, norm) for _ in range(10)]

    def gradients(op, cast):
        found = []
        for draw in draws:
            values = {k: v.to(cast(v.dtype)) if isinstance(v, torch.Tensor) else v for k, v in draw.items()}
            mix = values["mix"].requires_grad_()
            found.append(torch.autograd.grad(op(**values | dict(mix=mix), eps=1e-3).sum(), mix)[0])
        return torch.cat(found)

    exact = gradients(by_reference, lambda t: torch.float64 if t.is_floating_point else t)
    same = [gradients(op, lambda t: t) for op in (linmu_ops.branch_mix_norm, by_reference)]
    assert_within_twice(same[0], exact, same[1], "gradient of mix")


def check_gradient_of_a_mix_far_apart(op, mix, norm="layer", draws=20, device="cpu"):
    """Rows of a that lie 40 above those of b: what they have in common has no part in the gradient of a layer's mix."""
    for seed in range(draws):
        torch.manual_seed(seed)
        inputs = make_inputs((1, 2, 3 + seed % 5), torch.float32, norm, mix, masked=False)
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        check_against_reference(op, by_reference, inputs | dict(a=inputs["a"] + 40), ["a", "b", "mix"])
