"""A teacher that keeps no more of its keys and values than a student keeps of everything.

It is what a student has to beat: the simplest way to make a trained model's memory constant is to forget. It keeps the
first tokens, which attention needs (StreamingLLM, https://arxiv.org/abs/2309.17453), and the most recent ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from linmu_models.cache import cache_bytes, output_cache
from linmu_models.hooks import attention_modules

from .speed import text_prompt

EQUAL_MEMORY = "teacher, equal memory"  # what such a teacher is called in tables
SINKS = 4
_NAME = "linmu_limited"
_BLOCK = 512  # queries at once
_LENGTHS = (1024, 2048)


def _limited_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention to the first `SINKS` tokens of a row and to its last ones, `module.linmu_tokens` in all.

    Keys that are too old are passed over, not dropped: what is left sees what it would see in a cache that had dropped
    them.
    """
    tokens, count, length = cast(int, module.linmu_tokens), query.shape[2], key.shape[2]
    sinks, recent = min(SINKS, tokens - 1), max(tokens - SINKS, 1)
    real = None if attention_mask is None else attention_mask[:, 0].any(1)  # (B, L)
    is_sink = (torch.arange(length, device=key.device) < sinks)[None]
    if real is not None:
        is_sink = real & (real.cumsum(1) <= sinks)
    first = int(is_sink.any(0).nonzero()[-1]) + 1 if sinks and bool(is_sink.any()) else 0
    outputs = []
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        at = torch.arange(start, stop, device=key.device) + length - count
        last = length if attention_mask is not None else length - count + stop
        low = max(int(at[0]) - recent + 1, 0)
        columns = torch.arange(low, last, device=key.device)
        if low > 0 and first:
            columns = torch.cat([torch.arange(min(first, low), device=key.device), columns])
        seen = (columns > at[:, None] - recent)[None] | is_sink[:, None, columns]
        if attention_mask is None:
            seen = seen & (columns <= at[:, None])
        else:
            # Padding sees itself, or its output would be no number.
            seen = seen & attention_mask[:, 0, start:stop, columns] | (columns == at[:, None])
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, columns], value[:, :, columns], seen[:, None], dropout,
                scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
            )
        )  # fmt: skip
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _limited_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def limited(teacher: PreTrainedModel, tokens: int) -> Iterator[None]:
    """While open, each attention layer of the teacher sees the first and the most recent tokens, so many in all.

    Raises:
        ValueError: `tokens` is less than 1.
    """
    if tokens < 1:
        raise ValueError(f"limited: tokens must be at least 1, got {tokens}")
    modules: list[Any] = list(attention_modules(teacher).values())
    configs = {id(module.config): module.config for module in modules}
    before = {number: config._attn_implementation for number, config in configs.items()}
    try:
        for module in modules:
            module.linmu_tokens = tokens
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for module in modules:
            del module.linmu_tokens
        for number, config in configs.items():
            config._attn_implementation = before[number]


@torch.no_grad()
def kept_bytes(model: PreTrainedModel, tokenizer: Any, length: int) -> int:
    """The bytes of what a model keeps of a prompt of `length` tokens."""
    inputs = text_prompt(model, tokenizer, length)
    out = cast(GenerationMixin, model).generate(
        **inputs, max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
    )  # fmt: skip
    return cache_bytes(output_cache(out))


def equal_tokens(teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: Any) -> int:
    """Of how many tokens the teacher's cache is as large as what the student keeps; at least 1.

    What a hybrid teacher keeps beside keys and values is taken off. Of a student that keeps layers of attention it is
    what it keeps of 2048 tokens.
    """
    short, long = _LENGTHS
    less, more = (kept_bytes(teacher, tokenizer, length) for length in _LENGTHS)
    each = (more - less) // (long - short)
    return max(1, (kept_bytes(student, tokenizer, long) - (less - each * short)) // each)
