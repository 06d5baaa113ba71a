"""How much of a teacher's attention each token gets from some of the others; and its attention in packed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from linmu_ops.compat import numbered

from .accelerate import accelerate_transformers
from .attention import attention_window
from .hooks import attention_modules, decoder_of

RECORDED = "linmu_recorded"
QUERIES_AT_ONCE = 256

_asking: dict[nn.Module, Tensor] = {}
_found: dict[nn.Module, Tensor] = {}
_lengths: dict[nn.Module, list[int]] = {}


def _recorded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    lengths = _lengths.get(module, [query.shape[2]])
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    asking = _asking[module].to(query.device).split(lengths, dim=1) if module in _asking else [None] * len(lengths)
    outputs, received = [], []
    for (q, k, v), asks in zip(parts, asking, strict=True):
        mask = _band(module, q) if module in _lengths else attention_mask
        if asks is not None:
            received.append(_summed(q, k, mask, kwargs.get("scaling") or q.shape[-1] ** -0.5, asks))
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    if received:
        _found[module] = torch.cat(received, dim=2)
    return torch.cat(outputs, dim=1), None


def _band(module: nn.Module, query: Tensor) -> Tensor | None:
    """The mask of a whole sequence; None where it is causal and no more."""
    length, window = query.shape[2], attention_window(module)
    if window is None or window >= length:
        return None
    places = torch.arange(length, device=query.device)
    apart = places[:, None] - places
    return ((apart >= 0) & (apart < window))[None, None]


AttentionInterface.register(RECORDED, _recorded_attention)


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """SDPA's, without padding that only padding sees: where nothing else is masked, a causal call needs no mask."""
    if _lengths:
        return None
    if attention_mask is not None and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
        attention_mask = None
    return sdpa_mask(*args, **{**kwargs, "attention_mask": attention_mask})


AttentionMaskInterface.register(RECORDED, _mask)


@torch.no_grad()
def _summed(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, asking: Tensor) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    per_head = query.new_zeros(key.shape[:3], dtype=torch.float32)
    for row in range(len(query)):
        for queries in asking[row].nonzero()[:, 0].split(QUERIES_AT_ONCE):
            per_head[row] += sum_attention(
                query[row], key[row], None if mask is None else mask[row % len(mask)], scale, queries
            )
    return per_head


def sum_attention(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, queries: Tensor) -> Tensor:
    """The attention (H, L) that each token gets from some queries of its row; `query`, `key` (H, L, P)."""
    logits = query[:, queries].float() @ key.float().mT * scale
    if mask is None:
        seen = torch.arange(key.shape[1], device=key.device) <= queries[:, None]
    else:
        seen = mask[:, queries, : key.shape[1]]
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).sum(1)


@contextmanager
def each_alone(teacher: Any, seq_idx: Tensor) -> Iterator[None]:
    """While open, the sequences of the one row that `teacher` is given do not see each other. Attention is computed for
    one after the other: no (L, L) mask is made. Layers that are linear already are told the sequences.

    Args:
        seq_idx: (1, L), their numbers, which differ from one to the next.
    """
    if len(seq_idx) != 1:
        raise ValueError(f"each_alone: seq_idx must be (1, L), got shape {tuple(seq_idx.shape)}")
    lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
    config, modules = decoder_of(teacher).config, attention_modules(teacher).values()
    before = config._attn_implementation
    _lengths.update(dict.fromkeys(modules, lengths))
    linear = [layer.linear_attn for layer in decoder_of(teacher).layers if hasattr(layer, "linear_attn")]
    numbers = numbered(seq_idx)
    told = [
        module.register_forward_pre_hook(lambda _, args, given: (args, {**given, "seq_idx": numbers}), with_kwargs=True)
        for module in linear
    ]
    try:
        config._attn_implementation = RECORDED
        # transformers' own functions for linear layers refuse sequences without CUDA packages; ours take them.
        with accelerate_transformers(teacher) if linear else nullcontext():
            yield
    finally:
        config._attn_implementation = before
        for handle in told:
            handle.remove()
        for module in modules:
            _lengths.pop(module, None)


def replace_recorded(module: nn.Module, change: Callable[[Tensor], Tensor], none: Tensor) -> None:
    """Put what `change` makes of it in the place of what was recorded of a layer, `none` where it has not run; nothing
    where it is not to be recorded."""
    if module in _asking:
        _found[module] = change(_found.get(module, none))


@contextmanager
def record_attention(teacher: Any, attentions: Sequence[nn.Module], asking: Tensor) -> Iterator[list[Tensor]]:
    """Record where some queries look while `teacher` runs once.

    The attention of these queries is computed in full, a few hundred at a time.

    Args:
        attentions: layers of the teacher.
        asking: (B, L) bool, the queries.

    Yields:
        A list that holds afterwards, for each of `attentions`, (B, H, L) float32: the sum over the row's queries of
        the attention that each token gets.
    """
    config = decoder_of(teacher).config
    before = config._attn_implementation
    found: list[Tensor] = []
    _asking.update(dict.fromkeys(attentions, asking))
    try:
        config._attn_implementation = RECORDED
        yield found
        found.extend(_found[attention] for attention in attentions)
    finally:
        config._attn_implementation = before
        for attention in attentions:
            del _asking[attention]
            _found.pop(attention, None)


def read_later(received: Sequence[Tensor], asking: Tensor) -> list[Tensor]:
    """For each token, how much later layers read of each layer's output.

    Args:
        received: what `record_attention` found at all layers, in their order.
        asking: its queries, (B, L).

    Returns:
        For each layer (B, L) float32: the mean over the later layers, each averaged over its heads, and over the output
        of the model, where the asking tokens themselves are read. At every layer the sum is the number of asking
        tokens.
    """
    later = [*(per_head.mean(1).to(asking.device) for per_head in received), asking.float()]
    return [torch.stack(later[layer + 1 :]).mean(0) for layer in range(len(received))]
