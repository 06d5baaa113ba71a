"""SmolVLM: an image is split into tiles, each after a few tokens of text; frames of a video are images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from linmu_models.auto import register
from linmu_models.layout import Block, Placeholders, VisualUnit
from linmu_models.modeling import LinmuModel


class LinmuSmolVLMConfig(SmolVLMConfig):
    model_type = "linmu_smolvlm"
    linmu: dict | None = None


@register
class LinmuSmolVLMForConditionalGeneration(LinmuModel, SmolVLMForConditionalGeneration):
    config_class = LinmuSmolVLMConfig
    config: LinmuSmolVLMConfig

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        if inputs.get("pixel_values") is None and inputs.get("mm_encoder_outputs") is None:
            return
        vision: Any = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.config.scale_factor
        mask = self.placeholder_mask(inputs, self.config.image_token_id)
        units = [unit for row in mask for unit in tiles_to_units(np.flatnonzero(row), side)]
        yield Placeholders(mask, units)


def tiles_to_units(positions: np.ndarray, side: int) -> list[VisualUnit]:
    """The images of one row of input ids, from where its placeholders are.

    The tiles of an image are written row by row, each after two tokens (`<fake_token_around_image><row_1_col_2>`), the
    first of a row after a line break too, and the whole image comes last. Tiles so arranged are one grid;
    any other is a square of its own.
    """
    tokens = side * side
    if len(positions) % tokens:
        raise ValueError(f"linmu: a row must have whole tiles of {tokens} tokens, got {len(positions)}")
    tiles = positions.reshape(-1, tokens)
    gaps = (tiles[1:, 0] - tiles[:-1, -1] - 1).tolist()  # gaps[i]: tokens between tiles i and i + 1
    units, start = [], 0
    while start < len(tiles):
        rows, columns = _arrangement(gaps[start:])
        if rows * columns > 1:
            units.append(_joined_tiles(rows, columns, side))
            start += rows * columns
        units.append(VisualUnit.of_grid(1, side, side))
        start += 1
    return units


def _arrangement(gaps: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the tiles that `gaps` starts with, 2 within a row, 3 between rows, 3 or 4 before the whole."""
    near = [g for g in gaps]
    columns = next((i for i, g in enumerate(near) if g != 2), len(near)) + 1
    rows = 1
    while near[rows * columns - 1 : (rows + 1) * columns - 1] == [3] + [2] * (columns - 1) and columns > 1:
        rows += 1
    closing = near[rows * columns - 1 : rows * columns]
    return (rows, columns) if columns > 1 and closing and closing[0] in (3, 4) else (1, 1)


def _joined_tiles(rows: int, columns: int, side: int) -> VisualUnit:
    # Placeholders come tile by tile; the block's canonical order goes across tiles.
    tiles = np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
    return VisualUnit(tiles.size, (Block((1, rows * side, columns * side), tiles.transpose(0, 2, 1, 3).reshape(-1)),))
