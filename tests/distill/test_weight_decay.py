"""Weight decay takes hold of weights alone: what decays, gates, norms and feature maps start as is no error."""

import pytest
import stand_ins
import torch

from linmu_distill.student import add_lora, decaying
from linmu_distill.train import WEIGHT_DECAY
from linmu_ops import MMATE, ExactConfig, ExactMMATE, MMATEConfig
from linmu_ops.nn import PRESETS

PROJECTIONS = [
    *(f"scan.{way}{name}_proj" for way, names in (("", "cbx"), ("reverse_", "cb")) for name in names),
    *(f"windows.{name}_proj" for name in "qkv"), "o_proj", "scan_o_proj", "windows_o_proj",
]  # fmt: skip
DECAYED = {f"{name}.weight" for name in PROJECTIONS}
KEPT = {
    # norms and biases
    "norm.weight", "norm.bias", "scan.head_norm", "scan.c_norm.weight", "scan.b_norm.weight", "windows.q_norm.weight",
    "windows.k_norm.weight", "scan.z_proj.bias", "share.bias", *(f"{name}.bias" for name in PROJECTIONS),
    # decays and step sizes
    *(f"scan.{way}{name}" for way in ("", "reverse_") for name in ("A_log", "dt_bias", "dt_proj.weight")),
    # gates, and the weights of the branches
    "scan.gate", "scan.gate_proj.weight", "scan.z_proj.weight", "mix", "mix_proj.weight", "share.weight",
    # what starts as the identity, or as a size
    "scan.b_map", "scan.c_map", "scan.scale", "scan.beta_bias",
}  # fmt: skip
EVERY = {
    **PRESETS,
    "all of the paper's": MMATEConfig(literal=True, z_gate=True, head_norm=True, text_window=8),
    "delta rule": ExactConfig(far="delta"),
    "windows alone": MMATEConfig(branches="swin"),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_is_of_one_of_two_kinds(name):
    block_class = ExactMMATE if isinstance(EVERY[name], ExactConfig) else MMATE
    block = block_class(24, 4, 2, qkv_bias=True, out_bias=True, qk_norm=torch.nn.RMSNorm, config=EVERY[name])
    names = {n for n, _ in block.named_parameters()}
    assert names <= DECAYED | KEPT
    assert decaying(block) == names & DECAYED


@pytest.mark.parametrize("number", [1, 3])
def test_the_optimiser_decays_these_and_loras(tmp_path, number):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path), number)
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in trainer._groups()}
    assert set(groups) == {0.0, WEIGHT_DECAY}
    for name, parameter in trainer.trainable.items():
        decayed = id(parameter) in groups[WEIGHT_DECAY]
        assert decayed == (name.endswith("_proj.weight") or ".lora_" in name), name
        assert decayed != (id(parameter) in groups[0.0])


def test_a_map_named_as_a_gate_is_a_weight_where_it_is_loras(tmp_path):
    student = stand_ins.student_model(stand_ins.teacher_model())
    add_lora(student, stand_ins.config_of(tmp_path).lora_rank, seed=0)
    lora = {name for name, _ in student.named_parameters() if ".lora_" in name}
    assert any("gate_proj" in name for name in lora) and lora <= decaying(student)
