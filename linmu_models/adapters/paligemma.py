"""PaliGemma: an image, then a prompt, all tokens of which see each other; what follows is causal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from linmu_models.auto import register
from linmu_models.hooks import tokens_of
from linmu_models.layout import Placeholders, VisualUnit, to_numpy
from linmu_models.masks import padding_of
from linmu_models.modeling import LinmuModel
from linmu_ops.nn import ExactConfig, MMATEConfig
from linmu_ops.nn.config import LONGEST


class LinmuPaliGemmaConfig(PaliGemmaConfig):
    model_type = "linmu_paligemma"
    linmu: dict | None = None


@register
class LinmuPaliGemmaForConditionalGeneration(LinmuModel, PaliGemmaForConditionalGeneration):
    config_class = LinmuPaliGemmaConfig
    config: LinmuPaliGemmaConfig
    facts: ClassVar = {"causal_windows": False}
    prompt_sees_itself: ClassVar = True

    @classmethod
    def fit_options(cls, options: MMATEConfig | ExactConfig, config: Any) -> MMATEConfig | ExactConfig:
        """A window is a row, of an image of the teacher and as many tokens as `image_window` holds."""
        window = options.image_window or options.window
        if (isinstance(options, MMATEConfig) and not options.swin) or window[:2] == (1, 1):
            return options
        size = config.text_config.num_image_tokens + math.prod(window)
        return dataclasses.replace(options, image_window=(1, 1, min(size, LONGEST)))

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        """Image and prompt, `token_type_ids` 0, are one row of visual tokens. Without these the teacher is causal."""
        kinds = inputs.get("token_type_ids")
        if kinds is None:
            return
        tokens = tokens_of(inputs)
        prefix = to_numpy(kinds)[:, -tokens.shape[1] :] == 0
        padding = padding_of(inputs, tokens.shape[1])
        if padding is not None:
            prefix = prefix & to_numpy(padding)
        yield Placeholders(prefix, [VisualUnit.of_grid(1, 1, int(n)) for n in prefix.sum(1) if n])
