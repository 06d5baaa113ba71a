"""LLaVA-NeXT (1.6): AnyRes images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from linmu_models.auto import register
from linmu_models.layout import Placeholders, to_numpy
from linmu_models.modeling import LinmuModel

from ._anyres import anyres_unit


class LinmuLlavaNextConfig(LlavaNextConfig):
    model_type = "linmu_llava_next"
    linmu: dict | None = None


@register
class LinmuLlavaNextForConditionalGeneration(LinmuModel, LlavaNextForConditionalGeneration):
    config_class = LinmuLlavaNextConfig
    config: LinmuLlavaNextConfig
    sizes_of_pixels: ClassVar[Mapping[str, tuple[str, ...]]] = {"pixel_values": ("image_sizes",)}

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        sizes = inputs.get("image_sizes")
        if sizes is not None:
            units = [anyres_unit(self.config, size) for size in to_numpy(sizes).tolist()]
            yield Placeholders(self.placeholder_mask(inputs, self.config.image_token_id), units)
