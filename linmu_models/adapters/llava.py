"""LLaVA: a square per image; with a Pixtral vision tower, a grid of the image's own size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration

from linmu_models.auto import register
from linmu_models.layout import Placeholders
from linmu_models.modeling import LinmuModel

from ._sizes import placeholders_by_size
from ._square import SquarePlaceholders


class LinmuLlavaConfig(LlavaConfig):
    model_type = "linmu_llava"
    linmu: dict | None = None


@register
class LinmuLlavaForConditionalGeneration(SquarePlaceholders, LinmuModel, LlavaForConditionalGeneration):
    config_class = LinmuLlavaConfig
    config: LinmuLlavaConfig

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        if inputs.get("image_sizes") is not None:
            vision: Any = self.config.vision_config
            return placeholders_by_size(self, inputs, vision.patch_size)
        return SquarePlaceholders.placeholders(self, inputs)
