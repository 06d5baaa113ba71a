"""Weight decay takes hold of weights alone: what decays, gates, norms and feature maps start as is no error."""

import pytest
import tiny
import torch

from distill.student import add_lora, decaying
from linmu_ops import MMATE
from linmu_ops.nn.config import PRESETS, MMATEConfig

DECAYED = {
    *(f"{branch}.{name}_proj.weight" for branch, names in (("flex", "cbxo"), ("swin", "qkvo")) for name in names),
    "flex.reverse_b_proj.weight",
    "flex.reverse_c_proj.weight",
}
KEPT = {
    # norms and biases
    "norm.weight", "norm.bias", "flex.head_norm", "flex.c_norm.weight", "flex.b_norm.weight", "swin.q_norm.weight",
    "swin.k_norm.weight", "swin.bias", "flex.z_proj.bias", "flex.conv.bias", "mix_rest.bias",
    *(f"{branch}.{name}_proj.bias" for branch, names in (("flex", "cbxo"), ("swin", "qkvo")) for name in names),
    "flex.reverse_b_proj.bias", "flex.reverse_c_proj.bias",
    # decays and step sizes
    *(f"flex.{way}{name}" for way in ("", "reverse_") for name in ("A_log", "dt_bias", "dt_proj.weight")),
    # gates, and the weights of the branches
    "flex.gate", "flex.gate_proj.weight", "flex.z_proj.weight", "mix", "mix_proj.weight", "mix_rest.weight",
    # what starts as the identity, or as a size
    "flex.b_map", "flex.c_map", "flex.conv.weight", "flex.scale", "flex.D",
}  # fmt: skip
EVERY = {
    **PRESETS,
    "all of the paper's": MMATEConfig(
        reverse_projections="separate", gate="token", conv_width=4, z_gate=True, head_norm=True, skip=True, mix="token",
        relative_bias=True, image_window=None, norm="layer", text_window=8,
    ),
    "channel, rms": MMATEConfig(mix="channel", norm="rms"),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_is_of_one_of_two_kinds(name):
    block = MMATE(24, 4, 2, qkv_bias=True, out_bias=True, qk_norm=torch.nn.RMSNorm, config=EVERY[name])
    names = {n for n, _ in block.named_parameters()}
    assert names <= DECAYED | KEPT
    assert decaying(block) == names & DECAYED


@pytest.mark.parametrize("number", [1, 3])
def test_the_optimiser_decays_these_and_loras(tmp_path, number):
    trainer = tiny.stage_trainer(tiny.tiny_config(tmp_path), number)
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in trainer._groups()}
    assert set(groups) == {0.0, trainer.config.optimizer.weight_decay}
    for name, parameter in trainer.trainable.items():
        decayed = id(parameter) in groups[trainer.config.optimizer.weight_decay]
        assert decayed == (name.endswith("_proj.weight") or ".lora_" in name), name
        assert decayed != (id(parameter) in groups[0.0])


def test_a_map_named_as_a_gate_is_a_weight_where_it_is_loras(tmp_path):
    student = tiny.student_model(tiny.teacher_model())
    add_lora(student, tiny.tiny_config(tmp_path).lora, seed=0)
    lora = {name for name, _ in student.named_parameters() if ".lora_" in name}
    assert any("gate_proj" in name for name in lora) and lora <= decaying(student)
