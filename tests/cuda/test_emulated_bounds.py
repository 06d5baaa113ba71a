"""Every input of the emulated CUDA kernels ends at a page that cannot be read: a read beyond it ends the process."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from linmu_ops import _registry
from linmu_ops._testing import run_op, small_inputs
from tests.ops.layouts import WITH_CUDA

PAGE = mmap.PAGESIZE
NO_ACCESS = 0


def guarded(t):
    """A copy of `t` that ends where its pages do, before one without access."""
    size = t.numel() * t.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(PAGE), NO_ACCESS) == 0
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - size).view(t.shape)
    return copy.copy_(t).requires_grad_(t.requires_grad)


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", WITH_CUDA)
def test_reads_stay_within_the_inputs(op, dtype, arch, by_emulator, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", arch)
    inputs = small_inputs(op, dtype=dtype)
    inputs = {k: guarded(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    if _registry.OPS[op].backward:
        for leaf in leaves:
            leaf.requires_grad_()
    out = run_op(op, **inputs)
    outputs = list(out) if isinstance(out, tuple) else [out]
    assert all(o.isfinite().all() for o in outputs)
    if _registry.OPS[op].backward:
        grads = torch.autograd.grad(outputs, leaves, [guarded(torch.ones_like(o)) for o in outputs], allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)
