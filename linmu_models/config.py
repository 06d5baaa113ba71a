"""What a LinMU model keeps in its configuration, beside everything its teacher kept: the field `linmu`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
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
    kept = list(keep_attention)
    for index in kept:
        if not isinstance(index, int) or not -layers <= index < layers:
            raise ValueError(f"linmu: keep_attention must hold layers in [-{layers}, {layers}), got {index!r}")
    return {"format": FORMAT, "mmate": dataclasses.asdict(mmate), "keep_attention": sorted({i % layers for i in kept})}


def parse_mmate(options: MMATEConfig | Mapping[str, Any]) -> MMATEConfig:
    """`options`, or of a (JSON) dict of those that differ from the ones of `preset`, "exact" where it is not given.

    Raises:
        ValueError: an unknown preset or option.
    """
    if isinstance(options, MMATEConfig):
        return options
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    preset = changes.pop("preset", "exact")
    if preset not in PRESETS:
        raise ValueError(f"linmu: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    known = {f.name for f in dataclasses.fields(MMATEConfig)}
    unknown = sorted(set(changes) - known)
    if unknown:
        names = ", ".join(["preset", *sorted(known)])
        raise ValueError(f"linmu: M-MATE options must be among {names}, got {', '.join(unknown)}")
    return dataclasses.replace(PRESETS[preset], **changes)


def read_linmu(config: PreTrainedConfig) -> tuple[MMATEConfig, frozenset[int]]:
    """(M-MATE options, layers that keep attention) of a LinMU configuration.

    Raises:
        ValueError: there is no `linmu` field, or a newer format wrote it.
    """
    field = getattr(config, "linmu", None)
    if not field:
        raise ValueError(
            f"linmu: {type(config).__name__}.linmu must be set, got {field!r}; "
            "convert a teacher with linmu_models.convert"
        )
    if field.get("format", FORMAT) > FORMAT:
        raise ValueError(f"linmu: the model's format must be <= {FORMAT}, got {field['format']}; update linmu")
    # What an older version did not know is off in the paper's block.
    return parse_mmate({"preset": "paper", **field.get("mmate", {})}), frozenset(field.get("keep_attention", ()))
