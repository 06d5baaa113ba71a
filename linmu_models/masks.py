"""What is left of attention masks where layers are linear: padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

# Where every layer is linear, the decoder's attention implementation has this name: no [L, L] mask is ever made.
LINEAR = "linmu"


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
    if mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        odd = mask[(mask != 0) & (mask != 1)]
        if len(odd):
            raise ValueError(
                "linmu: attention_mask must be 0 or 1; the sequences of a row are told by position_ids that start "
                f"anew, or by seq_idx, got {odd.max().item()}"
            )
    padding = None if mask is None else mask[:, -length:].bool()
    # Elsewhere to ask would be to wait.
    if padding is not None and padding.device.type == "cpu" and not torch.compiler.is_compiling() and padding.all():
        padding = None
    return padding
