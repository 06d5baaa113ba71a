"""The layout planner in `liblinmu_cpu.so`, through its C interface (csrc/cpu/token_layout.cpp), with numpy arrays.

`Library` offers what the module `_C` does: VERSION, COMPILER and Plan, the class of reference/token_layout.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_MESSAGE = (ctypes.c_char_p, ctypes.c_int)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "linmu_plan_new": (_POINTER, _INTEGER, _POINTER, _INTEGER, _INTEGER, _INTEGER, _POINTER, *_MESSAGE),
    "linmu_plan_segments": (_POINTER, _POINTER, _POINTER, *_MESSAGE),
    "linmu_plan_scan_order": (_POINTER, _INTEGER, _POINTER, *_MESSAGE),
    "linmu_plan_window_table": (_POINTER, _POINTER, ctypes.c_int, *[_POINTER] * 4, *_MESSAGE),
}
_LONGEST = 1024  # of a message


class Library:
    """Raises OSError where the file cannot be loaded, AttributeError where it has no planner."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        self.VERSION: int = self._lib.linmu_plan_version()
        self.COMPILER = _built_by(self._lib)
        for name, arguments in _ARGUMENTS.items():
            getattr(self._lib, name).argtypes = arguments
        self.free = self._lib.linmu_plan_free
        self.free.argtypes, self.free.restype = (_POINTER,), None

    def Plan(self, blocks: np.ndarray, positions: np.ndarray, batch_size: int, length: int) -> Plan:
        return Plan(self, blocks, positions, batch_size, length)

    def call(self, name: str, *arguments: Any) -> None:
        message = ctypes.create_string_buffer(_LONGEST)
        status = getattr(self._lib, name)(*arguments, message, _LONGEST)
        if status:
            raise (ValueError if status == 1 else MemoryError)(message.value.decode())


class Plan:
    def __init__(self, library: Library, blocks: Any, positions: Any, batch_size: int, length: int) -> None:
        self._library, self._plan = library, _POINTER()
        blocks, positions = (np.ascontiguousarray(a, np.int64) for a in (blocks, positions))
        if blocks.ndim != 2 or blocks.shape[1] != 4:
            raise ValueError("TokenLayout: blocks must be (num_blocks, 4)")
        if positions.ndim != 1:
            raise ValueError("TokenLayout: positions must be (num_visual,)")
        sizes = _int64("batch_size and length", (batch_size, length)).tolist()
        library.call(
            "linmu_plan_new", blocks.ctypes.data, len(blocks), positions.ctypes.data, len(positions), *sizes,
            ctypes.addressof(self._plan),
        )  # fmt: skip
        self._shape, self._visual = tuple(sizes), len(positions)

    def __del__(self) -> None:
        self._library.free(self._plan)

    def segments(self) -> tuple[np.ndarray, np.ndarray]:
        mask, index = np.empty(self._shape, bool), np.empty(self._shape, np.int32)
        self._library.call("linmu_plan_segments", self._plan, mask.ctypes.data, index.ctypes.data)
        return mask, index

    def scan_order(self, mode: int) -> np.ndarray:
        order = np.empty(self._shape, np.int32)
        self._library.call("linmu_plan_scan_order", self._plan, mode, order.ctypes.data)
        return order

    def window_table(
        self,
        window: Sequence[int],
        shift: Sequence[int],
        image_window: Sequence[int],
        image_shift: Sequence[int],
        wrap_mask: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        given = _int64("windows and shifts", (window, shift, image_window, image_shift))
        tokens, coords = np.empty(self._visual, np.int32), np.empty(self._visual, np.int32)
        offsets, found = np.empty(self._visual + 1, np.int32), np.empty(2, np.int64)
        self._library.call(
            "linmu_plan_window_table", self._plan, given.ctypes.data, wrap_mask, tokens.ctypes.data,
            offsets.ctypes.data, coords.ctypes.data, found.ctypes.data,
        )  # fmt: skip
        count, largest = found.tolist()
        return tokens, offsets[:count].copy(), coords, largest


def _int64(name: str, values: Any) -> np.ndarray:
    """ctypes would cut what is larger to its last 64 bits."""
    try:
        return np.array(values, np.int64)
    except OverflowError:
        raise ValueError(f"TokenLayout: {name} must be below 2**63, got {values}") from None


def _built_by(lib: ctypes.CDLL) -> str:
    lib.linmu_build_info.restype = ctypes.c_char_p
    lines = lib.linmu_build_info().decode().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line).get("compiler", "")
