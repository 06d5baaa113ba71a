"""VideoLLaMA 3: a merge size per image and video; similar tokens of a video may be left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

from linmu_models.auto import register
from linmu_models.layout import Placeholders, VisualUnit, grids_to_units, to_numpy
from linmu_models.modeling import LinmuModel


class LinmuVideoLlama3Config(VideoLlama3Config):
    model_type = "linmu_video_llama_3"
    linmu: dict | None = None


@register
class LinmuVideoLlama3ForConditionalGeneration(LinmuModel, VideoLlama3ForConditionalGeneration):
    config_class = LinmuVideoLlama3Config
    config: LinmuVideoLlama3Config
    sizes_of_pixels: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pixel_values": ("image_grid_thw", "image_merge_sizes"),
        "pixel_values_videos": ("video_grid_thw", "video_merge_sizes"),
    }

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        for kind, token_id in (("image", self.config.image_token_id), ("video", self.config.video_token_id)):
            grids = inputs.get(f"{kind}_grid_thw")
            if grids is None:
                continue
            units = grids_to_units(grids, inputs[f"{kind}_merge_sizes"])
            kept = inputs.get("video_compression_mask") if kind == "video" else None
            if kept is not None:
                units = list(_compressed(units, to_numpy(kept)))
            yield Placeholders(self.placeholder_mask(inputs, token_id), units)


def _compressed(units: list[VisualUnit], kept: np.ndarray) -> Iterator[VisualUnit]:
    """What is left of each video: its grid where all of it is, else each frame as one row of tokens."""
    start = 0
    for unit in units:
        frames = unit.blocks[0].grid[0]
        left = kept[start : start + unit.tokens].reshape(frames, -1).sum(1).tolist()
        start += unit.tokens
        yield unit if sum(left) == unit.tokens else VisualUnit.joined([VisualUnit.of_grid(1, 1, n) for n in left if n])
