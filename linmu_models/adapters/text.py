"""Text-only decoders. They have no visual tokens, so a block scans forwards alone."""

from __future__ import annotations

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from linmu_models.auto import register
from linmu_models.modeling import LinmuModel


class LinmuLlamaConfig(LlamaConfig):
    model_type = "linmu_llama"
    linmu: dict | None = None


@register
class LinmuLlamaForCausalLM(LinmuModel, LlamaForCausalLM):
    config_class = LinmuLlamaConfig
    config: LinmuLlamaConfig
    auto_class = "AutoModelForCausalLM"


class LinmuQwen2Config(Qwen2Config):
    model_type = "linmu_qwen2"
    linmu: dict | None = None


@register
class LinmuQwen2ForCausalLM(LinmuModel, Qwen2ForCausalLM):
    config_class = LinmuQwen2Config
    config: LinmuQwen2Config
    auto_class = "AutoModelForCausalLM"


class LinmuQwen3Config(Qwen3Config):
    model_type = "linmu_qwen3"
    linmu: dict | None = None


@register
class LinmuQwen3ForCausalLM(LinmuModel, Qwen3ForCausalLM):
    config_class = LinmuQwen3Config
    config: LinmuQwen3Config
    auto_class = "AutoModelForCausalLM"
