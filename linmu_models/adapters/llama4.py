"""Llama 4: queries and keys turn in channel pairs, then have a norm; some layers turn none. A square per tile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import Llama4Config, Llama4ForConditionalGeneration
from transformers.utils import ModelOutput

from linmu_models.auto import register
from linmu_models.layout import Placeholders, VisualUnit
from linmu_models.modeling import LinmuModel


class LinmuLlama4Config(Llama4Config):
    model_type = "linmu_llama4"
    linmu: dict | None = None


@register
class LinmuLlama4ForConditionalGeneration(LinmuModel, Llama4ForConditionalGeneration):
    config_class = LinmuLlama4Config
    config: LinmuLlama4Config
    facts: ClassVar = {"interleaved_rotary": True}

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        with_image_outputs(self)

    @classmethod
    def layer_facts(cls, config: Any, index: int) -> Mapping[str, bool]:
        turns = config.get_text_config(decoder=True).no_rope_layers[index]  # 0: they do not
        return {**cls.facts, "rotates": bool(turns)}

    @property
    def inner_model(self) -> nn.Module:
        return self

    def get_decoder(self) -> nn.Module:
        return self.language_model.model

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        """How tiles are arranged is not among the model's inputs."""
        if inputs.get("pixel_values") is None and inputs.get("mm_encoder_outputs") is None:
            return
        vision: Any = self.config.vision_config
        side = round(vision.image_size // vision.patch_size * vision.pixel_shuffle_ratio)
        mask = self.placeholder_mask(inputs, self.config.image_token_id)
        yield Placeholders(mask, [VisualUnit.of_grid(1, side, side)] * (int(mask.sum()) // side**2))


def with_image_outputs(model: Llama4ForConditionalGeneration) -> None:
    """Let a Llama 4 run in transformers 5.24, whose forward reads `image_outputs` off its decoder, which gives none."""

    def add(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, ModelOutput) and not hasattr(output, "image_outputs"):
            output.image_outputs = None

    model.language_model.register_forward_hook(add)
