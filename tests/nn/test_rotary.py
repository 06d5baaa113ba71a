"""Queries and keys are rotated alike with and without gradients."""

from __future__ import annotations

import pytest
import torch

from linmu_ops.nn._inputs import apply_rotary


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [2, 6, 16])
@pytest.mark.parametrize("rows", [1, 2])
def test_without_gradients_it_is_the_same(rows, size, interleaved, dtype):
    x, cos, sin = torch.randn(2, 9, 3, 16), torch.randn(rows, 9, size), torch.randn(rows, 9, size)
    x = x.to(dtype)
    before = x.clone()
    with torch.no_grad():
        got = apply_rotary(x, (cos, sin), interleaved)
    assert torch.equal(got, apply_rotary(x, (cos, sin), interleaved)) and torch.equal(x, before)
    head = x.double()[..., :size]
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    c, s = ((t[:, :, None, ::2], t[:, :, None, 1::2]) if interleaved else t[:, :, None].chunk(2, dim=-1)
            for t in (cos.to(dtype).double(), sin.to(dtype).double()))  # fmt: skip
    want = a * c[0] - b * s[0], b * c[1] + a * s[1]
    want = torch.stack(want, dim=-1).flatten(-2) if interleaved else torch.cat(want, dim=-1)
    torch.testing.assert_close(got[..., :size].double(), want, rtol=0, atol=20 * torch.finfo(dtype).eps)
    assert torch.equal(got[..., size:], x[..., size:])
