"""`python -m bench.small_calls window scan ops`: small calls of every CUDA kernel, for compute-sanitizer to look at.

Ragged windows, a last chunk that is not full, gradients of everything; where sm_90a has kernels of its own both are
called.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import run_op, run_small

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _run(op: str, inputs: dict[str, Any]) -> None:
    leaves = [v.requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    for arch in ("80", "90"):
        os.environ["LINMU_CUDA_ARCH"] = arch
        with linmu_ops.use_impl(f"{op}:cuda"):
            out = run_op(op, **inputs)
            torch.autograd.grad(out.float().sum(), leaves, allow_unused=True)
        torch.cuda.synchronize()
        print(op, leaves[0].dtype, tuple(leaves[0].shape), f"as sm_{arch}")


def window() -> None:
    for dtype in DTYPES:
        for P, biased in ((64, True), (128, False), (40, True)):
            q, k, v = (torch.randn(2, 126, heads, P, device="cuda", dtype=dtype) for heads in (4, 2, 2))
            bias = torch.randn(4, 3, 9, 7, device="cuda") if biased else None
            windows: dict[str, Any] = dict(grid=(2, 9, 7), window=(2, 5, 4), shift=(1, 2, 1))
            _run("window_attention", dict(q=q, k=k, v=v, bias=bias) | windows)


def scan() -> None:
    L, H = 300, 4
    for dtype in DTYPES:
        for P, groups, ordered in ((64, 4, False), (128, 2, False), (72, 1, True)):
            x, b, c = (torch.randn(2, L, g, P, device="cuda", dtype=dtype) for g in (groups, 1, H))
            order = torch.stack([torch.randperm(L) for _ in range(2)]).int().cuda() if ordered else None
            dt, A = torch.rand(2, L, H, device="cuda"), -torch.rand(H, device="cuda")
            _run("ssd_scan", dict(x=x, dt=dt, A=A, B=b, C=c, direction="both", token_order=order))


def ops() -> None:
    for op in sorted(_registry.OPS):
        for dtype in DTYPES:
            run_small(op, "cuda", "cuda", dtype)
            torch.cuda.synchronize()
            print(op, dtype)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        {"window": window, "scan": scan, "ops": ops}[name]()
