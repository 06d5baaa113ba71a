"""Makes a student's configuration known to every Auto class of transformers that knows its teacher's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
    video_processing_auto,
)

from .attention import HoldsBlocks
from .modeling import FAMILIES, LinmuModel

# What makes a model's inputs, by the class of its configuration.
_INPUTS = (
    feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
    image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    processing_auto.PROCESSOR_MAPPING,
    tokenization_auto.TOKENIZER_MAPPING,
    video_processing_auto.VIDEO_PROCESSOR_MAPPING,
)


def teacher_config(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class of transformers that a student's configuration extends."""
    return next(c for c in config_class.__mro__ if c.__module__.startswith("transformers."))


def auto_models(config_class: type[PreTrainedConfig]) -> Iterator[tuple[type[Any], type[Any]]]:
    """(Auto class, the class that it makes) for each Auto class of models that knows a configuration."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and config_class in mapping:
            yield auto, mapping[config_class]


class _Inner(LinmuModel):
    """A family's model without its head."""

    auto_class = "AutoModel"

    @classmethod
    def can_generate(cls) -> bool:
        return False

    @property
    def inner_model(self) -> nn.Module:
        return self


def register(model_class: type[Any]) -> type[Any]:
    """Make a family known: to `convert` by its teacher's model type, to transformers' Auto classes by its own."""
    config_class = model_class.config_class
    FAMILIES[config_class.model_type.removeprefix("linmu_")] = model_class
    register_auto(model_class)
    return model_class


def register_auto(model_class: type[Any]) -> None:
    """Make a family's student known to each Auto class that knows its teacher: models, with whatever head transformers
    has for the teacher, processors and tokenizers."""
    config_class = model_class.config_class
    theirs = teacher_config(config_class)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto, made in auto_models(theirs):
        # Some heads belong to a model around the teacher, with a configuration of its own.
        if issubclass(theirs, made.config_class or ()):
            auto.register(config_class, _student_of(made, model_class, auto), exist_ok=True)
    # Through the mappings' own index: to register a class would be to import them all, some of which need torchvision.
    for mapping in _INPUTS:
        mapping._reverse_config_mapping.setdefault(config_class.__name__, theirs.model_type)
    names, wrong = (
        tokenization_auto.TOKENIZER_MAPPING_NAMES,
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    )
    if theirs.model_type in names:
        names.setdefault(config_class.model_type, names[theirs.model_type])
    if theirs.model_type in wrong:
        wrong.add(config_class.model_type)


def _student_of(teacher: type[Any], family: type[Any], auto: type[Any]) -> type[Any]:
    """The student's class in the place of `teacher`: the family's own, or one made here, beside it in its module."""
    if issubclass(family, teacher):
        return family
    name, module = f"Linmu{teacher.__name__}", sys.modules[family.__module__]
    if name not in vars(module):
        values: dict[str, Any] = {"config_class": family.config_class, "__module__": family.__module__}
        if auto is modeling_auto.AutoModel:
            values |= {"placeholders": family.placeholders, "facts": family.facts, "layer_facts": family.layer_facts}
            made = type(name, (_Inner, teacher), values)
        else:
            # Its body is what AutoModel makes of the configuration.
            made = type(name, (HoldsBlocks, teacher), values)
        setattr(module, name, made)
    return getattr(module, name)
