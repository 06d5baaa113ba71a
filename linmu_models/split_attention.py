"""Rows that are split over processes, in a model that keeps its attention: each layer's heads are shared out.

A process works on its slab of the tokens, and of each attention on whole rows of its share of the heads (the split of
DeepSpeed-Ulysses). So all have the same work whatever a token sees, and masks are those of whole rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from linmu_ops.context_parallel import ContextParallel

from .accumulated_attention import replace_recorded
from .hooks import attention_modules, decoder_of
from .split_rows import slab_inputs

SPLIT = "linmu_split"
_PER_HEAD = ("position_bias", "s_aux")  # values of each head, of which a process would need its share


@dataclass
class _Open:
    context: ContextParallel
    attention: Callable[..., tuple[Tensor, Any]]
    mask: Callable[..., Tensor | None] | None
    ran: set[nn.Module] = field(default_factory=set)


_open: dict[nn.Module, _Open] = {}


def why_whole(model: Any) -> str | None:
    """Why rows of a model with attention cannot be split; None where they can."""
    decoder, modules = decoder_of(model), attention_modules(model)
    for index in range(len(decoder.layers)):
        if index not in modules:
            return f"layer {index} has no attention"
    kind = decoder.config._attn_implementation
    if kind != "sdpa":
        return f"its attention is {kind}, not sdpa"
    for index, module in modules.items():
        forward: Any = inspect.unwrap(type(module).forward)
        if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
            return f"layer {index} computes attention on its own, not by transformers' AttentionInterface"
    return None


@contextmanager
def split_attention(model: Any, context: ContextParallel) -> Iterator[None]:
    """While open, every process of a group calls `model` with the same whole rows, and its decoder works on this
    process's slab of them: so do its layers, and what the inner model returns.

    Vision towers and embeddings run on whole rows in each process. There are no gradients.

    Args:
        model: one for which `why_whole` knows no reason.
        context: how rows are split.

    Raises:
        ValueError: a call has a cache, rows of another length, or an input of each token that is not known.
        RuntimeError: a layer's attention was not called once.
    """
    decoder, modules = decoder_of(model), list(attention_modules(model).values())
    config, before = decoder.config, decoder.config._attn_implementation
    ours = _Open(context, AttentionInterface()[before], AttentionMaskInterface().get(before))

    def slab(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, slab_inputs(kwargs, context, whole=("attention_mask",))

    handle = decoder.register_forward_pre_hook(slab, with_kwargs=True)
    _open.update(dict.fromkeys(modules, ours))
    try:
        config._attn_implementation = SPLIT
        yield
    finally:
        config._attn_implementation = before
        handle.remove()
        for module in modules:
            del _open[module]
    if len(ours.ran) < len(modules):
        raise RuntimeError(
            f"linmu: each layer's attention must be called by transformers' AttentionInterface where rows are split, "
            f"got {len(ours.ran)} of {len(modules)}"
        )


def _mask(*args: Any, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """That of whole rows, whose heads are shared out."""
    ours = next(iter(_open.values()))
    return ours.mask and ours.mask(*args, q_length=ours.context.length, kv_length=ours.context.length, **kwargs)


@torch.no_grad()
def _split_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    ours = _open[module]
    context = ours.context
    for name in _PER_HEAD:
        if kwargs.get(name) is not None:
            raise ValueError(f"linmu: {name} must be None where rows are split over processes, got a tensor")
    ours.ran.add(module)
    heads, groups, width = query.shape[1], key.shape[1], value.shape[-1]
    shares = share_heads(heads, groups, context.size)
    query, key, value = to_heads(context, query, key, value)
    mine = shares[context.rank][0]
    if mine:
        mask = attention_mask
        if mask is not None and mask.dim() == 4 and mask.shape[1] == heads:
            mask = mask[:, mine.start : mine.stop]
        with _grouped(module, query.shape[1] // key.shape[1]):
            out = ours.attention(module, query, key, value, mask, **kwargs)[0]
    else:
        out = query.new_empty(len(query), context.length, 0, width)

    def to_slab(received: Tensor) -> Tensor:
        """Of (B, heads of this process, L), (B, H, tokens of this process)."""
        return to_tokens(context, received.transpose(1, 2)[..., None], shares)[..., 0].transpose(1, 2)

    replace_recorded(module, to_slab, none=query.new_empty(len(query), 0, context.length, dtype=torch.float32))
    return to_tokens(context, out, shares), None


AttentionInterface.register(SPLIT, _split_attention)
AttentionMaskInterface.register(SPLIT, _mask)


def share_heads(heads: int, groups: int, size: int) -> list[tuple[range, range]]:
    """For each process the heads of queries that it works on, and those of keys and values that these look at."""
    each, more = divmod(heads, size)
    ratio, first, shares = heads // groups, 0, []
    for rank in range(size):
        mine = range(first, first + each + (rank < more))
        shares.append((mine, range(mine.start // ratio, (mine.stop - 1) // ratio + 1) if mine else range(0)))
        first = mine.stop
    return shares


def to_heads(context: ContextParallel, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a slab (B, H or G, n, P), whole rows (B, h or g, L, P) of this process's share of the heads, in one exchange.

    Keys and values come once for each head of queries where not all of them are looked at by as many of these.
    """
    (batch, heads), groups = query.shape[:2], key.shape[1]
    shares = share_heads(heads, groups, context.size)
    parts = [
        [t[:, some.start : some.stop] for t, some in ((query, mine), (key, seen), (value, seen))]
        for mine, seen in shares
    ]
    mine, seen = shares[context.rank]
    sizes = [(len(mine), query.shape[-1]), (len(seen), key.shape[-1]), (len(seen), value.shape[-1])]
    came = context.exchange(
        torch.cat([t.reshape(-1) for part in parts for t in part]),
        [sum(t.numel() for t in part) for part in parts],
        [batch * n * sum(h * p for h, p in sizes) for n in context.lengths],
    )
    pieces = came.split([batch * n * h * p for n in context.lengths for h, p in sizes])
    query, key, value = (
        torch.cat(
            [piece.view(batch, h, n, p) for piece, n in zip(pieces[i::3], context.lengths, strict=True)], dim=2
        ).to(like.dtype)
        for i, ((h, p), like) in enumerate(zip(sizes, (query, key, value), strict=True))
    )
    ratio = heads // groups
    looked_at = [head // ratio - seen.start for head in mine]
    each = len(mine) // max(len(seen), 1)
    if looked_at != [i // each for i in range(each * len(seen))]:
        key, value = key[:, looked_at], value[:, looked_at]
    return query, key, value


def to_tokens(context: ContextParallel, t: Tensor, shares: Sequence[tuple[range, range]]) -> Tensor:
    """Of whole rows (B, L, h, P) of this process's heads, its slab (B, n, H, P) of all heads."""
    batch, width, n = len(t), t.shape[-1], context.stop - context.start
    sent = [part.reshape(-1) for part in t.split(list(context.lengths), dim=1)]
    of = [batch * n * len(mine) * width for mine, _ in shares]
    came = context.exchange(torch.cat(sent), [part.numel() for part in sent], of).split(of)
    pieces = [piece.view(batch, n, len(mine), width) for piece, (mine, _) in zip(came, shares, strict=True)]
    return torch.cat(pieces, dim=2)


@contextmanager
def _grouped(module: Any, ratio: int) -> Iterator[None]:
    """While open, a module has so many heads of queries for each of keys: transformers repeats keys by its number."""
    before = getattr(module, "num_key_value_groups", ratio)
    if before == ratio:
        yield
        return
    module.num_key_value_groups = ratio
    try:
        yield
    finally:
        module.num_key_value_groups = before
