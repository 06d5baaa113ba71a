"""What every LinMU model shares: it is its teacher's class, with linear blocks in the place of attention."""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate as create_attention_masks

from linmu_ops import TokenLayout
from linmu_ops.nn import ExactConfig, MMATEConfig

from .accelerate import accelerate_transformers, families_of
from .attention import HoldsBlocks, LinmuAttention, linmu_attention
from .cache import cache_argument, given_cache, goes_on_from
from .chunks import check_chunk, decoder_in_chunks, tower_in_chunks
from .config import read_linmu, sees_images
from .hooks import attention_modules, by_name, decoder_of, has_attention, tokens_of
from .layout import LinmuInputs, Placeholders, build_layout, repeat_units, token_mask
from .masks import LINEAR, is_padding, last_of_mask, padding_mask, place_by_mask, read_padding
from .packing import NAMES as PACKED
from .packing import check_blocks, find_sequences, positions_in
from .remote_code import write_remote_code
from .report import TransferReport
from .rewind import after_mixer, before_mixer, mixers_of
from .states import prepare_to_record

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    class _Whole(PreTrainedModel, GenerationMixin):
        """A transformers class that generates."""
else:  # the class that a mixin is mixed into brings them
    _Whole = object

REPORT = "linmu_report.json"


class LinmuModel(HoldsBlocks, _Whole):
    """Mixed into a transformers class, before it in the bases. A family adds where its visual tokens are.

    Attributes:
        linmu_report: what `linmu_models.convert` copied from the teacher. None for a loaded model.
        layout_source: a function of the inner model's keywords that says where the visual tokens are. It replaces the
            family's own rule. For a decoder inside another model, which gives it embeddings.
    """

    _is_stateful = False  # tokens can be taken back, whatever the teacher's class says
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    # What the block is told of the teacher's attention: see `linmu_ops.nn.Block`.
    facts: ClassVar[Mapping[str, bool]] = {}
    # What tells the sizes of the pixels of this name: without it nothing can be laid out.
    sizes_of_pixels: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # All tokens of a prompt see each other in the teacher.
    prompt_sees_itself: ClassVar[bool] = False

    config: Any
    model: nn.Module
    linmu_report: TransferReport | None = None
    layout_source: Callable[[Mapping[str, Any]], TokenLayout | None] | None = None
    _sizes_encoded: Mapping[str, Any] = MappingProxyType({})  # of what `generate` encoded last
    _chunk: int | None = None  # tokens of a prompt that `generate` takes at a time
    _seen: int = 0  # tokens of its prompt that a cache given to `generate` has seen, while tokens are guessed

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        options, kept = read_linmu(config)
        for index, layer in enumerate(self.linmu_layers()):
            if index not in kept and has_attention(layer):
                facts = self.layer_facts(config, index)
                layer.self_attn = linmu_attention(layer.self_attn, options, index, not sees_images(config), **facts)
        self._accelerate()
        for layer in self.linmu_layers():
            for mixer in () if has_attention(layer) else mixers_of(layer):
                mixer.register_forward_pre_hook(before_mixer, with_kwargs=True)
                mixer.register_forward_hook(after_mixer, with_kwargs=True)
        self._cache_name = cache_argument(self.inner_model)
        for module in {self.inner_model, decoder_of(self)}:
            module.register_forward_pre_hook(self._share_inputs, with_kwargs=True)
        if any(isinstance(module, LinmuAttention) for module in attention_modules(self).values()):
            place_by_mask(self.inner_model, decoder_of(self))
        self._name_attention()
        self.post_init()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or one that was pickled."""
        super().__setstate__(state)
        self._accelerate()

    def _accelerate(self) -> None:
        """Layers that are linear in the teacher run on our kernels, which know where a packed row's sequences are, as
        long as this model exists."""
        if families_of(self):
            weakref.finalize(self, accelerate_transformers(self).undo)

    @classmethod
    def fit_options(cls, options: MMATEConfig | ExactConfig, config: Any) -> MMATEConfig | ExactConfig:
        """The options of blocks in the place of such attention; `config` is the teacher's."""
        return options

    @classmethod
    def layer_facts(cls, config: Any, index: int) -> Mapping[str, bool]:
        """What the block of one decoder layer is told; `config` is the student's or the teacher's."""
        return cls.facts

    @property
    def inner_model(self) -> nn.Module:
        """The part that is given ids and pixels, and whose keywords `placeholders` reads."""
        return self.model

    def linmu_layers(self) -> Iterable[nn.Module]:
        """The decoder layers. As `self_attn` each has its attention, or the M-MATE block in its place; a layer that is
        linear in the teacher already has none."""
        return decoder_of(self).layers

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        """Where the images and videos of one call are; `inputs` are the keywords of the inner model's forward."""
        return ()

    def placeholder_mask(self, inputs: Mapping[str, Any], token_id: int) -> Any:
        """(B, L) bool numpy array, where the input tokens are `token_id`."""
        return token_mask(inputs, token_id, self.get_input_embeddings())

    def _check_sizes(self, inputs: Mapping[str, Any]) -> None:
        """Raise ValueError for pixels without their sizes, which the model would look for, and not find."""
        for pixels, names in self.sizes_of_pixels.items():
            lacking = [name for name in names if inputs.get(name) is None]
            if inputs.get(pixels) is not None and lacking:
                raise ValueError(f"linmu: {lacking[0]} must be given with {pixels}, got None")

    @torch.compiler.disable
    def build_layout(self, inputs: Mapping[str, Any]) -> TokenLayout | None:
        """The layout of one call's input tokens; None for text only."""
        if self.layout_source is not None:
            return self.layout_source(inputs)
        self._check_sizes(inputs)
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        sizes: dict[str, Any] = {}
        for encoded in (inputs.get("mm_encoder_outputs") or {}).values():
            # What brings inputs to a device, as offloading does, makes outputs anew, without what travels with them.
            sizes |= getattr(encoded, "linmu_sizes", self._sizes_encoded)
        found = self.placeholders({**inputs, **sizes})
        if sizes:
            found = (repeat_units(placeholders) for placeholders in found)
        return build_layout(found, *tokens.shape[:2])

    def _share_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("linmu") is not None:
            return None
        kwargs = self._by_their_names(kwargs)
        given = by_name(module, args, kwargs)
        tokens = tokens_of(given)
        if tokens is None:
            return None  # the model's own error says it better
        asked = (getattr(m.config, "output_attentions", False) for m in (module, decoder_of(self)))
        if given.get("output_attentions") or any(asked):
            raise ValueError("linmu: output_attentions must be False: a block has no weights to show, got True")
        length = tokens.shape[1]
        caches = [given[name] for name in ("cache", "past_key_values") if given.get(name) is not None]
        if any(not isinstance(cache, Cache) for cache in caches):
            names = ", ".join(type(cache).__name__ for cache in caches)
            raise TypeError(f"linmu: cache must be a transformers Cache, such as DynamicCache, got {names}")
        # A single token after others is text; its image, if any, is in the cache.
        decoding = bool(caches) and (length == 1 or _is_text(given, caches))
        linmu = self.block_inputs(given, length, visual=not decoding and module is self.inner_model)
        kwargs = {k: v for k, v in kwargs.items() if k != "linmu_padding"}
        if linmu.seq_idx is not None:
            kwargs = self._with_sequences(given, kwargs, linmu, linmu.seq_idx, caches)
            if len(attention_modules(self)) < len(list(self.linmu_layers())):
                if not families_of(self):
                    raise ValueError(
                        "linmu: rows must be one sequence each in a model with short convolutions, got several"
                    )
                kwargs["seq_idx"] = linmu.seq_idx
        return args, {**kwargs, "linmu": linmu}

    def _by_their_names(self, given: dict[str, Any]) -> dict[str, Any]:
        """A call's keywords, with the cache by the name that this version of transformers has for it."""
        if self._cache_name == "cache" or given.get("cache") is None:
            return given
        return {**{name: value for name, value in given.items() if name != "cache"}, self._cache_name: given["cache"]}

    def _with_sequences(
        self,
        given: Mapping[str, Any],
        kwargs: dict[str, Any],
        linmu: LinmuInputs,
        sequences: Tensor,
        caches: list[Cache],
    ) -> dict[str, Any]:
        """The keywords of a call whose rows hold several sequences; refuses what would let one see another."""
        if any(int(cache.get_seq_length()) > 0 for cache in caches):
            raise ValueError("linmu: rows of several sequences must begin a cache, got one with tokens")
        if given.get("position_ids") is None:
            mrope = linmu.layout is not None and hasattr(self.inner_model, "get_rope_index")
            if not mrope:  # there a row's positions are as good: only their distances count
                kwargs = {**kwargs, "position_ids": positions_in(sequences)}
        positions = kwargs.get("position_ids", given.get("position_ids"))
        parted = positions is not None and (positions.ndim == 2 or positions.shape[0] == 4)
        if not self.is_linear and not (parted and given.get("attention_mask") is None and _without_cache(given)):
            raise ValueError(
                "linmu: beside layers that keep attention, rows of several sequences must come with position_ids "
                "(B, L), with use_cache=False and without attention_mask, got other inputs"
            )
        return kwargs

    def block_inputs(self, inputs: Mapping[str, Any], length: int, *, visual: bool = True) -> LinmuInputs:
        """What every M-MATE block of a call is given beside its hidden states: their layout and padding."""
        layout = self.build_layout(inputs) if visual else None
        tokens = tokens_of(inputs)
        padding = read_padding(inputs, len(tokens), length)
        given = any(inputs.get(name) is not None for name in PACKED)
        sequences = find_sequences(inputs, len(tokens), length, padding) if given and length > 1 else None
        if sequences is not None and layout is not None:
            check_blocks(layout, sequences)
        return LinmuInputs(layout, padding, sequences)

    @property
    def is_linear(self) -> bool:
        """No decoder layer has attention."""
        return all(isinstance(m, LinmuAttention) for m in attention_modules(self).values())

    def _name_attention(self) -> None:
        for attention in attention_modules(self).values():
            if isinstance(attention, LinmuAttention):
                attention.beside_attention = not self.is_linear
        if self.is_linear:
            decoder_of(self).config._attn_implementation_internal = LINEAR

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; speaks of the vision tower and of the layers that keep attention."""
        super().set_attn_implementation(*args, **kwargs)
        self._name_attention()

    def create_masks_for_generate(
        self, *, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor | dict[str, Tensor | None] | None:
        """The masks of one step with a static cache, which transformers makes outside the compiled forward."""
        if self.is_linear:
            return padding_mask(inputs_embeds.shape[1], attention_mask)
        make = getattr(super(), "create_masks_for_generate", create_attention_masks)
        return make(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> Any:
        # `generate` encodes pixels before the prefill and drops the grids with them; without them, the prefill would
        # take visual tokens for text. They travel with what was encoded.
        before = dict(model_kwargs)
        mixed_in: Any = super()
        with contextlib.nullcontext() if self._chunk is None else tower_in_chunks(self, self._chunk):
            out = mixed_in._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        dropped = {k: v for k, v in before.items() if k not in out and isinstance(v, Tensor) and "pixel" not in k}
        for encoded in (out.get("mm_encoder_outputs") or {}).values():
            encoded.linmu_sizes = self._sizes_encoded = dropped
        return out

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        mixed_in: Any = super()
        out = mixed_in._prepare_generation_config(*args, **self._by_their_names(kwargs))
        self._check_sizes(out[1])  # before anything of a prompt is looked at
        self._chunk = None if out[0].prefill_chunk_size is None else check_chunk(out[0].prefill_chunk_size)
        return out

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any,
                 **kwargs: Any) -> Any:  # fmt: skip
        mixed_in: Any = super()
        mask = model_kwargs.get("attention_mask")
        of_mask = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        if of_mask == input_ids.shape[1]:  # else the ids are the new ones alone
            goes_on_from(given_cache(model_kwargs), input_ids, model_kwargs.get("inputs_embeds"))
        size = generation_config.prefill_chunk_size
        if size is None or not (self.is_linear or model_kwargs.get("mm_encoder_outputs")):
            return mixed_in._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        # transformers would cut the features of an image, and lose the grids that travel with them.
        whole = copy.copy(generation_config)
        whole.prefill_chunk_size = None
        with decoder_in_chunks(self, size):
            return mixed_in._prefill(input_ids, whole, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        mixed_in: Any = super()
        out = mixed_in._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # Before the first call fills them, a decoding that takes tokens back tells all layers to record.
        cache = given_cache(model_kwargs)
        prepare_to_record(cache, (m for m in attention_modules(self).values() if isinstance(m, LinmuAttention)))
        if generation_config.is_assistant and isinstance(cache, Cache):
            cache.activate_past_recording()
        return out

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, inputs_tensor: Tensor | None = None,
                           **kwargs: Any) -> Any:  # fmt: skip
        mixed_in: Any = super()
        self._seen = goes_on_from(given_cache(kwargs), input_ids, kwargs.get("inputs_embeds"))
        try:
            return mixed_in._assisted_decoding(input_ids, *args, inputs_tensor=inputs_tensor, **kwargs)
        finally:
            self._seen = 0

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # generate() looks for this name
        **kwargs: Any,
    ) -> dict[str, Any]:
        if self._seen and kwargs.get("is_first_iteration"):
            # transformers would read again, behind them, the tokens that the cache has seen.
            whole = input_ids if inputs_embeds is None else inputs_embeds
            kwargs["next_sequence_length"] = whole.shape[1] - self._seen
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        given = inputs.get("attention_mask")
        if attention_mask is not None and is_padding(attention_mask) and not is_padding(given):
            # The mask of a static cache: attention's layers read it, padding can no longer be read from it.
            tokens = tokens_of(inputs)
            inputs["linmu_padding"] = last_of_mask(attention_mask, tokens.shape[1])
        return inputs

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, and such that the directory also loads where only `linmu` is installed, not imported:
        with `trust_remote_code=True`, through a one-line file that imports this class."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        config_class, model_class = type(self).config_class, type(self)
        write_remote_code(folder, config_class, model_class)
        if self.linmu_report is not None:
            self.linmu_report.save(folder / REPORT)


def _is_text(inputs: Mapping[str, Any], caches: Iterable[Cache]) -> bool:
    """Whether a call has no visual tokens: it goes on after others, and brings no pixels, only ids, some of which may
    be guessed."""
    if torch.compiler.is_compiling() or all(int(cache.get_seq_length()) == 0 for cache in caches):
        return False
    brought = {name for name, value in inputs.items() if value is not None}
    return "input_ids" in brought and not any("pixel" in n or "embeds" in n or "encoder" in n for n in brought)


def _without_cache(inputs: Mapping[str, Any]) -> bool:
    return inputs.get("use_cache") is False and all(inputs.get(name) is None for name in ("cache", "past_key_values"))


FAMILIES: dict[str, type[LinmuModel]] = {}
