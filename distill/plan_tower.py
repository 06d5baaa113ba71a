"""The vision tower in a plan: it runs on tensors without values, and on the sizes of images, which have values."""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from .live import LiveBytes
from .teacher import MEDIA, Medium

_FEW = 2  # layers of the tower that are run: nothing is derived through it, so that more take no more
_COUNTED = "linmu_counted"
_products: list[int] = []  # FLOPs of attention


class _RealIndices(TorchDispatchMode):
    """Inside a `FakeTensorMode`, what follows from real tensors alone stays real: a tower is divided as the sizes of
    its images say."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, FakeTensor) for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)


def _counted_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The shape of what attention gives. Its two products are counted, and not computed."""
    _products.append(2 * query[..., 0].numel() * key.shape[2] * (query.shape[3] + value.shape[3]))
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format), None


AttentionInterface.register(_COUNTED, _counted_attention)


def _sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Patches along each side of a token, and the sides of a patch: in pixels, and in frames."""
    vision = config.vision_config
    return (
        getattr(vision, "spatial_merge_size", 1), getattr(vision, "patch_size", 14),
        getattr(vision, "temporal_patch_size", 1),
    )  # fmt: skip


def frame(pixels: int, config: PreTrainedConfig) -> tuple[int, int]:
    """The height and the width, in tokens, of a frame of so many pixels, near to a square."""
    merge, patch, _ = _sizes(config)
    tokens = max(1, pixels // (patch * merge) ** 2)
    height = math.isqrt(tokens)
    return height, tokens // height


def video(frames: int, height: int, width: int, config: PreTrainedConfig) -> dict[str, Tensor]:
    """What a model is given beside the tokens of a video of so many. Pixels are on the meta device."""
    merge, patch, deep = _sizes(config)
    medium = MEDIA[1]
    return {
        medium.pixels: torch.empty(frames * height * width * merge**2, 3 * deep * patch**2, device="meta"),
        medium.grid: torch.tensor([[frames, height * merge, width * merge]]),
    }


def of_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, of a batch."""
    found = {medium.pixels: batch[medium.pixels].to("meta") for medium in MEDIA if medium.pixels in batch}
    return found | {medium.grid: batch[medium.grid] for medium in MEDIA if medium.grid in batch}


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


def _features(model: PreTrainedModel, medium: Medium, vision: Mapping[str, Tensor], attention: str) -> Any:
    """What the tower makes of one kind of medium: None where there is none of it, and of towers that do not take the
    sizes of images as a grid, or ask for a value.

    Args:
        attention: the name of what computes the tower's.
    """
    core: Any = model.model
    make = getattr(core, medium.features, None)
    if not {medium.pixels, medium.grid} <= set(vision) or make is None:
        return None
    if medium.grid not in inspect.signature(make).parameters:
        return None
    towers = [module.config for module in core.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in towers]
    for config in towers:
        config._attn_implementation = attention
    try:
        with _RealIndices():
            return make(vision[medium.pixels], vision[medium.grid], return_dict=True).pooler_output
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    finally:
        for config, kind in zip(towers, before, strict=True):
            config._attn_implementation = kind


def encode(model: PreTrainedModel, vision: Mapping[str, Tensor], live: LiveBytes, attention: str) -> list[Tensor]:
    """What a model's call holds of images and videos while its decoder runs. What the tower holds is counted apart.

    Args:
        attention: the name of what computes the tower's.
    """
    held = []
    for medium in MEDIA:
        with live.apart():
            found = _features(model, medium, vision, attention)
        if found is not None:
            held.append(torch.cat(list(found)))
    return held


def flops(model: PreTrainedModel, vision: Mapping[str, Tensor]) -> int:
    """Of the tower's products on what it is given. Called in a `FakeTensorMode`."""
    _products.clear()
    with LiveBytes() as live, torch.no_grad():
        for medium in MEDIA:
            _features(model, medium, vision, _COUNTED)
    return live.flops + sum(_products)


def parts(config: PreTrainedConfig, small: PreTrainedConfig) -> Iterator[tuple[int, PreTrainedConfig]]:
    """Configurations with towers of a layer or two, and how often each counts: together they have the FLOPs of the
    whole tower, whose layers are alike, but for those that attend to more than windows.

    Args:
        small: the same with few decoder layers.
    """
    vision: Any = config.vision_config
    if not _is_cut(vision):
        yield 1, small
        return
    far = len([i for i in getattr(vision, "fullatt_block_indexes", None) or [] if i < vision.depth])
    for times, depth, which in ((2 - vision.depth, 1, []), (vision.depth - far - 1, 2, []), (far, 2, [1])):
        if times:
            part = copy.deepcopy(small)
            part.vision_config.depth = depth
            if far:
                part.vision_config.fullatt_block_indexes = which
            yield times, part


def _is_cut(vision: Any) -> bool:
    """Whether a tower's first layers alone give what all give."""
    return hasattr(vision, "depth") and not hasattr(vision, "deepstack_visual_indexes")


def cut(config: PreTrainedConfig) -> None:
    """Leave a tower its first layers alone, in place, where all give the same."""
    vision: Any = getattr(config, "vision_config", None)
    if _is_cut(vision):
        vision.depth = min(vision.depth, _FEW)
