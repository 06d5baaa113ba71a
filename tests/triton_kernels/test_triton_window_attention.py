"""The Triton kernels of `window_attention`, interpreted on the CPU, against the reference: forward and gradients."""

from __future__ import annotations

import pytest
import torch

from linmu_ops._testing import check_implementation
from tests.ops.test_window_attention import CASES, make_inputs

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOW = {"several-query-blocks", "several-key-blocks"}  # hundreds of interpreted blocks


@pytest.mark.parametrize("name", [n for n in CASES if DEVICE == "cuda" or n not in SLOW])
def test_forward_and_backward(name):
    inputs = make_inputs(CASES[name], torch.float32)
    inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    wrt = [k for k in ("q", "k", "v", "bias") if k in inputs]
    check_implementation("window_attention", "triton", inputs, wrt)


def test_a_corrupt_table_stays_inside():
    q = torch.randn(1, 8, 1, 16, device=DEVICE)
    tokens = torch.tensor([0, 99, -7, 3], dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([0, 3, 77], dtype=torch.int32, device=DEVICE)
    out, _ = torch.ops.linmu_triton.window_attention(
        q, q, q, tokens, offsets, None, [1, 1, 4], 1.0, None, None, None, False
    )
    torch.testing.assert_close(out[:, [0, 3]], q[:, [0, 3]])  # each alone with itself
    assert not out[:, [1, 2, 4, 5, 6, 7]].any()
