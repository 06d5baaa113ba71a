"""Qwen2.5-VL: one contiguous grid per image or video, M-RoPE in sections."""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from linmu_models.auto import register
from linmu_models.modeling import LinmuModel

from ._thw import ThwPlaceholders


class LinmuQwen2_5_VLConfig(Qwen2_5_VLConfig):
    model_type = "linmu_qwen2_5_vl"
    linmu: dict | None = None


@register
class LinmuQwen2_5_VLForConditionalGeneration(ThwPlaceholders, LinmuModel, Qwen2_5_VLForConditionalGeneration):
    config_class = LinmuQwen2_5_VLConfig
    config: LinmuQwen2_5_VLConfig
