"""The vision tower in a plan: it runs on tensors without values, and on the sizes of images, which have values."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from .live import LiveBytes

# What features of a kind are made of, and by.
_KINDS = (
    ("get_image_features", "pixel_values", "image_grid_thw"),
    ("get_video_features", "pixel_values_videos", "video_grid_thw"),
)
_FEW = 2  # layers of the tower that are run: nothing is derived through it, so that more take no more


class _RealIndices(TorchDispatchMode):
    """Inside a `FakeTensorMode`, what follows from real tensors alone stays real: a tower is divided as the sizes of
    its images say."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, FakeTensor) for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)


def video(frames: int, height: int, width: int, config: PreTrainedConfig) -> dict[str, Tensor]:
    """What a model is given beside the tokens of a video of so many. Pixels are on the meta device."""
    vision = config.vision_config
    merge, patch = getattr(vision, "spatial_merge_size", 1), getattr(vision, "patch_size", 14)
    values = 3 * getattr(vision, "temporal_patch_size", 1) * patch**2
    pixels = torch.empty(frames * height * width * merge**2, values, device="meta")
    return {
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[frames, height * merge, width * merge]]),
    }


def of_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, of a batch."""
    found = {name: batch[name].to("meta") for _, name, _ in _KINDS if name in batch}
    return found | {grid: batch[grid] for _, _, grid in _KINDS if grid in batch}


def on_device(vision: Mapping[str, Tensor], times: int = 1) -> dict[str, Tensor]:
    """The same so many times over, its pixels on the device. Called in a `FakeTensorMode`."""
    out = {}
    for name, value in vision.items():
        if value.is_meta:
            out[name] = torch.empty(len(value) * times, *value.shape[1:], dtype=value.dtype, device="cpu")
        else:
            with _disable_current_modes():
                out[name] = torch.cat([value] * times)
    return out


def encode(model: PreTrainedModel, vision: Mapping[str, Tensor], live: LiveBytes, attention: str) -> list[Tensor]:
    """What a model's call holds of images and videos while its decoder runs. What the tower holds is counted apart.

    Towers are run where they take the sizes of images as a grid, and ask for no value; of others nothing is counted.

    Args:
        attention: the name of what computes the tower's.
    """
    core: Any = model.model
    held = []
    for name, pixels, grid in _KINDS:
        make = getattr(core, name, None)
        if pixels not in vision or grid not in vision or make is None or grid not in inspect.signature(make).parameters:
            continue
        towers = [module.config for module in core.modules() if isinstance(module, PreTrainedModel)]
        before = [config._attn_implementation for config in towers]
        for config in towers:
            config._attn_implementation = attention
        try:
            with live.apart(), _RealIndices():
                found = make(vision[pixels], vision[grid], return_dict=True)
        except (DataDependentOutputException, DynamicOutputShapeException):
            continue
        finally:
            for config, kind in zip(towers, before, strict=True):
                config._attn_implementation = kind
        held.append(torch.cat(list(found.pooler_output)))
    return held


def cut(config: PreTrainedConfig) -> None:
    """Leave a tower its first layers alone, in place, where all give the same."""
    vision: Any = getattr(config, "vision_config", None)
    if hasattr(vision, "depth") and not hasattr(vision, "deepstack_visual_indexes"):
        vision.depth = min(vision.depth, _FEW)
