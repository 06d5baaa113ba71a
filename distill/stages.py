"""The three stages of distillation, as one table, and what each preset changes in it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """One row of the table. What is not trainable is frozen."""

    number: int
    title: str
    trainable: tuple[str, ...]
    """Kinds of parameters. `scan`: the scans (Flex-MA) and the block's norm. `windows`: the windows (Local-Swin) and
    the weights between the two branches. `lora`: low-rank updates of the decoder's FFNs."""
    windows: bool
    """Whether the windows of an `MMATE` take part in the forward pass."""
    losses: Mapping[str, float]
    """Weight of each loss that is used: `hidden` (Eq. 6), `token` (7), `sequence` (8), `supervised` (9)."""
    learning_rate: float
    steps: int
    block_input: Literal["student", "teacher"] = "student"
    """Whose hidden states the blocks get. The paper gives them the student's own. With the teacher's, each block learns
    from right inputs before the blocks below it are right."""
    average: Literal["tokens", "read"] = "tokens"
    """How L_hid averages tokens. `tokens` counts all of them alike, as in the paper. `read` is the mean of three means:
    over visual tokens, over text, and over what answers read. In the last one a token counts by the attention that
    later layers give it from the positions that predict answers; these positions count themselves."""
    freeze: tuple[str, ...] = ()
    """Regular expressions. A trainable parameter with such a name stays frozen in this stage."""


_IMITATE = {"hidden": 0.5, "token": 0.5}
_ANSWER = {"token": 0.5, "sequence": 0.5, "supervised": 0.5}

# fmt: off
STAGES = (
    Stage(1, "Flex-MA",               ("scan",),                   False, _IMITATE, 5e-4, 10_000),
    Stage(2, "Flex-MA + Local-Swin",  ("scan", "windows"),         True,  _IMITATE, 5e-4, 15_000),
    Stage(3, "M-MATE + LoRA on FFNs", ("scan", "windows", "lora"), True,  _ANSWER,  2e-5, 25_000),
)
# fmt: on


def alone(stage: Stage, weight: float) -> Stage:
    """The stage, but each block learns by itself: from the teacher's inputs, by L_hid alone."""
    return replace(stage, losses={"hidden": weight}, block_input="teacher", average="read")


# An `ExactMMATE` starts with exact windows, and training keeps them exact. First each block learns by itself what its
# windows leave out, then all blocks learn together.
# Step sizes choose what is kept. No gradient knows of that choice: they stay as calibrated.
_OUTPUT, _WINDOWS, _KEPT = r"self_attn\.((gated_)?o_proj|gate_proj)", r"windows\.[qkv]_", r"scan\.dt_"
_EXACT = (
    replace(alone(STAGES[0], 1.0), freeze=(_OUTPUT, _KEPT)),
    replace(alone(STAGES[1], 1.0), freeze=(_OUTPUT, _WINDOWS, _KEPT)),
    replace(STAGES[2], freeze=(_OUTPUT, _WINDOWS, _KEPT)),
)

PRESETS = {"exact": _EXACT, "paper": STAGES, "literal": STAGES}
"""The stages that go with a preset of the block. They hold where a file says nothing else."""
