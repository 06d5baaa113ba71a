"""Random cases of ops and blocks, drawn by hypothesis: `make fuzz`. A target is a strategy of cases and their check."""

from __future__ import annotations

import torch

from . import blocks, laws, ops

OPS = ("ssd_scan", "ssd_step", "causal_conv1d", "causal_conv1d_step", "branch_mix_norm", "window_attention")
LAWS = (*(f"{op}_unseen" for op in ("ssd_scan", "causal_conv1d", "branch_mix_norm", "window_attention")), "pieces")
TARGETS = {
    **{name: (getattr(ops, f"{name}_cases"), getattr(ops, name)) for name in OPS},
    **{name: (getattr(laws, f"{name}_cases"), getattr(laws, name)) for name in LAWS},
    "block": (blocks.cases, blocks.defined),
    "block_in_pieces": (blocks.carried_cases, blocks.carried),
    "block_padded": (blocks.padded_cases, blocks.padded),
    "block_packed": (blocks.cases, blocks.packed),
}


def prepare() -> None:
    """As `tests/conftest.py` does: what is not written is NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
