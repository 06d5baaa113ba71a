"""Qwen3.5 and its MoE: attention with output gates and partial rotary in each fourth layer, the gated delta rule in the
others, which stay. Grids as in Qwen3-VL; the language models are families of their own."""

from __future__ import annotations

from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

from linmu_models.auto import register
from linmu_models.modeling import LinmuModel

from ._thw import ThwPlaceholders


class LinmuQwen3_5Config(Qwen3_5Config):
    model_type = "linmu_qwen3_5"
    linmu: dict | None = None


@register
class LinmuQwen3_5ForConditionalGeneration(ThwPlaceholders, LinmuModel, Qwen3_5ForConditionalGeneration):
    config_class = LinmuQwen3_5Config
    config: LinmuQwen3_5Config


class LinmuQwen3_5TextConfig(Qwen3_5TextConfig):
    model_type = "linmu_qwen3_5_text"
    linmu: dict | None = None


@register
class LinmuQwen3_5ForCausalLM(LinmuModel, Qwen3_5ForCausalLM):
    config_class = LinmuQwen3_5TextConfig
    config: LinmuQwen3_5TextConfig
    auto_class = "AutoModelForCausalLM"


class LinmuQwen3_5MoeConfig(Qwen3_5MoeConfig):
    model_type = "linmu_qwen3_5_moe"
    linmu: dict | None = None


@register
class LinmuQwen3_5MoeForConditionalGeneration(ThwPlaceholders, LinmuModel, Qwen3_5MoeForConditionalGeneration):
    config_class = LinmuQwen3_5MoeConfig
    config: LinmuQwen3_5MoeConfig


class LinmuQwen3_5MoeTextConfig(Qwen3_5MoeTextConfig):
    model_type = "linmu_qwen3_5_moe_text"
    linmu: dict | None = None


@register
class LinmuQwen3_5MoeForCausalLM(LinmuModel, Qwen3_5MoeForCausalLM):
    config_class = LinmuQwen3_5MoeTextConfig
    config: LinmuQwen3_5MoeTextConfig
    auto_class = "AutoModelForCausalLM"
