"""Qwen2-VL: one contiguous grid per image or video, M-RoPE in sections."""

from __future__ import annotations

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from linmu_models.auto import register
from linmu_models.modeling import LinmuModel

from ._thw import ThwPlaceholders


class LinmuQwen2VLConfig(Qwen2VLConfig):
    model_type = "linmu_qwen2_vl"
    linmu: dict | None = None


@register
class LinmuQwen2VLForConditionalGeneration(ThwPlaceholders, LinmuModel, Qwen2VLForConditionalGeneration):
    config_class = LinmuQwen2VLConfig
    config: LinmuQwen2VLConfig
