"""LLaVA's AnyRes: a base view, then the image at its own resolution with a newline token after each row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from linmu_models.layout import Block, VisualUnit


def base_side(config: Any) -> int:
    """Tokens per side of the base view, and of every crop."""
    return config.vision_config.image_size // config.vision_config.patch_size


def rows_with_newline(h: int, w: int) -> VisualUnit:
    """An h x w grid with one more placeholder at the end of each row, which is text."""
    return VisualUnit(h * (w + 1), (Block((1, h, w), np.arange(h * (w + 1)).reshape(h, w + 1)[:, :w].reshape(-1)),))


def anyres_unit(config: Any, size: list[int], max_crops: int | None = None) -> VisualUnit:
    """An image of `size` (height, width) in pixels; shrunk where it has more than `max_crops` crops of tokens."""
    side = base_side(config)
    crops = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    # The model's own function on a tensor without data: the padding it cuts off is the padding we leave out.
    canvas = torch.empty(1, crops[0] * side, crops[1] * side, device="meta")
    h, w = unpad_image(canvas, size).shape[1:]
    if max_crops is not None:
        ratio = math.sqrt(h * w / (max_crops * side**2))
        if ratio > 1.1:
            h, w = int(h // ratio), int(w // ratio)
    return VisualUnit.joined([VisualUnit.of_grid(1, side, side), rows_with_newline(h, w)])


def single_view(config: Any) -> VisualUnit:
    """The base view and one newline token."""
    side = base_side(config)
    return VisualUnit.joined([VisualUnit.of_grid(1, side, side), VisualUnit(1, ())])
