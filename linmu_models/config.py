"""What a LinMU model keeps in its configuration, beside everything its teacher kept: the field `linmu`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from transformers import PreTrainedConfig

from linmu_ops.nn import MMATEConfig
from linmu_ops.nn.config import PRESETS

FORMAT = 1


def linmu_field(mmate: MMATEConfig, keep_attention: Iterable[int], layers: int) -> dict[str, Any]:
    """The JSON-able `linmu` field.

    Args:
        mmate: options of the M-MATE block.
        keep_attention: decoder layers that stay quadratic; negative ones count from the end.
        layers: how many decoder layers there are.

    Raises:
        ValueError: a layer that does not exist.
    """
    kept = _kept_layers(keep_attention, -layers, layers)
    return {"format": FORMAT, "mmate": dataclasses.asdict(mmate), "keep_attention": sorted({i % layers for i in kept})}


def _kept_layers(value: Any, low: int, layers: int) -> list[int]:
    """`keep_attention` as a list; ValueError where it holds anything but layers in [low, layers)."""
    rule = f"layers in [{low}, {layers})"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"linmu: keep_attention must hold {rule}, got {value!r}")
    kept = list(value)
    for index in kept:
        if not isinstance(index, Integral) or isinstance(index, bool) or not low <= index < layers:
            raise ValueError(f"linmu: keep_attention must hold {rule}, got {index!r}")
    return [int(index) for index in kept]


def parse_mmate(options: MMATEConfig | Mapping[str, Any]) -> MMATEConfig:
    """`options`, or of a (JSON) dict of those that differ from the ones of `preset`, "exact" where it is not given.

    Raises:
        ValueError: an unknown preset or option.
    """
    if isinstance(options, MMATEConfig):
        return options
    if not isinstance(options, Mapping):
        raise ValueError(f"linmu: M-MATE options must be an MMATEConfig or a dict, got {options!r}")
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    preset = changes.pop("preset", "exact")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"linmu: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    known = {f.name for f in dataclasses.fields(MMATEConfig)}
    unknown = sorted(map(str, set(changes) - known))
    if unknown:
        names = ", ".join(["preset", *sorted(known)])
        raise ValueError(f"linmu: M-MATE options must be among {names}, got {', '.join(unknown)}")
    return dataclasses.replace(PRESETS[preset], **changes)


def read_linmu(config: PreTrainedConfig) -> tuple[MMATEConfig, frozenset[int]]:
    """(M-MATE options, layers that keep attention) of a LinMU configuration.

    Raises:
        ValueError: there is no `linmu` field, a newer format wrote it, or a part of it is not what it must be.
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
    if number > FORMAT:
        raise ValueError(f"linmu: the model's format must be <= {FORMAT}, got {number}; update linmu")
    unknown = sorted(map(str, set(field) - {"format", "mmate", "keep_attention"}))
    if unknown:
        raise ValueError(f"linmu: fields must be among format, mmate, keep_attention, got {', '.join(unknown)}")
    mmate = field.get("mmate", {})
    if not isinstance(mmate, Mapping):
        raise ValueError(f"linmu: mmate must be a dict of options, got {mmate!r}")
    layers = config.get_text_config(decoder=True).num_hidden_layers
    # What an older version did not know is off in the preset "paper".
    options = parse_mmate({"preset": "paper", **mmate})
    return options, frozenset(_kept_layers(field.get("keep_attention", ()), 0, layers))
