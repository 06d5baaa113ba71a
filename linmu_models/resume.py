"""A conversation that is kept in a file with the state after it, and goes on later without being read again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import cache_argument, output_cache
from .chat import ChatProcessor
from .snapshot import CacheSnapshot
from .states import CacheValue, new_cache

Turn = tuple[str, str]


def keep_conversation(
    path: str | os.PathLike[str], model: Any, out: Any, inputs: Mapping[str, Any], turns: Sequence[Turn]
) -> None:
    """Write what `generate` returned for these inputs: the state, and the ids and sizes that the next call needs.

    Raises:
        ValueError: the cache is not one of ours.
    """
    cache = output_cache(out)
    if not isinstance(cache, CacheValue):
        raise ValueError(
            f"generate: save_state must be left out without a cache of LinMU's, got {type(cache).__name__}"
        )
    # Pixels are in the state.
    kept = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and "pixel" not in name}
    more = {name: t.detach().cpu() for name, t in _longer(kept, out.sequences).items()}
    dataclasses.replace(cache.snapshot(), more=more, notes={"turns": [list(turn) for turn in turns]}).save(path, model)


def reopen_conversation(
    path: str | os.PathLike[str], model: Any, processor: ChatProcessor, question: str
) -> tuple[dict[str, Any], list[Turn]]:
    """What `generate` takes to answer the next question, the cache among it; and the turns before.

    Raises:
        ValueError, OSError: as `CacheSnapshot.load`; or the file holds no conversation.
    """
    read = CacheSnapshot.load(path, model)
    if "input_ids" not in read.more:
        raise ValueError(f"load: {os.fspath(path)} must hold a conversation, got a cache without its ids")
    turns = [(asked, said) for asked, said in read.notes["turns"]]
    ids = read.more["input_ids"]
    following = processor.following(turns, question)
    if following and int(ids[0, -1]) == following[0] and following[0] in processor.end_ids:
        following = following[1:]
    if not following:
        raise ValueError("generate: prompt must make tokens, got none")
    inputs = _longer(read.more, torch.cat((ids, ids.new_tensor([following])), dim=1))
    cache = new_cache(model)
    cache.restore(read)
    return {**{name: t.to(model.device) for name, t in inputs.items()}, cache_argument(model): cache}, turns


def _longer(inputs: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The inputs with `ids`, which go on with text, in the place of their own."""
    length = inputs["input_ids"].shape[1]
    grown = {
        name: F.pad(t, (0, ids.shape[1] - length), value=int(t[0, -1]))
        for name, t in inputs.items()
        if t.ndim == 2 and t.shape[1] == length and name != "input_ids" and not t.is_floating_point()
    }
    return {**inputs, **grown, "input_ids": ids}
