"""The only place that loads compiled code: `liblinmu_cpu.so` (ops, and the layout planner) and `_C` (the planner
for pybind11, where it was built from source).

Nothing here raises: a missing or refused binary leaves its reason in `Binary.error`, the references keep serving,
and the first op that would have used it warns once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .reference import token_layout

HERE = Path(__file__).parent
HOW_TO_BUILD = (
    "install the wheel of this platform, or build it with `pip install --no-build-isolation -e .` (see README)"
)


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
    if _none_wanted():
        binary.error = "LINMU_NO_BINARY is set"
        return binary
    path = find_library(device)
    if path is None:
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


def find_library(device: str) -> Path | None:
    """Beside this file, where a build or the wheel of a platform put it; else in the package linmu_<device>, if any."""
    folders = [HERE]
    if not (HERE / f"liblinmu_{device}.so").exists() and (spec := importlib.util.find_spec(f"linmu_{device}")):
        folders += map(Path, spec.submodule_search_locations or ())
    return next((f for folder in folders if (f := folder / f"liblinmu_{device}.so").exists()), None)


_planners: dict[str, Any] | None = None
_planner_errors: dict[str, str] = {}


def planners() -> dict[str, Any]:
    """The compiled layout planners that can serve, the quickest to call first; why others cannot: `planner_errors`."""
    global _planners
    if _planners is None:
        serving = {}
        for name, load in (("_C", _load_module), ("liblinmu_cpu.so", _load_interface)):
            found, why = _try(load)
            if why is None:
                serving[name] = found
            else:
                _planner_errors[name] = why
        _planners = serving  # at once, for other threads
    return _planners


def planner() -> Any:
    """The compiled layout planner that serves, or None with the reason in `planner_error()`."""
    return next(iter(planners().values()), None)


def planner_errors() -> dict[str, str]:
    """Why a compiled planner cannot serve, by the file's name."""
    planners()
    return dict(_planner_errors)


def planner_error() -> str:
    if _none_wanted():
        return "LINMU_NO_BINARY is set"
    return f"{'; '.join(f'{name}: {why}' for name, why in planner_errors().items())}; {HOW_TO_BUILD}"


def _none_wanted() -> bool:
    return bool(os.environ.get("LINMU_NO_BINARY"))


def _try(load: Callable[[], Any]) -> tuple[Any, str | None]:
    """A planner, and why it cannot serve."""
    if _none_wanted():
        return None, "LINMU_NO_BINARY is set"
    try:
        found = load()
    except (ImportError, OSError, AttributeError) as e:
        return None, str(e)
    if found is None:
        return None, "not built"
    stale = found.VERSION != token_layout.VERSION
    return found, f"it is of version {found.VERSION}, not {token_layout.VERSION}" if stale else None


def _load_module() -> ModuleType:
    return importlib.import_module("linmu_ops._C")


def _load_interface() -> Any:
    path = find_library("cpu")
    if path is None:
        return None
    from ._planner import Library

    return Library(path)
