"""Families whose processor passes (T, H, W) grids counted in patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from linmu_models.layout import Placeholders, grids_to_units


class ThwPlaceholders:
    """`image_grid_thw` and `video_grid_thw`; a video may be interrupted, e.g. by time stamps between its frames."""

    config: Any
    placeholder_mask: Callable[[Mapping[str, Any], int], Any]
    sizes_of_pixels: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pixel_values": ("image_grid_thw",),
        "pixel_values_videos": ("video_grid_thw",),
    }

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        merge = self.config.vision_config.spatial_merge_size
        for kind, token_id in (("image", self.config.image_token_id), ("video", self.config.video_token_id)):
            grids = inputs.get(f"{kind}_grid_thw")
            if grids is not None:
                mask = self.placeholder_mask(inputs, token_id)
                yield Placeholders(mask, grids_to_units(grids, merge))
