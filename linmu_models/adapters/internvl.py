"""InternVL: a square of tokens per tile, thumbnail last."""

from __future__ import annotations

from transformers import InternVLConfig, InternVLForConditionalGeneration

from linmu_models.auto import register
from linmu_models.modeling import LinmuModel

from ._square import SquarePlaceholders


class LinmuInternVLConfig(InternVLConfig):
    model_type = "linmu_internvl"
    linmu: dict | None = None


@register
class LinmuInternVLForConditionalGeneration(SquarePlaceholders, LinmuModel, InternVLForConditionalGeneration):
    config_class = LinmuInternVLConfig
    config: LinmuInternVLConfig
