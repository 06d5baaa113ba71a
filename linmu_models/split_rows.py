"""Rows that are split over processes: the decoder of a LinMU model works on this process's slab of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linmu_ops import TokenLayout
from linmu_ops.context_parallel import ContextParallel, SlabLayout

from .attention import LinmuAttention
from .hooks import decoder_of, tokens_of
from .layout import LinmuInputs
from .modeling import LinmuModel

# What a decoder is given of each token, and the dimension of the tokens.
_PER_TOKEN = {
    "input_ids": 1, "inputs_embeds": 1, "attention_mask": 1, "per_layer_inputs": 1, "position_ids": -1,
    "cache_position": 0, "seq_idx": 1,
}  # fmt: skip
_DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")  # Qwen3-VL's, of the visual tokens alone
# These read the length of the row off the positions that they are given.
_BY_LENGTH = ("dynamic", "longrope")


def check_splits(model: LinmuModel) -> None:
    """Raise ValueError where rows of a model cannot be split: a layer that sees other tokens has no block, or rotary
    embeddings depend on the length of the row."""
    decoder = decoder_of(model)
    for index, layer in enumerate(model.linmu_layers()):
        if not isinstance(getattr(layer, "self_attn", None), LinmuAttention):
            raise ValueError(
                f"linmu: every decoder layer must have a block where rows are split over processes, got layer {index} "
                "without one"
            )
    rope: Any = getattr(decoder.config, "rope_parameters", None) or {}
    every = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    if kinds := [kind for kind in (part.get("rope_type") for part in every) if kind in _BY_LENGTH]:
        raise ValueError(
            "linmu: rope_type must be one that does not depend on the length of a row where rows are split over "
            f"processes, got {kinds[0]!r}"
        )


@contextmanager
def split_rows(model: LinmuModel, context: ContextParallel) -> Iterator[None]:
    """While open, every process of a group calls `model` with the same whole rows, and its decoder works on this
    process's slab of them. What the inner model returns, its `last_hidden_state`, is of the slab.

    Vision towers and embeddings run on whole rows in each process.

    Args:
        model: of blocks alone.
        context: how rows are split.

    Raises:
        ValueError: the model's rows cannot be split; a call has a cache, rows of another length, or an input of each
            token that is not known.
    """
    check_splits(model)

    def slab(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, _linmu_slab(kwargs, context)

    # After the one that finds the layout, which the model has had from the start.
    handle = decoder_of(model).register_forward_pre_hook(slab, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def split_inputs(inputs: LinmuInputs, batch: int, context: ContextParallel) -> LinmuInputs:
    """What the blocks of a slab share, of what those of whole rows would."""
    layout = inputs.layout or TokenLayout([], [], batch, context.length)
    slab = SlabLayout(context, layout)
    padding = None if inputs.padding is None else slab.part(inputs.padding)
    seq_idx = None if inputs.seq_idx is None else slab.part(inputs.seq_idx)
    return dataclasses.replace(inputs, layout=slab, padding=padding, seq_idx=seq_idx, context=context)


def _linmu_slab(kwargs: dict[str, Any], context: ContextParallel) -> dict[str, Any]:
    found, linmu = slab_inputs(kwargs, context), kwargs.get("linmu")
    if linmu is None:
        raise ValueError("linmu: a decoder of split rows must be called by its model, which finds the layout, got none")
    return {**found, "linmu": split_inputs(linmu, len(tokens_of(kwargs)), context)}


def slab_inputs(kwargs: dict[str, Any], context: ContextParallel, whole: Sequence[str] = ()) -> dict[str, Any]:
    """Of what a decoder is given of whole rows, what it is given of a slab; what `whole` names stays as it is."""
    tokens = tokens_of(kwargs)
    if tokens is None:
        raise ValueError("linmu: a decoder of split rows must be given input_ids or inputs_embeds by name, got neither")
    if tokens.shape[1] != context.length:
        raise ValueError(f"linmu: rows must have L={context.length} tokens to be split, got {tokens.shape[1]}")
    if any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):
        raise ValueError("linmu: cache must be None where rows are split over processes, got one")
    if kwargs.get("use_cache"):
        raise ValueError("linmu: use_cache must be False where rows are split over processes, got True")
    found = {**kwargs, "use_cache": False}
    if kwargs.get("position_ids") is None:
        found["position_ids"] = torch.arange(context.length, device=tokens.device).expand(len(tokens), -1)
    for name, dim in _PER_TOKEN.items():
        value = found.get(name)
        if isinstance(value, Tensor) and name not in whole:
            found[name] = context.shard(value, dim % value.dim())
    if kwargs.get(_DEEPSTACK[0]) is not None:
        found |= _deepstack_of(kwargs, context)
    for name, value in found.items():
        if name not in (*_PER_TOKEN, *_DEEPSTACK) and isinstance(value, Tensor) and context.length in value.shape[:2]:
            raise ValueError(f"linmu: {name} must be None where rows are split over processes, got a tensor")
    return found


def _deepstack_of(kwargs: Mapping[str, Any], context: ContextParallel) -> dict[str, Any]:
    where = kwargs[_DEEPSTACK[0]]
    mine = torch.zeros_like(where, dtype=torch.bool)
    mine[:, context.start : context.stop] = True
    chosen = mine[where.bool()]
    return {
        _DEEPSTACK[0]: context.shard(where),
        _DEEPSTACK[1]: [each[chosen] for each in kwargs[_DEEPSTACK[1]] or ()],
    }
