"""Families whose images have any size, given in pixels: Pixtral vision towers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from linmu_models.layout import Placeholders, VisualUnit, to_numpy


def placeholders_by_size(model: Any, inputs: Mapping[str, Any], pixels: int) -> Iterable[Placeholders]:
    """`image_sizes` (height, width); a token is a square of `pixels` pixels. The break after each row is text."""
    sizes = inputs.get("image_sizes")
    if sizes is not None:
        units = [VisualUnit.of_grid(1, h // pixels, w // pixels) for h, w in to_numpy(sizes).tolist()]
        yield Placeholders(model.placeholder_mask(inputs, model.config.image_token_id), units)
