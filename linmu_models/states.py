"""Caches whose content is a value: LinMU's own classes of transformers' caches."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer, StaticCache

from .cache import LinmuMixerLayer, TakesBack, linear_layer
from .snapshot import CacheSnapshot, restore_to, snapshot_of

if TYPE_CHECKING:
    _Cache = Cache
else:  # the class that it is mixed into brings it
    _Cache = object


class CacheValue(_Cache):
    """Mixed into a transformers cache that a LinMU model uses: its content can be copied, put back, kept in a file.

    A snapshot of a linear model is of constant size, whatever the number of tokens. It holds as many rows as the cache.
    """

    def snapshot(self) -> CacheSnapshot:
        """A copy of all that the cache holds.

        Raises:
            ValueError: it holds rows of several sequences, or a layer that is not copied: quantised keys, for one.
        """
        return snapshot_of(self)

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Make the cache hold what the snapshot has; the snapshot stays what it is. A static cache, such as that of
        `fast_decode`, keeps its addresses.

        Raises:
            ValueError: they are not of the same model, or of other sizes; the cache is then as it was.
        """
        restore_to(self, snapshot)

    def save(self, path: str | os.PathLike[str], model: Any) -> None:
        """`snapshot().save(path, model)`: see `CacheSnapshot.save`."""
        self.snapshot().save(path, model)

    def load(self, path: str | os.PathLike[str], model: Any) -> None:
        """`restore(CacheSnapshot.load(path, model))`: see there. `load_cache` makes a cache."""
        self.restore(CacheSnapshot.load(path, model))

    @property
    def tokens_to_take_back(self) -> int:
        """How many tokens `crop` can take back now.

        The inputs are kept of what is read after `activate_past_recording()`: of the last 128 tokens at least, but of
        none before the end of an image or video. A call that follows `crop` keeps what was left for good, and so does
        `crop(0)`.
        """
        layers = [layer for layer in self.layers if isinstance(layer, TakesBack)]
        counts = [0 if layer.record is None else layer.record.tokens for layer in layers]
        return min(counts, default=0)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -`tokens_to_remove` tokens, as transformers' own caches do.

        Raises:
            ValueError: it is positive, or the inputs of so many tokens are not kept; the cache is then as it was.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, TakesBack):
                layer.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)


class LinmuDynamicCache(CacheValue, DynamicCache):
    """transformers' `DynamicCache` with `CacheValue`."""


class LinmuStaticCache(CacheValue, StaticCache):
    """transformers' `StaticCache` with `CacheValue`."""

    def activate_past_recording(self) -> None:
        raise ValueError(
            "linmu: cache must be a dynamic one for decoding that takes tokens back, as assisted and prompt lookup "
            "decoding do, got a static one"
        )


_OURS: dict[type, type[CacheValue]] = {DynamicCache: LinmuDynamicCache, StaticCache: LinmuStaticCache}


def adopt(cache: Any) -> None:
    """Make a dynamic or static cache of transformers one of ours, with all that it holds.

    Whoever made it may hold on to it, so it stays the same object.
    """
    kind = _OURS.get(type(cache))
    if kind is None or torch.compiler.is_compiling():
        return
    cache.__class__ = kind
    _adopt_layers(cache)


def _adopt_layers(cache: Cache) -> None:
    for index, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionLayer:
            cache.layers[index] = LinmuMixerLayer.of(layer)


def prepare_to_record(cache: Any, blocks: Iterable[Any]) -> None:
    """Put the layers of a dynamic cache in place before the first call, which recording waits for."""
    adopt(cache)
    if isinstance(cache, LinmuDynamicCache):
        for block in blocks:
            linear_layer(cache, block.layer_idx, block.beside_attention)


def load_cache(path: str | os.PathLike[str], model: Any) -> LinmuDynamicCache:
    """A new cache that holds what `cache.save(path, model)` wrote, for `generate(..., cache=cache)`.

    Args:
        path: of the file.
        model: the LinMU model whose cache was saved.

    Raises:
        ValueError, OSError: as `CacheSnapshot.load`.
    """
    cache = new_cache(model)
    cache.load(path, model)
    return cache


def new_cache(model: Any) -> LinmuDynamicCache:
    """An empty dynamic cache of a LinMU model."""
    cache = LinmuDynamicCache(config=model.config)
    _adopt_layers(cache)
    return cache
