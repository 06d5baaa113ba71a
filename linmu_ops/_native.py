"""The only place that loads compiled code: `liblinmu_cpu.so` (ops) and `_C` (the layout planner).

Nothing here raises: a missing or refused binary leaves its reason in `Binary.error`, the references keep serving,
and the first op that would have used it warns once.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from .reference import token_layout

HERE = Path(__file__).parent
HOW_TO_BUILD = "build it with `pip install --no-build-isolation -e .` (see README)"


@dataclass
class Binary:
    """State of one compiled library."""

    file: str
    path: Path | None = None
    error: str | None = None
    info: dict[str, str] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        return self.path is not None and self.error is None


def load_library(device: str, schema_hash: str) -> Binary:
    """Load liblinmu_<device>.so and let it register its kernels; it refuses when built for other schemas."""
    binary = Binary(file=f"liblinmu_{device}.so")
    path = HERE / binary.file
    if os.environ.get("LINMU_NO_BINARY"):
        binary.error = "LINMU_NO_BINARY is set"
        return binary
    if not path.exists():
        binary.error = f"not built: {HOW_TO_BUILD}"
        return binary
    binary.path = path
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        binary.error = f"cannot be loaded by this torch: {e}; {HOW_TO_BUILD}"
        return binary
    lib.linmu_build_info.restype = ctypes.c_char_p
    binary.info = dict(line.split("=", 1) for line in lib.linmu_build_info().decode().splitlines() if "=" in line)
    message = ctypes.create_string_buffer(4096)
    if lib.linmu_register(schema_hash.encode(), message, len(message)) != 0:
        binary.error = f"refused to register: {message.value.decode()}; {HOW_TO_BUILD}"
    return binary


_planner: ModuleType | None = None
planner_error: str | None = None


def planner() -> ModuleType | None:
    """The compiled layout planner, or None with the reason in `planner_error`."""
    global _planner, planner_error
    if _planner is None and planner_error is None:
        if os.environ.get("LINMU_NO_BINARY"):
            planner_error = "LINMU_NO_BINARY is set"
            return None
        try:
            module = importlib.import_module("linmu_ops._C")
        except ImportError as e:
            planner_error = f"{e}; {HOW_TO_BUILD}"
            return None
        if module.VERSION != token_layout.VERSION:
            planner_error = f"_C is of version {module.VERSION}, not {token_layout.VERSION}; {HOW_TO_BUILD}"
            return None
        _planner = module
    return _planner
