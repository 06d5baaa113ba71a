"""Prompts of a given length: embeddings for a decoder, ids and pixels for a whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linmu_ops import TokenLayout

from .shapes import SIDE, frames_of, video_layout

ORDINARY = 10  # an id that is no placeholder


def decoder_inputs(model: Any, tokens: int, batch: int) -> tuple[TokenLayout, dict[str, Tensor]]:
    """Where the visual tokens are, and random embeddings with positions."""
    size = model.config.get_text_config(decoder=True).hidden_size
    generator = torch.Generator(model.device).manual_seed(0)
    embeddings = torch.empty(batch, tokens, size, dtype=model.dtype, device=model.device)
    embeddings.normal_(generator=generator)
    positions = torch.arange(tokens, device=model.device).expand(batch, -1)
    return video_layout(tokens, batch), dict(embeddings=embeddings, positions=positions)


def whole_inputs(model: Any, tokens: int, batch: int) -> dict[str, Tensor]:
    """What a processor would pass for a video (Qwen) or images (SmolVLM), and a question."""
    device, vision = model.device, model.config.vision_config
    ids = torch.full((batch, tokens), ORDINARY, device=device)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, model.dtype)

    if hasattr(model.config, "scale_factor"):
        side = vision.image_size // vision.patch_size // model.config.scale_factor
        images = max(1, (tokens - 64) // (side * side + 1))
        for i in range(images):  # each after one token of text
            start = 1 + i * (side * side + 1)
            ids[:, start : start + side * side] = model.config.image_token_id
        size = vision.image_size
        return dict(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels(batch, images, 3, size, size)
        )
    frames, merge = frames_of(tokens), vision.spatial_merge_size
    count = frames * SIDE**2
    first = (tokens - count) // 2
    ids[:, first - 1] = model.config.vision_start_token_id
    ids[:, first : first + count] = model.config.video_token_id
    ids[:, first + count] = model.config.vision_end_token_id
    volume = 3 * vision.temporal_patch_size * vision.patch_size**2
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids),
        mm_token_type_ids=2 * (ids == model.config.video_token_id).int(),
        pixel_values_videos=pixels(batch * count * merge**2, volume),
        video_grid_thw=torch.tensor([[frames, SIDE * merge, SIDE * merge]] * batch, device=device),
    )  # fmt: skip
