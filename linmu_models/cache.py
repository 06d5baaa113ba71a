"""The decode state of a linear layer, as a layer of a transformers `Cache`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)

from linmu_ops.nn import MMATEState

from .rewind import Record


class TakesBack:
    """Mixed into a cache layer of constant size: how its last tokens are taken back, and its rows chosen.

    Attributes:
        record: what that needs. None: nothing is recorded.
    """

    record: Record | None

    @property
    def is_croppable(self) -> bool:
        """Whether tokens that are read from now on can be taken back."""
        return self.record is not None

    def activate_past_recording(self) -> None:
        """Keep the inputs of what is read from now on. transformers has the name."""
        self.record = self.record or Record()

    def check_crop(self, tokens: int) -> None:
        """Raise ValueError where so many tokens cannot be taken back."""
        known = 0 if self.record is None else self.record.tokens
        if not 0 <= tokens <= known:
            why = "" if self.record is not None else " before cache.activate_past_recording()"
            raise ValueError(
                f"linmu: crop must be from {-known} to 0, as inputs of so many tokens are kept{why}, got {-tokens}; "
                "cache.restore takes back any number, to a snapshot"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -`tokens_to_remove` tokens."""
        self.check_crop(-tokens_to_remove)
        if self.record is not None:
            self.record.crop(self, -tokens_to_remove)  # type: ignore[arg-type]  # of the class that this is mixed into

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows `beam_idx` in the place of those that are there."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As in transformers' other layers: each row stands so many times, one after the other."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As in transformers' other layers: these rows alone."""
        self._map(lambda t: t[indices.to(t.device)])

    def _map(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.record is not None:
            self.record.map(rows)
        self._map_state(rows)

    def _map_state(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of the state."""
        raise NotImplementedError


class LinmuCacheLayer(TakesBack, LinearAttentionCacheLayerMixin, CacheLayerMixin):  # type: ignore[override]
    """Holds one `MMATEState` of constant size, and counts the tokens that it has seen.

    `Cache.get_seq_length` and position ids need the count. It is an int. In the place of a static layer it is a tensor
    on the layer's device, so that a compiled step does not depend on its value.

    Args:
        static: the layer is in the place of a static one.
        mask_length: length of the static attention layers beside it; transformers may ask this layer for their masks.
            None without such layers, so that a compiled step does not depend on it.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, static: bool = False, mask_length: int | None = None) -> None:
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=0)
        CacheLayerMixin.__init__(self)
        self.is_static, self.mask_length = static, mask_length
        self.cumulative_length: Any = torch.tensor(0) if static else 0  # a tensor, as in transformers' static layers
        self.state: MMATEState | None = None
        self.packed = False  # the state is that of the last of a row's sequences
        self.record: Record | None = None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # the two bases of transformers declare it apart
        return self.is_static

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the first forward brings the state."""

    def advance(self, state: MMATEState, tokens: int) -> None:
        """Keep the state after `tokens` more tokens; a static layer keeps it at its first address."""
        self.keep(state)
        self.count(tokens)

    def keep(self, state: MMATEState) -> None:
        """`advance`, without the tokens being counted."""
        if not isinstance(self.cumulative_length, Tensor):
            self.state = state
        elif self.state is None:
            kept = [t for t in state.without_slab() if t is not None]
            self.cumulative_length = self.cumulative_length.to(kept[0].device if kept else "cpu")
            if not torch.compiler.is_compiling():
                for tensor in (self.cumulative_length, *kept):
                    torch._dynamo.mark_static_address(tensor)
            self.state = state
        else:
            self.state = self.state.copy_(state)
        self.is_initialized = True

    def count(self, tokens: int) -> None:
        """Count so many tokens more."""
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.add_(tokens)
        else:
            self.cumulative_length += tokens

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

    def activate_past_recording(self) -> None:
        """As in `TakesBack`. A static layer records nothing: what a compiled step reads keeps its place."""
        if not self.is_static:
            super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -`tokens_to_remove` tokens."""
        super().crop(tokens_to_remove)
        self.cumulative_length += tokens_to_remove

    def value(self) -> dict[str, Tensor]:
        """Copies of the tensors of the state."""
        held = {} if self.state is None else self.state._asdict()
        return {name: copied(t) for name, t in held.items() if t is not None}

    def put(self, value: Mapping[str, Tensor]) -> None:
        """Make that the state, by copying; the count stays. A static layer keeps its addresses."""
        if not self.is_static:
            self.state = None
        elif not value:
            self._clear()
        if value:
            self.keep(MMATEState(**{name: copied(t) for name, t in value.items()}))

    def _clear(self) -> None:
        """Zeros are the state before the first token, and a compiled step keeps its addresses."""
        self.state = None if self.state is None else self.state.without_slab()
        for tensor in self.state or ():
            if tensor is not None:
                tensor.zero_()

    def offload(self) -> None:
        """Stays where it is: the state is small and of constant size."""

    def prefetch(self) -> None:
        """See `offload`."""

    def reset(self) -> None:
        self.packed = False
        if self.record is not None:
            self.record.forget()
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.zero_()
            self._clear()
        else:
            self.cumulative_length = 0
            self.state = None
            self.is_initialized = False

    def _map_state(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Where there are as many rows as before, a static layer keeps its addresses."""
        if self.state is None:
            return
        new = self.state.map(rows)
        same = all(t is None or t.shape == old.shape for t, old in zip(new, self.state, strict=True) if old is not None)
        self.state = self.state.copy_(new) if self.is_static and same else new


class LinmuMixerLayer(TakesBack, LinearAttentionLayer):
    """transformers' cache layer of a mixer that is linear in the teacher already, such as the delta rule's.

    It can take tokens back, and its rows can be chosen and repeated.
    """

    record: Record | None = None

    @classmethod
    def of(cls, layer: LinearAttentionLayer) -> LinmuMixerLayer:
        """The same layer, with what it holds."""
        new = cls.__new__(cls)
        new.__dict__.update(layer.__dict__)
        if new.record_past:
            # Theirs keeps what it convolved; ours keeps what the whole mixer was given.
            if any(new.is_conv_states_initialized.values()):
                LinearAttentionLayer.crop(new, 0)
            new.record_past, new.record = False, Record()
        return new

    def crop(self, tokens_to_remove: int) -> None:
        TakesBack.crop(self, tokens_to_remove)

    def value(self) -> dict[str, Tensor]:
        """Copies of the tensors of the state; none before the first token, which zeros may stand for."""
        if any(self.is_conv_states_initialized.values()) and not any(self.has_previous_state.values()):
            return {}
        held = {f"conv.{i}": t for i, t in self.conv_states.items() if self.has_previous_state[i]}
        made = self.is_recurrent_states_initialized
        held |= {f"recurrent.{i}": t for i, t in self.recurrent_states.items() if made[i]}
        return {name: copied(t) for name, t in held.items() if t is not None}

    def put(self, value: Mapping[str, Tensor]) -> None:
        """Make that the state, by copying. Tensors of the same shape keep their addresses."""
        if not value:
            super().reset()
        for name, tensor in value.items():
            kind, _, number = name.partition(".")
            i = int(number)
            held = getattr(self, f"{kind}_states")
            if held[i] is None or held[i].shape != tensor.shape:
                made: dict[str, Any] = {f"{kind}_states": tensor}
                self.lazy_initialization(**made, state_idx=i)
            held[i].copy_(tensor)
            if kind == "conv":
                self.has_previous_state[i] = True

    def reset(self) -> None:
        if self.record is not None:
            self.record.forget()
        super().reset()

    def _map_state(self, rows: Callable[[Tensor], Tensor]) -> None:
        for held in (self.conv_states, self.recurrent_states):
            for i, t in held.items():
                held[i] = None if t is None else rows(t)


def cache_argument(module: Any) -> str:
    """What a module's forward calls its cache; transformers renamed it in version 5.24."""
    return "cache" if "cache" in inspect.signature(type(module).forward).parameters else "past_key_values"


def given_cache(given: Mapping[str, Any]) -> Any:
    """The cache among a call's keywords, by either name."""
    return given.get("cache", given.get("past_key_values"))


def goes_on_from(cache: Any, input_ids: Tensor, inputs_embeds: Tensor | None) -> int:
    """How many tokens of a prompt a cache that was given with it has seen.

    Raises:
        ValueError: the prompt does not go on after them. transformers would then read it from its start, or fail.
    """
    seen = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if seen and given.shape[1] <= seen:
        raise ValueError(
            f"generate: {name} must be of all tokens that the cache has seen, {seen}, and of one more at least, got "
            f"{given.shape[1]}"
        )
    return seen


def output_cache(out: Any) -> Any:
    """The cache in what a model or `generate` returns. transformers 5.24 renamed it, and warns of the old name."""
    return out.cache if hasattr(out, "cache") else getattr(out, "past_key_values", None)


def copied(tensor: Tensor) -> Tensor:
    """A copy without a history, also of a tensor that was made in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's states, keys and values."""

    def tensors() -> Iterable[Tensor | None]:
        for layer in cache.layers:
            if isinstance(layer, TakesBack) and layer.record is not None:
                yield from layer.record.tensors()
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
