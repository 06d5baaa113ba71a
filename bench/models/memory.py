"""Memory: what a call takes at its peak, what a measurement will need."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from .shapes import Shape

T = TypeVar("T")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_of(call: Callable[[], T], device: str) -> tuple[T, int | None]:
    """(what `call` returns, bytes it needed at most beyond those in use before); None where that cannot be known.

    On a GPU what PyTorch allocates; on Linux the process's resident memory, libraries' scratch included.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = call()
        torch.cuda.synchronize()
        return out, torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "malloc_trim"):
        return call(), None
    libc.malloc_trim(0)  # freed memory that the allocator keeps would hide what the call takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return call(), None
    before = _status("VmRSS")
    out = call()
    return out, max(0, _status("VmHWM") - before)


def available(device: str) -> int | None:
    """Bytes that can still be allocated; None where that cannot be known."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def kv_bytes(shape: Shape, tokens: int, batch: int, itemsize: int) -> int:
    """Keys and values of so many tokens."""
    t = shape.text
    size = t["hidden_size"] // t["num_attention_heads"]
    return 2 * batch * tokens * t["num_key_value_heads"] * size * itemsize * t["num_hidden_layers"]


def needed(shape: Shape, kind: str, is_student: bool, tokens: int, batch: int, itemsize: int) -> int:
    """About what a measurement takes beside the weights: keys and values, and an MLP's and a block's temporaries."""
    t = shape.text
    kv = 0 if is_student else kv_bytes(shape, tokens, batch, itemsize)
    if kind == "decode":
        return kv + 2 * kv // t["num_hidden_layers"]
    return kv + batch * tokens * itemsize * (3 * t["intermediate_size"] + (12 if is_student else 8) * t["hidden_size"])
