"""Gemma 3: a square per image, norms of q and k, local and global layers with their own rotary embedding."""

from __future__ import annotations

from typing import ClassVar

from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from linmu_models.auto import register
from linmu_models.modeling import LinmuModel

from ._square import SquarePlaceholders


class LinmuGemma3Config(Gemma3Config):
    model_type = "linmu_gemma3"
    linmu: dict | None = None


@register
class LinmuGemma3ForConditionalGeneration(SquarePlaceholders, LinmuModel, Gemma3ForConditionalGeneration):
    config_class = LinmuGemma3Config
    config: LinmuGemma3Config
    facts: ClassVar = {"causal_windows": False}  # tokens of an image see each other
