"""Random cases of ops and blocks, drawn by hypothesis: `make fuzz`. A target is a strategy of cases and their check."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from . import blocks, laws, ops


def targets(module: ModuleType) -> dict[str, Any]:
    """By the name of each check, its strategy `<name>_cases` and itself."""
    names = [name.removesuffix("_cases") for name in vars(module) if name.endswith("_cases")]
    return {name: (getattr(module, f"{name}_cases"), getattr(module, name)) for name in names}


TARGETS = {
    **targets(ops),
    **targets(laws),
    "block": (blocks.cases, blocks.defined),
    "block_in_pieces": (blocks.carried_cases, blocks.carried),
    "block_padded": (blocks.padded_cases, blocks.padded),
    "block_cut": (blocks.cut_cases, blocks.cut),
    "block_packed": (blocks.cases, blocks.packed),
}


def prepare() -> None:
    """As `tests/conftest.py` does: what is not written is NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
