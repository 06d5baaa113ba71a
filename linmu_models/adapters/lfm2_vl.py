"""LFM2-VL: each image, or tile of one, is a grid of its own size; layers with short convolutions stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

from linmu_models.auto import register
from linmu_models.layout import Placeholders, VisualUnit, to_numpy
from linmu_models.modeling import LinmuModel


class LinmuLfm2VlConfig(Lfm2VlConfig):
    model_type = "linmu_lfm2_vl"
    linmu: dict | None = None


@register
class LinmuLfm2VlForConditionalGeneration(LinmuModel, Lfm2VlForConditionalGeneration):
    config_class = LinmuLfm2VlConfig
    config: LinmuLfm2VlConfig
    sizes_of_pixels: ClassVar[Mapping[str, tuple[str, ...]]] = {"pixel_values": ("spatial_shapes",)}

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        shapes, factor = inputs.get("spatial_shapes"), self.config.downsample_factor
        if shapes is not None:
            units = [VisualUnit.of_grid(1, h // factor, w // factor) for h, w in to_numpy(shapes).tolist()]
            yield Placeholders(self.placeholder_mask(inputs, self.config.image_token_id), units)
