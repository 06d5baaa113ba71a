"""PaliGemma: a square per image, before the text."""

from __future__ import annotations

from typing import ClassVar

from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from linmu_models.auto import register
from linmu_models.modeling import LinmuModel

from ._square import SquarePlaceholders


class LinmuPaliGemmaConfig(PaliGemmaConfig):
    model_type = "linmu_paligemma"
    linmu: dict | None = None


@register
class LinmuPaliGemmaForConditionalGeneration(SquarePlaceholders, LinmuModel, PaliGemmaForConditionalGeneration):
    config_class = LinmuPaliGemmaConfig
    config: LinmuPaliGemmaConfig
    facts: ClassVar = {"causal_windows": False}  # tokens of an image see each other
    prompt_sees_itself: ClassVar = True
