"""Makes one row without padding of a padded batch. To a model each of its sequences is what it is alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from linmu_models.chat import IGNORE

Batch = dict[str, Tensor]

# Teachers whose pixels follow one another whatever the rows, and whose attention is causal: an image's too.
PACKABLE = frozenset({
    "llama", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava", "llava_next", "llava_onevision",
    "internvl", "mistral3", "video_llama_3", "qwen3_5", "qwen3_5_text",
})  # fmt: skip
_PER_TOKEN = ("input_ids", "labels", "mm_token_type_ids")


def check_packable(config: PreTrainedConfig) -> None:
    """Whether rows of several sequences can be shown to a teacher.

    Raises:
        ValueError: its family is not one of `PACKABLE`.
    """
    if config.model_type not in PACKABLE:
        raise ValueError(
            f"data.packing must be false for a {config.model_type} teacher, whose images must come row by row or are "
            "not seen causally, or whose rows of several sequences nobody has tried; got true"
        )


def pack(batch: Batch, core: nn.Module) -> Batch:
    """One row of all the sequences of a batch, in their order.

    Args:
        batch: padded; `input_ids`, `attention_mask`, `labels` (B, L) and what else the model takes: tensors of images
            and videos one after the other.
        core: the inner model, which says where a sequence's tokens are where that is no plain count.

    Returns:
        `input_ids` and `labels` (1, n) and so on, without the first label of each sequence, which nothing predicts;
        `seq_idx` (1, n) int32, the sequence's number; `position_ids` (1, n), or (4, 1, n) where the model's have a
        time, a height and a width: these after a plain count. What is not of tokens stays as it is.

    Raises:
        ValueError: a tensor has a value for each token, and this does not know what it is.
    """
    real = batch["attention_mask"].bool()
    for name, value in batch.items():
        if value.shape == real.shape and name not in (*_PER_TOKEN, "attention_mask"):
            raise ValueError(f"data.packing must be false for a model that takes {name}, one for each token")
    labels = batch["labels"].clone()
    labels[torch.arange(len(real)), real.int().argmax(1)] = IGNORE
    packed = {name: value for name, value in batch.items() if name != "attention_mask"}
    for name in _PER_TOKEN:
        if name in batch:
            packed[name] = (labels if name == "labels" else batch[name])[real][None]
    lengths = real.sum(1)
    numbers = torch.arange(len(real), device=real.device, dtype=torch.int32)
    packed["seq_idx"] = numbers.repeat_interleave(lengths)[None]
    places = (real.cumsum(1) - 1)[real][None]
    make = getattr(core, "compute_3d_position_ids", None)
    if make is None:
        return {**packed, "position_ids": places}
    names: Any = inspect.signature(make).parameters
    found = make(**{name: batch.get(name) for name in names})
    found = places.expand(3, 1, -1) if found is None else found[:, real][:, None]
    return {**packed, "position_ids": torch.cat((places[None], found.to(places)))}


def real_tokens(batch: Batch) -> Tensor:
    """(B, L) bool, False at padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
