"""The Triton kernels of `window_attention`, interpreted on the CPU, against the reference: forward and gradients."""

from __future__ import annotations

import pytest
import torch

from linmu_ops._testing import check_implementation
from tests.ops.cases.window_attention import CASES, make_inputs

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOW = {  # hundreds of interpreted blocks
    "several-query-blocks", "several-key-blocks", "causal-query-blocks", "causal-key-blocks", "causal-joined-bias",
}  # fmt: skip


WITH_LSE = {
    "joined": dict(B=2, H=2, G=1, P=16, grid=(7, 5), window=(4, 5), shift=(2, 2), bias=True),
    "single-tokens": dict(B=1, H=2, G=1, P=8, grid=(3, 2), window=(1, 1), bias=True),
    "gqa-rotary": dict(B=1, H=6, G=2, P=24, grid=(4, 4, 4), window=(4, 2, 2), shift=(2, 1, 1), rotary=24),
    # The second window starts with 70 tokens of the sequence's end, a block of keys that tokens 0 to 9 do not see.
    "late-keys-first": dict(B=1, H=1, G=1, P=8, grid=(160,), window=(80,), shift=(10,), bias=True),
}


def check(case):
    inputs = make_inputs(case, torch.float32)
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    wrt = [k for k in ("q", "k", "v", "bias") if k in inputs]
    check_implementation("window_attention", "triton", inputs, wrt)


@pytest.mark.parametrize("name", [n for n in CASES if DEVICE == "cuda" or n not in SLOW])
def test_forward_and_backward(name):
    check(CASES[name])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", WITH_LSE)
def test_causal_and_lse(name, causal):
    check(WITH_LSE[name] | dict(causal=causal, return_lse=True))


@pytest.mark.parametrize("causal", [False, True])
def test_a_corrupt_table_stays_inside(causal):
    q = torch.randn(1, 8, 1, 16, device=DEVICE)
    tokens = torch.tensor([0, 99, -7, 3], dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([0, 3, 77], dtype=torch.int32, device=DEVICE)
    args = (tokens, offsets, None, [1, 1, 4], 1.0, None, None, None, False, causal)
    out, lse = torch.ops.linmu_triton.window_attention(q, q, q, *args)
    torch.testing.assert_close(out[:, [0, 3]], q[:, [0, 3]])  # each alone with itself
    assert not out[:, [1, 2, 4, 5, 6, 7]].any()
    grad_lse = torch.full_like(lse, torch.nan)  # of no token
    grad_lse[[0, 3]] = 1.0
    grads = torch.ops.linmu_triton.window_attention_bwd(torch.randn_like(q), grad_lse, q, q, q, out, lse, *args)
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[:, [1, 2, 4, 5, 6, 7]].any() for g in grads[:3])
