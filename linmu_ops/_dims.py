"""Named-axis shape checks, shared by every op (csrc/torch/checks.h says the same words)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: the type states and sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this device; some, as "meta", have none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where matrix products keep the type that they are given."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def shown(value: Any) -> str:
    """A value in one line; of a tensor, what it is."""
    text = repr(value)
    return text if len(text) <= 60 and text.isprintable() and not isinstance(value, Tensor) else type(value).__name__


def check_flags(op: str, **flags: Any) -> None:
    """Raise TypeError for what is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {shown(value)}")


def check_number(op: str, name: str, value: Any) -> float:
    """A finite number, as float."""
    if not isinstance(value, (float, int, Real, torch.SymFloat, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {shown(value)}")
    number = float(value)
    if not abs(number) < math.inf:  # math.isfinite cannot be traced
        raise ValueError(f"{op}: {name} must be finite, got {number}")
    return number


def check_size(op: str, name: str, value: Any, least: int = 1) -> None:
    """Raise for what is not a whole number of at least `least`."""
    if not isinstance(value, (int, Integral, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an integer >= {least}, got {shown(value)}")
    if value < least:
        raise ValueError(f"{op}: {name} must be >= {least}, got {value}")


class Dims:
    """Binds axis names to sizes across the tensors of one call; the first tensor that breaks a name is the error.

    >>> d = Dims("ssd_scan")
    >>> d("x", x, "B L Gx P")
    >>> d("dt", dt, "B L H")
    ValueError: ssd_scan: dt must be (B, L, H) with B=2, L=3, got shape (2, 4, 9)
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    def __call__(
        self, name: str, t: Tensor, axes: str, dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
    ) -> None:
        if not isinstance(t, Tensor):
            raise TypeError(f"{self.op}: {name} must be a Tensor, got {type(t).__name__}")
        if t.layout is not torch.strided:
            raise TypeError(f"{self.op}: {name} must be dense, got {str(t.layout).removeprefix('torch.')}")
        names = axes.split()
        shape = t.shape
        sizes = self.sizes
        bad = len(shape) != len(names)
        for axis, size in zip(names, shape, strict=False):
            bad = bad or sizes.get(axis, size) != size
        if bad:
            known = ", ".join(f"{a}={sizes[a]}" for a in names if a in sizes)
            want = f"({', '.join(names)}{',' if len(names) == 1 else ''})"
            raise ValueError(
                f"{self.op}: {name} must be {want}{f' with {known}' if known else ''}, got shape {tuple(shape)}"
            )
        sizes.update(zip(names, shape, strict=True))
        if dtype is not None and t.dtype not in (dtype if isinstance(dtype, tuple) else (dtype,)):
            want = " or ".join(str(x).removeprefix("torch.") for x in (dtype if isinstance(dtype, tuple) else (dtype,)))
            raise TypeError(f"{self.op}: {name} must be {want}, got {str(t.dtype).removeprefix('torch.')}")

    def optional(
        self, name: str, t: Tensor | None, axes: str, dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
    ) -> None:
        if t is not None:
            self(name, t, axes, dtype)

    def divides(self, name: str, part: str, whole: str) -> None:
        """Require that the size of axis `part` divides that of axis `whole`."""
        p, w = self.sizes[part], self.sizes[whole]
        if p == 0 or w % p:
            raise ValueError(f"{self.op}: {name}'s {part}={p} must divide {whole}={w}")

    def same_device(self, reference: Tensor, **tensors: Tensor | None) -> None:
        for name, t in tensors.items():
            if t is not None and t.device != reference.device:
                raise ValueError(f"{self.op}: {name} must be on {reference.device}, got {t.device}")
