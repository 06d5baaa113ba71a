"""A LinMU model's configuration: its field `linmu` (all others are its teacher's), and the Auto class that loads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from linmu_ops.nn import PRESETS, ExactConfig, MMATEConfig

FORMAT = 3
# The first format in which each block was what it is.
SINCE = {"MMATE": 2, "ExactMMATE": 3}
# What the field calls the blocks, by their options.
BLOCKS: dict[str, type[MMATEConfig | ExactConfig]] = {"MMATE": MMATEConfig, "ExactMMATE": ExactConfig}


def linmu_field(options: MMATEConfig | ExactConfig, keep_attention: Iterable[int], layers: int) -> dict[str, Any]:
    """Make the field `linmu`, which JSON can hold.

    Args:
        options: of the block.
        keep_attention: decoder layers that stay quadratic; negative ones count from the end.
        layers: how many decoder layers there are.

    Raises:
        ValueError: a layer that does not exist.
    """
    kept = _kept_layers(keep_attention, -layers, layers)
    block = next(name for name, kind in BLOCKS.items() if isinstance(options, kind))
    layers_kept = sorted({i % layers for i in kept})
    return {"format": FORMAT, "block": block, "options": dataclasses.asdict(options), "keep_attention": layers_kept}


def _kept_layers(value: Any, low: int, layers: int) -> list[int]:
    """`keep_attention` as a list; ValueError where it holds anything but layers in [low, layers)."""
    rule = f"layers in [{low}, {layers})"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"linmu: keep_attention must hold {rule}, got {value!r}")
    kept = list(value)
    for index in kept:
        if not isinstance(index, Integral) or isinstance(index, bool) or not low <= int(index) < layers:
            raise ValueError(f"linmu: keep_attention must hold {rule}, got {index!r}")
    return [int(index) for index in kept]


def parse_options(options: MMATEConfig | ExactConfig | Mapping[str, Any]) -> MMATEConfig | ExactConfig:
    """The options of a block, from what `convert` takes.

    Args:
        options: a config, which is returned as it is; or a dict (as JSON gives it) of options that differ from those of
            its `preset`. The preset is "exact" where the dict names none.

    Raises:
        ValueError: the preset or an option is unknown.
    """
    if isinstance(options, MMATEConfig | ExactConfig):
        return options
    if not isinstance(options, Mapping):
        named = f'; a preset has the form {{"preset": {options!r}}}' if isinstance(options, str) else ""
        raise ValueError(f"linmu: options must be an MMATEConfig, an ExactConfig or a dict, got {options!r}{named}")
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    preset = changes.pop("preset", "exact")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"linmu: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    _check_known(changes, type(PRESETS[preset]), ("preset",))
    return dataclasses.replace(PRESETS[preset], **changes)


def _check_known(options: Mapping[str, Any], kind: type[MMATEConfig | ExactConfig], others: tuple[str, ...]) -> None:
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(map(str, set(options) - known))
    if unknown:
        names = ", ".join([*others, *sorted(known)])
        raise ValueError(f"linmu: options must be among {names}, got {', '.join(unknown)}")


def read_linmu(config: PreTrainedConfig) -> tuple[MMATEConfig | ExactConfig, frozenset[int]]:
    """Read the field `linmu`: (options of the block, layers that keep attention).

    Raises:
        ValueError: there is no such field, it has another format, or a part of it is wrong.
    """
    field = getattr(config, "linmu", None)
    if not field:
        raise ValueError(
            f"linmu: {type(config).__name__}.linmu must be set, got {field!r}; "
            "convert a teacher with linmu_models.convert"
        )
    if not isinstance(field, Mapping):
        raise ValueError(f"linmu: {type(config).__name__}.linmu must be a dict, got {field!r}")
    number = field.get("format", FORMAT)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"linmu: format must be a number >= 1, got {number!r}")
    if not min(SINCE.values()) <= number <= FORMAT:
        todo = "update linmu" if number > FORMAT else "convert the teacher again: one block with all options became two"
        raise ValueError(f"linmu: the model's format must be {FORMAT}, got {number}; {todo}")
    names = ("format", "block", "options", "keep_attention", "facts")
    unknown = sorted(map(str, set(field) - set(names)))
    if unknown:
        raise ValueError(f"linmu: fields must be among {', '.join(names)}, got {', '.join(unknown)}")
    block, options = field.get("block", "ExactMMATE"), field.get("options", {})
    if not isinstance(block, str) or block not in BLOCKS:
        raise ValueError(f"linmu: block must be one of {', '.join(BLOCKS)}, got {block!r}")
    if number < SINCE[block]:
        todo = f"convert the teacher again: {block} became another block"
        raise ValueError(f"linmu: the model's format must be {SINCE[block]}, got {number}; {todo}")
    if not isinstance(options, Mapping):
        raise ValueError(f"linmu: options must be a dict, got {options!r}")
    layers = config.get_text_config(decoder=True).num_hidden_layers
    _check_known(options, BLOCKS[block], ())
    _check_facts(field.get("facts", {}), layers)
    return BLOCKS[block](**options), frozenset(_kept_layers(field.get("keep_attention", ()), 0, layers))


def _check_facts(facts: Any, layers: int) -> None:
    """What the generic adapter found: whether channels turn in pairs, and layers that turn none, or where tokens of an
    image see each other."""
    names = ("interleaved_rotary", "unrotated", "together")
    if not isinstance(facts, Mapping) or set(facts) - set(names):
        raise ValueError(f"linmu: facts must be a dict of {', '.join(names)}, got {facts!r}")
    if not isinstance(facts.get("interleaved_rotary", False), bool):
        raise ValueError(f"linmu: interleaved_rotary must be a bool, got {facts['interleaved_rotary']!r}")
    for name in names[1:]:
        kept = facts.get(name, [])
        if not isinstance(kept, list) or any(type(i) is not int or not 0 <= i < layers for i in kept):
            raise ValueError(f"linmu: {name} must hold layers in [0, {layers}), got {kept!r}")


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration, linear or not, takes images; else it is text-only."""
    return type(config) in AutoModelForImageTextToText._model_mapping


def auto_class(config: PreTrainedConfig) -> type[Any]:
    """The Auto class that loads a model of this configuration."""
    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
