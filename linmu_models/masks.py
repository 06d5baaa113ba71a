"""What is left of attention masks where layers are linear: padding, and the positions that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from linmu_ops.nn.state import on_host

from .hooks import by_name, takes, tokens_of

# Where every layer is linear, the decoder's attention implementation has this name: no [L, L] mask is ever made.
LINEAR = "linmu"
_FIRST = {"PaliGemmaModel": 1}  # the position of a row's first token, of models that do not count from 0


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise RuntimeError("linmu: no layer of this model has attention; set_attn_implementation was bypassed")


def last_of_mask(mask: Tensor, length: int) -> Tensor:
    """The last part of a mask that grows with every step, copied: a view's strides would tell the length of the whole,
    for which a compiled step would be compiled again."""
    return mask[:, -length:].clone(memory_format=torch.contiguous_format)


def padding_mask(q_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return None if attention_mask is None else last_of_mask(attention_mask, q_length)


AttentionInterface.register(LINEAR, _no_attention)
AttentionMaskInterface.register(LINEAR, padding_mask)


def is_padding(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def place_by_mask(inner_model: nn.Module, decoder: nn.Module) -> list[RemovableHandle]:
    """Let rows that are padded, and have no positions, count them as `generate` does: without padding.

    Attention with rotary embeddings knows distances alone. Learned maps of rotated keys know positions.
    """
    if not hasattr(decoder, "rotary_emb"):
        return []  # its positions are added to embeddings, and are its own affair
    # A model that finds positions of images leaves out padding itself, where there are any.
    own = hasattr(inner_model, "get_rope_index")
    modules = {decoder} if own else {inner_model, decoder}
    return [module.register_forward_pre_hook(_with_places, with_kwargs=True) for module in modules]


def _with_places(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = by_name(module, args, kwargs)
    mask, tokens = given.get("attention_mask"), tokens_of(given)
    if given.get("position_ids") is not None or tokens is None or not isinstance(mask, Tensor) or not is_padding(mask):
        return None
    if not takes(module, "position_ids"):
        return None
    if on_host(mask) and bool(mask.all()):
        return None
    places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :] + _FIRST.get(type(module).__name__, 0)
    return args, {**kwargs, "position_ids": places.to(tokens.device)}


def padding_of(inputs: Mapping[str, Any], length: int) -> Tensor | None:
    """(B, L) bool, False at padding, of one call's `length` tokens; None where a call has no such mask."""
    mask = inputs.get("linmu_padding", inputs.get("attention_mask"))
    return mask[:, -length:].bool() if is_padding(mask) and mask.shape[1] >= length else None


def read_padding(inputs: Mapping[str, Any], batch: int, length: int) -> Tensor | None:
    """(B, L) bool, False at padding, of one call's `length` tokens; None where there is none.

    Raises:
        ValueError: the mask is not (B, L), or longer with a cache; or it holds other values than 0 and 1.
    """
    mask = inputs.get("linmu_padding", inputs.get("attention_mask"))
    if mask is not None and not is_padding(mask):
        got = f"a {type(mask).__name__}" if not isinstance(mask, Tensor) else f"{mask.ndim} dimensions"
        raise ValueError(
            "linmu: attention_mask must be (B, L), 0 at padding: a block has no other mask, and sees every earlier "
            f"token of its row, got {got}"
        )
    if mask is not None and (len(mask) != batch or mask.shape[1] < length):
        raise ValueError(
            f"linmu: attention_mask must be (B, L) = ({batch}, {length}), or longer with a cache, got shape "
            f"{tuple(mask.shape)}"
        )
    if mask is not None and on_host(mask):
        odd = mask[(mask != 0) & (mask != 1)]
        if len(odd):
            raise ValueError(
                "linmu: attention_mask must be 0 or 1; the sequences of a row are told by position_ids that start "
                f"anew, or by seq_idx, got {odd.max().item()}"
            )
    padding = None if mask is None else mask[:, -length:].bool()
    # Elsewhere to ask would be to wait.
    if padding is not None and on_host(padding) and padding.all():
        padding = None
    return padding
