"""Gemma 4: norms of queries, keys and values, scores without a scale, keys that are values too, and heads of another
size where a layer sees all; images and videos of any size. Layers that share keys and values stay attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from linmu_models.auto import register
from linmu_models.layout import Placeholders, VisualUnit, to_numpy
from linmu_models.modeling import LinmuModel


class LinmuGemma4Config(Gemma4Config):
    model_type = "linmu_gemma4"
    linmu: dict | None = None


@register
class LinmuGemma4ForConditionalGeneration(LinmuModel, Gemma4ForConditionalGeneration):
    config_class = LinmuGemma4Config
    config: LinmuGemma4Config
    sizes_of_pixels: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pixel_values": ("image_position_ids",),
        "pixel_values_videos": ("video_position_ids",),
    }

    @classmethod
    def layer_facts(cls, config: Any, index: int) -> Mapping[str, bool]:
        """In some sizes tokens of an image see each other, in layers with sliding windows."""
        text = config.get_text_config(decoder=True)
        together = text.use_bidirectional_attention == "vision" and text.layer_types[index] == "sliding_attention"
        return {"causal_windows": False} if together else {}

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        """Of each image or frame, (x, y) of its patches, of which squares become a token; (-1, -1) is padding. Where
        tokens of an image see each other, those of two frames do not: each is an image."""
        vision: Any = self.config.vision_config
        tokens: Any = (("image", self.config.image_token_id), ("video", self.config.video_token_id))
        for kind, token_id in tokens:
            patches = inputs.get(f"{kind}_position_ids")
            if patches is None:
                continue
            sides = (to_numpy(patches).reshape(-1, patches.shape[-2], 2).max(1) + 1) // vision.pooling_kernel_size
            frames = [1] * len(sides)
            if kind == "video" and self.config.get_text_config(decoder=True).use_bidirectional_attention is None:
                counts = inputs.get("num_frames_per_video")
                if counts is None:
                    raise ValueError("linmu: num_frames_per_video must be given with pixel_values_videos, got None")
                frames = [int(n) for n in to_numpy(counts)]
            units = []
            for count in frames:
                (w, h), sides = sides[0].tolist(), sides[count:]
                units.append(VisualUnit.of_grid(count, h, w))
            yield Placeholders(self.placeholder_mask(inputs, token_id), units)
