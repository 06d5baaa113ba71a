"""GLM-4V, GLM-4V-MoE and GLM-4.6V: partial rotary embedding, in the first of channel pairs; images and videos share a
placeholder, told apart by type ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
)

from linmu_models.attention import IN_FLOAT32
from linmu_models.auto import register
from linmu_models.layout import Placeholders, grids_to_units, to_numpy
from linmu_models.modeling import LinmuModel


class _Glm4vPlaceholders:
    config: Any
    placeholder_mask: Callable[[Mapping[str, Any], int], Any]
    sizes_of_pixels: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pixel_values": ("image_grid_thw",),
        "pixel_values_videos": ("video_grid_thw",),
    }

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        vision: Any = self.config.vision_config
        merge = vision.spatial_merge_size
        given = [(kind, inputs.get(f"{name}_grid_thw")) for kind, name in ((1, "image"), (2, "video"))]
        given = [(kind, grids) for kind, grids in given if grids is not None]
        if not given:
            return
        mask = self.placeholder_mask(inputs, self.config.image_token_id)
        types = inputs.get("mm_token_type_ids")
        if len(given) > 1 and types is None:
            raise ValueError("linmu: mm_token_type_ids must be given with both images and videos, got None")
        for kind, grids in given:
            mine = mask if len(given) == 1 else mask & (to_numpy(types)[:, -mask.shape[1] :] == kind)
            yield Placeholders(mine, grids_to_units(grids, merge))


class LinmuGlm4vConfig(Glm4vConfig):
    model_type = "linmu_glm4v"
    linmu: dict | None = None


@register
class LinmuGlm4vForConditionalGeneration(_Glm4vPlaceholders, LinmuModel, Glm4vForConditionalGeneration):
    config_class = LinmuGlm4vConfig
    config: LinmuGlm4vConfig
    facts: ClassVar = {"interleaved_rotary": True}


class LinmuGlm46VConfig(Glm46VConfig):
    model_type = "linmu_glm46v"
    linmu: dict | None = None


@register
class LinmuGlm46VForConditionalGeneration(_Glm4vPlaceholders, LinmuModel, Glm46VForConditionalGeneration):
    config_class = LinmuGlm46VConfig
    config: LinmuGlm46VConfig
    facts: ClassVar = {"interleaved_rotary": True}


class LinmuGlm4vMoeConfig(Glm4vMoeConfig):
    model_type = "linmu_glm4v_moe"
    linmu: dict | None = None


@register
class LinmuGlm4vMoeForConditionalGeneration(_Glm4vPlaceholders, LinmuModel, Glm4vMoeForConditionalGeneration):
    config_class = LinmuGlm4vMoeConfig
    config: LinmuGlm4vMoeConfig
    _keep_in_fp32_modules_strict = {  # type: ignore[assignment]  # noqa: RUF012  # as transformers declares it
        IN_FLOAT32.pattern,
        *(Glm4vMoeForConditionalGeneration._keep_in_fp32_modules_strict or ()),
    }
