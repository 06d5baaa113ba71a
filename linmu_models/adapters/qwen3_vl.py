"""Qwen3-VL and its MoE: q and k norms, interleaved M-RoPE, DeepStack; a video has time stamps between its frames."""

from __future__ import annotations

from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from linmu_models.auto import register
from linmu_models.modeling import LinmuModel

from ._thw import ThwPlaceholders


class LinmuQwen3VLConfig(Qwen3VLConfig):
    model_type = "linmu_qwen3_vl"
    linmu: dict | None = None


@register
class LinmuQwen3VLForConditionalGeneration(ThwPlaceholders, LinmuModel, Qwen3VLForConditionalGeneration):
    config_class = LinmuQwen3VLConfig
    config: LinmuQwen3VLConfig


class LinmuQwen3VLMoeConfig(Qwen3VLMoeConfig):
    model_type = "linmu_qwen3_vl_moe"
    linmu: dict | None = None


@register
class LinmuQwen3VLMoeForConditionalGeneration(ThwPlaceholders, LinmuModel, Qwen3VLMoeForConditionalGeneration):
    config_class = LinmuQwen3VLMoeConfig
    config: LinmuQwen3VLMoeConfig
