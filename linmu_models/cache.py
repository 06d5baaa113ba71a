"""The decode state of a linear layer, as a layer of a transformers `Cache`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin, StaticLayer

from linmu_ops.nn import MMATEState


class LinmuCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """Holds one `MMATEState` of constant size, and counts the tokens that it has seen.

    `Cache.get_seq_length` and position ids need the count. It is an int. In the place of a static layer it is a tensor
    on the layer's device, so that a compiled step does not depend on its value.

    Args:
        static: the layer is in the place of a static one.
        mask_length: length of the static attention layers beside it; transformers may ask this layer for their masks.
            None without such layers, so that a compiled step does not depend on it.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, static: bool = False, mask_length: int | None = None) -> None:
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=0)
        CacheLayerMixin.__init__(self)
        self.is_static, self.mask_length = static, mask_length
        self.cumulative_length: Any = torch.tensor(0) if static else 0  # a tensor, as in transformers' static layers
        self.state: MMATEState | None = None
        self.packed = False  # the state is that of the last of a row's sequences

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # the two bases of transformers declare it apart
        return self.is_static

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the first forward brings the state."""

    def advance(self, state: MMATEState, tokens: int) -> None:
        """Keep the state after `tokens` more tokens; a static layer keeps it at its first address."""
        if not isinstance(self.cumulative_length, Tensor):
            self.cumulative_length += tokens
            self.state = state
        elif self.state is None:
            kept = [t for t in state.without_slab() if t is not None]
            self.cumulative_length = self.cumulative_length.to(kept[0].device if kept else "cpu").add_(tokens)
            if not torch.compiler.is_compiling():
                for tensor in (self.cumulative_length, *kept):
                    torch._dynamo.mark_static_address(tensor)
            self.state = state
        else:
            self.cumulative_length.add_(tokens)
            self.state = self.state.copy_(state)
        self.is_initialized = True

    def writable_state(self) -> MMATEState | None:
        """The state, which a step may write to: a copy where it was made in inference mode, which is over."""
        made = next((t for t in self.state or () if t is not None), None)
        if self.is_static or torch.compiler.is_compiling() or made is None or not made.is_inference():
            return self.state
        if not torch.is_inference_mode_enabled():
            self.state = MMATEState(*(None if t is None else t.clone() for t in self.state or ()))
        return self.state

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.get_seq_length() + query_length if self.mask_length is None else self.mask_length), 0

    def get_max_length(self) -> int:
        return -1

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("linmu: a linear layer keeps no keys and values")

    def update_conv_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("linmu: a linear layer's state is updated through LinmuCacheLayer.advance")

    update_recurrent_state = update_conv_state

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise RuntimeError(
                "linmu: a recurrent state cannot be rolled back, so contrastive, assisted and prompt-lookup decoding "
                "are not possible; use greedy, sampling or beams"
            )

    def offload(self) -> None:
        """Stays where it is: the state is small and of constant size."""

    def prefetch(self) -> None:
        """See `offload`."""

    def reset(self) -> None:
        self.packed = False
        if isinstance(self.cumulative_length, Tensor):
            # Zeros are the state before the first token, and a compiled step keeps its addresses.
            self.state = None if self.state is None else self.state.without_slab()
            for tensor in (self.cumulative_length, *(self.state or ())):
                if tensor is not None:
                    tensor.zero_()
        else:
            self.cumulative_length = 0
            self.state = None
            self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            where = next((t.device for t in self.state if t is not None), beam_idx.device)
            self.state = self.state.reorder(beam_idx.to(where))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's states, keys and values."""

    def tensors() -> Iterable[Tensor | None]:
        for layer in cache.layers:
            if isinstance(layer, LinmuCacheLayer):
                yield from layer.state or ()
                continue
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                yield from (*layer.conv_states.values(), *layer.recurrent_states.values())
            if isinstance(layer, CacheLayerMixin):
                yield from (layer.keys, layer.values)

    return sum(t.numel() * t.element_size() for t in tensors() if t is not None)


def linear_layer(cache: Cache, layer_idx: int, beside_attention: bool = False) -> LinmuCacheLayer:
    """The state layer of decoder layer `layer_idx`, put in the place of the attention layer on first use.

    `Cache` builds one attention layer per decoder layer from the configuration, which still speaks of attention.
    beside_attention: other layers keep theirs.

    Raises:
        ValueError: that attention layer has already been filled by another model.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[layer_idx]
    if isinstance(layer, LinmuCacheLayer):
        return layer
    # One that is initialised early, as before a prefill in chunks, is empty.
    if layer.is_initialized and (torch.compiler.is_compiling() or int(layer.get_seq_length()) > 0):
        raise ValueError(f"linmu: layer {layer_idx} of the cache must be new or linear, got keys and values")
    static = isinstance(layer, StaticLayer)
    length = None
    if static and beside_attention:
        # A layer with a sliding window is shorter than the others.
        length = max(other.max_cache_len for other in cache.layers if isinstance(other, StaticLayer))
    cache.layers[layer_idx] = fresh = LinmuCacheLayer(static, length)
    return fresh
