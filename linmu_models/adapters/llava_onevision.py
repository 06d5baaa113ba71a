"""LLaVA-OneVision: AnyRes for a single image, base views for several, pooled frames for a video."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from linmu_models.auto import register
from linmu_models.layout import Placeholders, VisualUnit, to_numpy
from linmu_models.modeling import LinmuModel

from ._anyres import anyres_unit, base_side, single_view


class LinmuLlavaOnevisionConfig(LlavaOnevisionConfig):
    model_type = "linmu_llava_onevision"
    linmu: dict | None = None


@register
class LinmuLlavaOnevisionForConditionalGeneration(LinmuModel, LlavaOnevisionForConditionalGeneration):
    config_class = LinmuLlavaOnevisionConfig
    config: LinmuLlavaOnevisionConfig
    sizes_of_pixels: ClassVar[Mapping[str, tuple[str, ...]]] = {"pixel_values": ("image_sizes",)}

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        sizes = inputs.get("image_sizes")
        if sizes is not None:
            rows = to_numpy(sizes).tolist()
            counts = inputs.get("batch_num_images")
            alone = [True] * len(rows) if counts is None else [n == 1 for n in to_numpy(counts) for _ in range(n)]
            most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
            units = [
                anyres_unit(self.config, size, most) if one else single_view(self.config)
                for size, one in zip(rows, alone, strict=True)
            ]
            yield Placeholders(self.placeholder_mask(inputs, self.config.image_token_id), units)
        videos = inputs.get("pixel_values_videos")
        if videos is not None:
            side = -(-base_side(self.config) // 2)
            unit = VisualUnit.joined([VisualUnit.of_grid(videos.shape[1], side, side), VisualUnit(1, ())])
            yield Placeholders(self.placeholder_mask(inputs, self.config.video_token_id), [unit] * len(videos))
