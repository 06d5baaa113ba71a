"""Every other model of transformers for images and text: what its family would say is found, and checked.

A type's classes are made when they are first asked for, as attributes of this module: `LinmuGotOcr2Config` and
`LinmuGotOcr2ForConditionalGeneration` for the type `got_ocr2`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from linmu_models.auto import register_auto
from linmu_models.layout import Placeholders, VisualUnit, grids_to_units
from linmu_models.modeling import FAMILIES, LinmuModel

TOKENS = ("token_id", "token_index")


class LinmuGeneric(LinmuModel):
    """A student of a family without an adapter. Its configuration's field `linmu` has the facts that were found."""

    facts: ClassVar[Mapping[str, bool]] = {}

    @classmethod
    def layer_facts(cls, config: Any, index: int) -> Mapping[str, bool]:
        found = dict((getattr(config, "linmu", None) or {}).get("facts") or {})
        if index in found.pop("unrotated", ()):
            found["rotates"] = False
        if index in found.pop("together", ()):
            found["causal_windows"] = False
        return found

    @property
    def inner_model(self) -> nn.Module:
        inner = getattr(self, "model", None)
        return inner if isinstance(inner, nn.Module) else self

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        """Grids, where the inputs have them. Else each run of placeholders is a square, or a row."""
        seen: set[int] = set()
        merge = getattr(getattr(self.config, "vision_config", None), "spatial_merge_size", None)
        for kind in ("image", "video"):
            token = placeholder(self.config, kind)
            if token is None or token in seen:
                continue
            seen.add(token)
            mask = self.placeholder_mask(inputs, token)
            grids = inputs.get(f"{kind}_grid_thw")
            units = [] if grids is None or not merge else grids_to_units(grids, merge)
            if sum(unit.tokens for unit in units) != mask.sum():
                units = [VisualUnit.of_square(n) for row in mask for n in _runs(row)]
            yield Placeholders(mask, units)


def placeholder(config: Any, kind: str) -> int | None:
    """The token in whose place an image's, or a video's, features stand; None where no field names it."""
    for name in TOKENS:
        value = getattr(config, f"{kind}_{name}", None)
        if isinstance(value, int) and value >= 0:
            return value
    return None


def _runs(row: np.ndarray) -> list[int]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
    return (edges[1::2] - edges[::2]).tolist()


def types() -> list[str]:
    """Model types for images and text that have no adapter."""
    return [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in FAMILIES]


@functools.cache
def family(model_type: str) -> type[LinmuGeneric]:
    """The student's class of such a type, made at the first call.

    Raises:
        ImportError: transformers cannot load the type's class here.
    """
    config_class = CONFIG_MAPPING[model_type]
    teacher: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    name = _name(model_type)
    config = type(
        f"{name}Config", (config_class,),
        {"model_type": f"linmu_{model_type}", "linmu": None, "__module__": __name__,
         "__annotations__": {"linmu": "dict | None"}},
    )  # fmt: skip
    values = {"config_class": config, "__module__": __name__, "__annotations__": {"config": config}}
    made: type[LinmuGeneric] = type(f"{name}ForConditionalGeneration", (LinmuGeneric, teacher), values)
    globals()[config.__name__], globals()[made.__name__] = config, made
    register_auto(made)
    return made


def _name(model_type: str) -> str:
    return f"Linmu{CONFIG_MAPPING_NAMES[model_type].removesuffix('Config')}"


def __getattr__(name: str) -> Any:
    for model_type in types():
        if name in (f"{_name(model_type)}Config", f"{_name(model_type)}ForConditionalGeneration"):
            family(model_type)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_lazily() -> None:
    """Make the configurations of saved students known to `AutoConfig`, without importing what they are made of."""
    import sys

    for model_type in types():
        ours = f"linmu_{model_type}"
        CONFIG_MAPPING._mapping[ours] = f"{_name(model_type)}Config"
        CONFIG_MAPPING._modules[model_type_to_module_name(ours)] = sys.modules[__name__]
