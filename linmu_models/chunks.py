"""A prompt in chunks: the memory that a long video takes is that of a chunk."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linmu_ops import TokenLayout
from linmu_ops._layout_part import split
from linmu_ops.nn import ExactMMATE

from .attention import LinmuAttention
from .hooks import attention_modules, decoder_of
from .layout import LinmuInputs


def check_chunk(size: Any) -> int:
    """The size of a chunk, as `generate` is given it."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"linmu: prefill_chunk_size must be an integer >= 1, got {size!r}")
    return size


def chunk_ends(model: Any, layout: TokenLayout | None, length: int, size: int) -> list[int]:
    """Where the chunks of so many tokens end: each has `size` tokens, or fewer, so that no image or video is cut where
    a block cannot go on. It has more where that leaves no place to cut it."""
    allowed = np.ones(length + 1, dtype=bool)
    if layout is not None:
        blocks = [m for m in attention_modules(model).values() if isinstance(m, LinmuAttention)]
        for (_, *sizes), places in zip(layout.blocks.tolist(), split(layout.positions, layout.spans), strict=True):
            inside = np.zeros(length + 1, dtype=bool)
            inside[places.min() + 1 : places.max() + 1] = True
            for block in blocks:
                allowed &= ~inside | _may_be_cut(block, sizes, places, length)
    ends, at = [], 0
    while at < length:
        near = np.flatnonzero(allowed[at + 1 : at + size + 1])
        at += 1 + int(near[-1] if len(near) else np.flatnonzero(allowed[at + 1 :])[0])
        ends.append(at)
    return ends


def _may_be_cut(block: LinmuAttention, sizes: list[int], places: np.ndarray, length: int) -> np.ndarray:
    """(L + 1,) bool: before which tokens a layer may be called anew, as far as an image or video is concerned."""
    in_order = bool((places[1:] > places[:-1]).all())
    found = np.full(length + 1, in_order and isinstance(block, ExactMMATE) and block.shape.causal_windows)
    if in_order and isinstance(block, ExactMMATE) and not found.any():
        borders = block.windows.whole_frames(sizes[0])
        found[places[[t * math.prod(sizes[1:]) for t in borders]]] = True
    return found


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While the context is open, a module has another forward, on the instance, as accelerate's hooks have theirs."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextlib.contextmanager
def decoder_in_chunks(model: Any, size: int) -> Iterator[None]:
    """While the context is open, the decoder takes what it is given in chunks of about `size` tokens, one after the
    other, and returns what the last of them gives."""
    decoder = decoder_of(model)
    forward, names = decoder.forward, tuple(inspect.signature(type(decoder).forward).parameters)[1:]

    @functools.wraps(forward)
    def in_chunks(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = given.get("inputs_embeds") if given.get("inputs_embeds") is not None else given.get("input_ids")
        if tokens is None or tokens.shape[1] <= size:
            return forward(*args, **kwargs)
        if given.get("cache") is None and given.get("past_key_values") is None:
            raise ValueError("linmu: prefill_chunk_size must be None without a cache, got one")
        linmu = given.get("linmu") or LinmuInputs()
        if linmu.seq_idx is not None:
            raise ValueError("linmu: prefill_chunk_size must be None for rows of several sequences, got one")
        length, start, out = tokens.shape[1], 0, None
        for stop in chunk_ends(model, linmu.layout, length, size):
            out = None  # before the next chunk's are made
            out = forward(**{name: _chunk(name, given, value, start, stop, length) for name, value in given.items()})
            start = stop
        return out

    with _replaced(decoder, in_chunks):
        yield


def _chunk(name: str, given: Mapping[str, Any], value: Any, start: int, stop: int, length: int) -> Any:
    """A keyword of the decoder, for the tokens from `start` to `stop` of its `length`."""
    if isinstance(value, LinmuInputs):
        layout = None if value.layout is None else value.layout.part(start, stop)
        padding = None if value.padding is None else value.padding[:, start:stop]
        return LinmuInputs(layout, padding, None)
    if name == "deepstack_visual_embeds" and value is not None:  # of each layer, rows for all visual tokens
        mask = given["visual_pos_masks"]
        rows = (mask.flatten().cumsum(0).view_as(mask) - 1)[:, start:stop][mask[:, start:stop]]
        return [features[rows.to(features.device)] for features in value]
    if isinstance(value, Mapping):
        return {key: _chunk(name, given, one, start, stop, length) for key, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    if name == "position_ids":
        return value[..., start:stop]
    if name == "attention_mask":
        if value.ndim != 2:
            raise ValueError(
                "linmu: prefill_chunk_size must be None where attention is kept and its mask is made before, as with a "
                f"static cache, got a mask of {value.ndim} dimensions"
            )
        return value[:, : value.shape[1] - length + stop]
    if value.ndim == 1 and len(value) == length:
        return value[start:stop]
    return value[:, start:stop] if value.ndim > 1 and value.shape[1] == length else value


def vision_tower(model: Any) -> nn.Module | None:
    """The part that turns pixels into features; None where a family has another name for it."""
    found = (getattr(model.inner_model, name, None) for name in ("visual", "vision_tower", "vision_model"))
    return next((module for module in found if isinstance(module, nn.Module)), None)


@contextlib.contextmanager
def tower_in_chunks(model: Any, size: int) -> Iterator[None]:
    """While the context is open, the vision tower takes whole frames, of about `size` tokens at a time, as far as no
    frame sees another: those of (T, H, W) grids, and pictures of one size."""
    tower = vision_tower(model)
    if tower is None:
        yield
        return
    forward = tower.forward

    @functools.wraps(forward)
    def in_chunks(pixels: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        name = next((n for n in ("pixel_values", "hidden_states") if n in kwargs), None)
        pixels = kwargs.pop(name) if pixels is None and name is not None else pixels
        grids = kwargs.get("grid_thw")
        if isinstance(pixels, Tensor) and not args and isinstance(grids, Tensor):
            merge = kwargs.get("merge_sizes", getattr(tower, "spatial_merge_size", 1))
            parts = _grid_parts(pixels, kwargs, size, merge)
        elif isinstance(pixels, Tensor) and not args and pixels.ndim == 4 and "image_sizes" not in kwargs:
            parts = _picture_parts(pixels, kwargs, max(size // _patches(tower, pixels), 1))
        else:
            parts = []
        if len(parts) < 2:
            return forward(pixels, *args, **kwargs) if name is None else forward(*args, **{name: pixels}, **kwargs)
        return _joined([forward(part, **more) for part, more in parts], isinstance(grids, Tensor))

    with _replaced(tower, in_chunks):
        yield


def _grid_parts(pixels: Tensor, kwargs: dict[str, Any], size: int, merge: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """The rows of frames of grids, and their grids: about `size` tokens in each part."""
    grids = kwargs["grid_thw"].tolist()
    merges = merge.tolist() if isinstance(merge, Tensor) else [merge] * len(grids)
    runs: list[list[tuple[int, list[int]]]] = [[]]
    room = size
    for i, (frames, height, width) in enumerate(grids):
        each = height * width // merges[i] ** 2
        while frames:
            some = min(max(room // each, 0 if runs[-1] else 1), frames)
            if some:
                runs[-1].append((i, [some, height, width]))
            frames, room = frames - some, room - some * each
            if frames:
                runs.append([])
                room = size
    ends = np.cumsum([sum(t * h * w for _, (t, h, w) in run) for run in runs]).tolist()
    parts = []
    for run, start, stop in zip(runs, [0, *ends[:-1]], ends, strict=True):
        more = {**kwargs, "grid_thw": kwargs["grid_thw"].new_tensor([grid for _, grid in run])}
        if isinstance(merge, Tensor):
            more["merge_sizes"] = merge[[i for i, _ in run]]
        parts.append((pixels[start:stop], more))
    return parts


def _picture_parts(pixels: Tensor, kwargs: dict[str, Any], many: int) -> list[tuple[Tensor, dict[str, Any]]]:
    """So many pictures in each part."""

    def of(value: Any, part: slice) -> Any:
        return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == len(pixels) else value

    parts = [slice(start, start + many) for start in range(0, len(pixels), many)]
    return [(pixels[part], {name: of(value, part) for name, value in kwargs.items()}) for part in parts]


def _patches(tower: nn.Module, pixels: Tensor) -> int:
    """Of each picture (n, C, height, width)."""
    size: Any = getattr(getattr(tower, "config", None), "patch_size", 14)
    size = size if isinstance(size, int) else size[-1]
    return max(pixels.shape[-2] // size, 1) * max(pixels.shape[-1] // size, 1)


def _joined(outputs: list[Any], grids: bool) -> Any:
    """The outputs of all parts as one. Of grids that are merged, only the features that a model reads, as in
    transformers' own chunks."""

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if isinstance(values[0], (list, tuple)):
            return type(values[0])(joined(list(same)) for same in zip(*values, strict=True))
        return values[0]

    first = outputs[0]
    if isinstance(first, (Tensor, list, tuple)):
        return joined(outputs)
    unread = ("last_hidden_state", "hidden_states", "attentions") if grids and "pooler_output" in first else ()
    names = [name for name in first if name not in unread]
    return type(first)(**{name: joined([out[name] for out in outputs]) for name in names})
