"""Families whose images are square and all of one size: the layout follows from how many images there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from linmu_models.layout import Placeholders, VisualUnit


def count_images(inputs: Mapping[str, Any]) -> int:
    """How many images (or tiles) one call brings, of pixels or of features that were computed before."""
    pixels = inputs.get("pixel_values")
    if pixels is not None:
        return len(pixels)
    outputs = inputs.get("mm_encoder_outputs") or {}
    return len(outputs["image"].pooler_output) if outputs.get("image") is not None else 0


class SquarePlaceholders:
    """Each image, or tile of one, is a square of its own; how tiles are arranged is not among the model's inputs."""

    config: Any
    placeholder_mask: Callable[[Mapping[str, Any], int], Any]

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        images = count_images(inputs)
        if images:
            mask = self.placeholder_mask(inputs, self.config.image_token_id)
            tokens, rest = divmod(int(mask.sum()), images)
            if rest:
                raise ValueError(f"linmu: {images} images must have equally many tokens, got {mask.sum()} in all")
            yield Placeholders(mask, [VisualUnit.of_square(tokens)] * images if tokens else [])
