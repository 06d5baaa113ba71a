"""The three stages of distillation, as one table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOSSES = ("hidden", "token", "sequence", "supervised")


@dataclass(frozen=True)
class Stage:
    """One row of the table. What is not trainable is frozen."""

    number: int
    title: str
    trainable: tuple[str, ...]
    """Kinds of parameters: `scan` (Flex-MA, the block's norm), `windows` (Local-Swin, the branch weights), `lora`."""
    windows: bool
    """Whether the window branch takes part in the forward pass."""
    losses: Mapping[str, float]
    """Weight of each loss that is used: `hidden` (Eq. 6), `token` (7), `sequence` (8), `supervised` (9)."""
    learning_rate: float
    steps: int
    block_input: str = "student"
    """What the blocks are given: the `student`'s own hidden states, as in the paper, or the `teacher`'s, so that each
    block learns from right inputs before the ones below it are right."""
    freeze: tuple[str, ...] = ()
    """Regular expressions: trainable parameters with such a name stay as they are in this stage."""


_IMITATE = {"hidden": 0.5, "token": 0.5}
_ANSWER = {"token": 0.5, "sequence": 0.5, "supervised": 0.5}

# fmt: off
STAGES = (
    Stage(1, "Flex-MA",               ("scan",),                   False, _IMITATE, 5e-4, 10_000),
    Stage(2, "Flex-MA + Local-Swin",  ("scan", "windows"),         True,  _IMITATE, 5e-4, 15_000),
    Stage(3, "M-MATE + LoRA on FFNs", ("scan", "windows", "lora"), True,  _ANSWER,  2e-5, 25_000),
)
# fmt: on

_BLOCKS = {"losses": {"block": 1.0}}
_OUTPUT, _WINDOW = PRESET_FREEZES = r"self_attn\.o_proj", r"windows\.[qkv]_"
PRESETS: dict[str, dict[str, Any]] = {
    # What is exact from the start stays so; each block learns by itself what it lacks, and then all of them together.
    "exact": {
        "hidden_average": "read",
        "stage1": _BLOCKS | {"freeze": [_OUTPUT]},
        "stage2": _BLOCKS | {"freeze": [_OUTPUT, _WINDOW]},
        "stage3": {"freeze": [_OUTPUT, _WINDOW]},
    },
    "paper": {},
    # Eq. 6 is absolute, and the paper sets no sizes before it trains.
    "literal": {"calibration_batches": 0},
}
"""Options of a run that go with a preset of the block of the same name, and what they are where a file does not say."""
