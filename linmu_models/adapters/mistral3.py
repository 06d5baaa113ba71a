"""Mistral 3: a grid of the image's own size, 2 x 2 patches to a token, a break token after each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from linmu_models.auto import register
from linmu_models.layout import Placeholders
from linmu_models.modeling import LinmuModel

from ._sizes import placeholders_by_size


class LinmuMistral3Config(Mistral3Config):
    model_type = "linmu_mistral3"
    linmu: dict | None = None


@register
class LinmuMistral3ForConditionalGeneration(LinmuModel, Mistral3ForConditionalGeneration):
    config_class = LinmuMistral3Config
    config: LinmuMistral3Config
    sizes_of_pixels: ClassVar[Mapping[str, tuple[str, ...]]] = {"pixel_values": ("image_sizes",)}

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        vision: Any = self.config.vision_config
        return placeholders_by_size(self, inputs, vision.patch_size * self.config.spatial_merge_size)
