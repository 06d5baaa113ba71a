"""What the machine can do, measured as two more variants beside the kernels: a copy and a matrix product."""

from __future__ import annotations

from collections.abc import Callable

import torch

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
LEAST_BYTES = 1 << 16


def copy(num_bytes: float, device: str) -> tuple[Callable[[], object], int]:
    """A copy that moves `num_bytes` in all (half read, half written), hence in the same level of cache as a kernel
    that moves as much; and the bytes it really moves."""
    half = max(int(num_bytes) // 2, LEAST_BYTES // 2) // 4
    source = torch.ones(half, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8 * half


def gemm(dtype: torch.dtype, device: str) -> tuple[Callable[[], object], int]:
    """A large square matrix product, and its floating-point operations."""
    n = GEMM_SIZE[device]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * n**3
