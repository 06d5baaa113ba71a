"""What every LinMU model shares: it is its teacher's class, with linear blocks in the place of attention."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.masking_utils import create_masks_for_generate as create_attention_masks
from transformers.modeling_utils import AttentionInterface

from linmu_ops import TokenLayout
from linmu_ops.nn import MMATE, ExactConfig, ExactMMATE, MMATEConfig
from linmu_ops.nn.near import NearAttention
from linmu_ops.nn.state import in_checkpoint
from linmu_ops.nn.transfer import TransferRow

from .accelerate import accelerate_transformers, families_of
from .cache import linear_layer
from .config import read_linmu
from .hooks import attention_modules, has_attention
from .layout import LinmuInputs, Placeholders, build_layout, repeat_units, token_mask
from .packing import NAMES as PACKED
from .packing import check_blocks, find_sequences, positions_in
from .parts import AttentionParts, read_parts
from .report import TransferReport

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    from linmu_ops.nn.block import Block as _Block

    _Part = PreTrainedModel

    class _Whole(PreTrainedModel, GenerationMixin):
        """A transformers class that generates."""
else:  # the class that a mixin is mixed into brings them
    _Block = _Part = _Whole = object

REMOTE_CODE = "modeling_linmu.py"
REPORT = "linmu_report.json"


def sees_images(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration, linear or not, takes images; else it is text-only."""
    return type(config) in AutoModelForImageTextToText._model_mapping


def auto_class(config: PreTrainedConfig) -> type[Any]:
    """The Auto class that loads a model of this configuration."""
    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


# The few parameters per head or channel that stay float32 in a half-precision model: decay and step sizes need it.
IN_FLOAT32 = re.compile(
    r"self_attn\.(mix|share\.bias|norm\.weight|norm\.bias|scan\.((reverse_)?(dt_bias|A_log)|scale|gate|head_norm))$"
)

# Where every layer is linear, the decoder's attention implementation has this name: no [L, L] mask is ever made.
LINEAR = "linmu"


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise RuntimeError("linmu: no layer of this model has attention; set_attn_implementation was bypassed")


def _last_of_mask(mask: Tensor, length: int) -> Tensor:
    """The last part of a mask that grows with every step, copied: a view's strides would tell the length of the whole,
    for which a compiled step would be compiled again."""
    return mask[:, -length:].clone(memory_format=torch.contiguous_format)


def _padding_mask(q_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return None if attention_mask is None else _last_of_mask(attention_mask, q_length)


AttentionInterface.register(LINEAR, _no_attention)
AttentionMaskInterface.register(LINEAR, _padding_mask)


def attention_window(attention: Any) -> int | None:
    """How many tokens, itself included, a token sees in a transformers attention module. None: all before it."""
    config = getattr(attention, "config", None)
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    kinds, index = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    if kinds and index is not None and kinds[index] != "sliding_attention":
        return None
    return window or None


class LinmuAttention(_Block):
    """Mixed into a block: the interface of the transformers attention module whose place it takes.

    Args:
        attention: that module; sizes, biases, scale and norms of q and k are read off it, its weights are not.
        config: options of the block.
        layer_idx: index of the decoder layer.
        text_only: the model has no visual tokens, which see text by the first tokens of their row and by the scan.
        facts: of the teacher's family, `interleaved_rotary` and `causal_windows` of the block.

    Attributes:
        beside_attention: other layers of the model keep their attention.
        all_near: the attention has a sliding window that is not longer than the block's of text, which is then as
            short; text sees nothing else.
    """

    beside_attention = False
    all_near = False
    gate_proj: nn.Linear | None
    gated_o_proj: nn.Module
    o_proj: Any

    def __init__(
        self,
        attention: Any,
        config: MMATEConfig | ExactConfig,
        layer_idx: int,
        text_only: bool = False,
        **facts: bool,
    ) -> None:
        parts = read_parts(attention)
        norm = parts.norms["q_norm"]
        if parts.gated and not isinstance(config, ExactConfig):
            raise ValueError("linmu: options must be of the preset exact for a teacher with output gates, got another")
        window = attention_window(attention)
        # All that text sees in such an attention is near: there is no first token, and nothing far, to look at. Visual
        # tokens see text by both.
        self.text_only = text_only
        if window is not None and window <= config.text_window:
            self.all_near = True
            if text_only and isinstance(config, ExactConfig):
                config = dataclasses.replace(config, text_window=window, sink_tokens=0)
            else:
                config = dataclasses.replace(config, text_window=window)
        super().__init__(
            parts.weights["q"].shape[1],
            parts.heads,
            parts.kv_heads,
            parts.head_dim,
            layer_idx=layer_idx,
            qkv_bias=any(parts.biases[part] is not None for part in "qkv"),
            out_bias=parts.biases["o"] is not None,
            qk_norm=None if norm is None else lambda _: copy.deepcopy(norm),
            scale=parts.scale,
            config=config,
            **facts,
        )
        self.gate_proj = None
        if parts.gated:
            # The block gives the heads' outputs, and the gate comes before the output projection.
            self.gated_o_proj, self.o_proj = self.o_proj, nn.Identity()
            self.gate_proj = nn.Linear(self.dim, parts.heads * parts.head_dim, bias=parts.biases["q"] is not None)
        if self.all_near and isinstance(self.windows, NearAttention):
            self.windows.nothing_beyond = True

    def forward(  # type: ignore[override]  # called as the attention in whose place it is, not as a block
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        linmu: LinmuInputs | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """`hidden_states` (B, L, D) to (output (B, L, D), None), as an attention module without weights to show.

        transformers passes its cache as `past_key_values` before version 5.24, as `cache` from then on.
        """
        cache = past_key_values if cache is None else cache
        linmu = linmu or LinmuInputs()
        padding = None if linmu.padding is None else linmu.padding.to(hidden_states.device)
        seq_idx = None if linmu.seq_idx is None else linmu.seq_idx.to(hidden_states.device)
        if cache is None:
            out: Any = super().forward(
                hidden_states, layout=linmu.layout, position_embeddings=position_embeddings, attention_mask=padding,
                seq_idx=seq_idx,
            )  # fmt: skip
            return self._gated(hidden_states, out, padding), None
        if in_checkpoint():
            raise RuntimeError(
                "linmu: cache must be None inside a checkpoint, which runs a layer twice; use_cache=False"
            )
        layer = linear_layer(cache, self.layer_idx, self.beside_attention)
        if layer.packed:
            raise ValueError(
                "linmu: a cache must not go on after rows of several sequences, whose positions it cannot count; "
                "got one that was filled by such rows"
            )
        out, state = super().forward(
            hidden_states,
            layout=linmu.layout,
            position_embeddings=position_embeddings,
            attention_mask=padding,
            state=layer.writable_state() if seq_idx is None else None,
            return_state=True,
            seq_idx=seq_idx,
        )
        layer.packed = seq_idx is not None
        layer.advance(state, hidden_states.shape[1])
        return self._gated(hidden_states, out, padding), None

    def _gated(self, hidden_states: Tensor, heads: Tensor, padding: Tensor | None) -> Tensor:
        """The output, of what the block gives: itself, or the heads' outputs before their gate."""
        if self.gate_proj is None:
            return heads
        if padding is not None:
            hidden_states = hidden_states.masked_fill(~padding[..., None], 0)
        out: Tensor = self.gated_o_proj(heads * self.gate_proj(hidden_states).sigmoid())
        return out

    def _output_projection(self) -> nn.Module:
        return super()._output_projection() if self.gate_proj is None else self.gated_o_proj

    @torch.no_grad()
    def load_parts(self, parts: AttentionParts) -> list[TransferRow]:
        """Take the weights of the attention module. One row for each parameter: where it comes from."""
        given: dict[str, Any] = {**parts.norms, "names": parts.names}
        given |= {f"{part}_weight": parts.weights[part] for part in "qkvo"}
        given |= {f"{part}_bias": parts.biases[part] for part in "qkvo"}
        if self.gate_proj is None:
            return self.load_attention_weights(**given)
        core, self.o_proj = self.o_proj, self.gated_o_proj
        try:
            rows = self.load_attention_weights(**given)
        finally:
            self.o_proj = core
        gates = {"gate_proj.weight": parts.weights["gate"], "gate_proj.bias": parts.biases["gate"]}
        for name, value in gates.items():
            if value is not None:
                self.get_parameter(name).copy_(value)
        for i, row in enumerate(rows):
            if row.name in gates:
                rows[i] = TransferRow(row.name, f"{parts.names['gate']}.{row.name.rpartition('.')[2]}", "copied")
            elif row.name.startswith("o_proj."):
                rows[i] = row._replace(name=f"gated_{row.name}")
        return rows


class LinmuMMATE(LinmuAttention, MMATE):
    """The paper's block in a decoder layer."""


class LinmuExactMMATE(LinmuAttention, ExactMMATE):
    """The default block in a decoder layer."""


def linmu_attention(
    attention: Any,
    config: MMATEConfig | ExactConfig,
    layer_idx: int,
    text_only: bool = False,
    **facts: bool,
) -> LinmuMMATE | LinmuExactMMATE:
    """The block of these options in the place of an attention module; arguments as `LinmuAttention`."""
    kind = LinmuExactMMATE if isinstance(config, ExactConfig) else LinmuMMATE
    return kind(attention, config, layer_idx, text_only, **facts)


class HoldsBlocks(_Part):
    """Mixed into a transformers class some part of which has M-MATE blocks: how these begin, and in which dtype."""

    _keep_in_fp32_modules_strict = {IN_FLOAT32.pattern}  # noqa: RUF012  # as transformers declares it

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # The inner models, which initialise their own parts, know linear maps but not a block's other parameters.
        blocks = [m for m in self.modules() if isinstance(m, LinmuAttention)]
        new = [b for b in blocks if not getattr(b, "_is_hf_initialized", False)]
        super().initialize_weights()
        for block in new:
            if all(getattr(p, "_is_hf_initialized", False) for p in block.parameters()):
                continue
            with _loaded_put_aside(block):
                block.reset_new_parameters()


@contextlib.contextmanager
def _loaded_put_aside(block: nn.Module) -> Iterator[None]:
    """While the context is open, copies stand in for a block's loaded parameters: a quantised one cannot be written to,
    nor read as a matrix."""
    loaded = [
        (module, name, p)
        for module in block.modules()
        for name, p in module._parameters.items()
        if p is not None and getattr(p, "_is_hf_initialized", False)
    ]
    for module, name, p in loaded:
        plain = type(p) is nn.Parameter and type(p.data) is Tensor and p.is_floating_point()
        shape = p.shape
        if not plain and isinstance(module, nn.Linear) and name == "weight":
            shape = torch.Size((module.out_features, module.in_features))
        copy_ = p.detach().clone() if plain else torch.empty(shape, device=p.device)
        module._parameters[name] = nn.Parameter(copy_, requires_grad=False)
    try:
        yield
    finally:
        for module, name, p in loaded:
            module._parameters[name] = p


class LinmuModel(HoldsBlocks, _Whole):
    """Mixed into a transformers class, before it in the bases. A family adds where its visual tokens are.

    Attributes:
        linmu_report: what `linmu_models.convert` copied from the teacher. None for a loaded model.
        layout_source: a function of the inner model's keywords that says where the visual tokens are. It replaces the
            family's own rule. For a decoder inside another model, which gives it embeddings.
    """

    _is_stateful = True
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    # What the block is told of the teacher's attention: see `linmu_ops.nn.Block`.
    facts: ClassVar[Mapping[str, bool]] = {}
    # All tokens of a prompt see each other in the teacher.
    prompt_sees_itself: ClassVar[bool] = False

    config: Any
    model: nn.Module
    linmu_report: TransferReport | None = None
    layout_source: Callable[[Mapping[str, Any]], TokenLayout | None] | None = None
    _sizes_encoded: Mapping[str, Any] = MappingProxyType({})  # of what `generate` encoded last

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        options, kept = read_linmu(config)
        for index, layer in enumerate(self.linmu_layers()):
            if index not in kept and has_attention(layer):
                layer.self_attn = linmu_attention(
                    layer.self_attn, options, index, not sees_images(config), **self.facts
                )
        if families_of(self):
            # Its layers that are linear already run on our kernels too, which know where a packed row's sequences are.
            weakref.finalize(self, accelerate_transformers(self).undo)
        for module in {self.inner_model, self.get_decoder()}:
            module.register_forward_pre_hook(self._share_inputs, with_kwargs=True)
        self._name_attention()
        self.post_init()

    @classmethod
    def fit_options(cls, options: MMATEConfig | ExactConfig, config: Any) -> MMATEConfig | ExactConfig:
        """The options of blocks in the place of such attention; `config` is the teacher's."""
        return options

    @property
    def inner_model(self) -> nn.Module:
        """The part that is given ids and pixels, and whose keywords `placeholders` reads."""
        return self.model

    def linmu_layers(self) -> Iterable[nn.Module]:
        """The decoder layers. As `self_attn` each has its attention, or the M-MATE block in its place; a layer that is
        linear in the teacher already has none."""
        return self.get_decoder().layers

    def placeholders(self, inputs: Mapping[str, Any]) -> Iterable[Placeholders]:
        """Where the images and videos of one call are; `inputs` are the keywords of the inner model's forward."""
        return ()

    def placeholder_mask(self, inputs: Mapping[str, Any], token_id: int) -> Any:
        """(B, L) bool numpy array, where the input tokens are `token_id`."""
        return token_mask(inputs, token_id, self.get_input_embeddings())

    @torch.compiler.disable
    def build_layout(self, inputs: Mapping[str, Any]) -> TokenLayout | None:
        """The layout of one call's input tokens; None for text only."""
        if self.layout_source is not None:
            return self.layout_source(inputs)
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
        kind: Any = type(module)
        given = {**dict(zip(_forward_names(kind), args, strict=False)), **kwargs} if args else kwargs
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if tokens is None:
            return None  # the model's own error says it better
        asked = (getattr(m.config, "output_attentions", False) for m in (module, self.get_decoder()))
        if given.get("output_attentions") or any(asked):
            raise ValueError("linmu: output_attentions must be False: a block has no weights to show, got True")
        length = tokens.shape[1]
        caches = [given[name] for name in ("cache", "past_key_values") if given.get(name) is not None]
        if any(not isinstance(cache, Cache) for cache in caches):
            names = ", ".join(type(cache).__name__ for cache in caches)
            raise TypeError(f"linmu: cache must be a transformers Cache, such as DynamicCache, got {names}")
        # A single token after others is text; its image, if any, is in the cache.
        decoding = length == 1 and bool(caches)
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
        mask = inputs.get("linmu_padding", inputs.get("attention_mask"))
        if mask is not None and not _is_padding(mask):
            got = f"a {type(mask).__name__}" if not isinstance(mask, Tensor) else f"{mask.ndim} dimensions"
            raise ValueError(
                "linmu: attention_mask must be (B, L), 0 at padding: a block has no other mask, and sees every earlier "
                f"token of its row, got {got}"
            )
        tokens: Any = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if mask is not None and (len(mask) != len(tokens) or mask.shape[1] < length):
            raise ValueError(
                f"linmu: attention_mask must be (B, L) = ({len(tokens)}, {length}), or longer with a cache, got shape "
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
            self.get_decoder().config._attn_implementation_internal = LINEAR

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; speaks of the vision tower and of the layers that keep attention."""
        super().set_attn_implementation(*args, **kwargs)
        self._name_attention()

    def create_masks_for_generate(
        self, *, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor | dict[str, Tensor | None] | None:
        """The masks of one step with a static cache, which transformers makes outside the compiled forward."""
        if self.is_linear:
            return _padding_mask(inputs_embeds.shape[1], attention_mask)
        make = getattr(super(), "create_masks_for_generate", create_attention_masks)
        return make(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> Any:
        # `generate` encodes pixels before the prefill and drops the grids with them; without them, the prefill would
        # take visual tokens for text. They travel with what was encoded.
        before = dict(model_kwargs)
        mixed_in: Any = super()
        out = mixed_in._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        dropped = {k: v for k, v in before.items() if k not in out and isinstance(v, Tensor) and "pixel" not in k}
        for encoded in (out.get("mm_encoder_outputs") or {}).values():
            encoded.linmu_sizes = self._sizes_encoded = dropped
        return out

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any,
                 **kwargs: Any) -> Any:  # fmt: skip
        # transformers would cut the features of an image, and lose the grids that travel with them.
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("mm_encoder_outputs"):
            raise ValueError(
                "linmu: prefill_chunk_size must be None for a prompt with images or videos, which no chunk may split, "
                f"got {generation_config.prefill_chunk_size}"
            )
        mixed_in: Any = super()
        return mixed_in._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # generate() looks for this name
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        given = inputs.get("attention_mask")
        if attention_mask is not None and _is_padding(attention_mask) and not _is_padding(given):
            # The mask of a static cache: attention's layers read it, padding can no longer be read from it.
            tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            inputs["linmu_padding"] = _last_of_mask(attention_mask, tokens.shape[1])
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


@functools.cache
def _forward_names(module_class: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


def _is_padding(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def padding_of(inputs: Mapping[str, Any], length: int) -> Tensor | None:
    """(B, L) bool, False at padding, of one call's `length` tokens; None where a call has no such mask."""
    mask = inputs.get("linmu_padding", inputs.get("attention_mask"))
    return mask[:, -length:].bool() if _is_padding(mask) and mask.shape[1] >= length else None


def _without_cache(inputs: Mapping[str, Any]) -> bool:
    return inputs.get("use_cache") is False and all(inputs.get(name) is None for name in ("cache", "past_key_values"))


def write_remote_code(folder: Path, config_class: Any, model_class: Any) -> None:
    """Make the saved model in `folder` loadable with `trust_remote_code=True`."""
    (folder / REMOTE_CODE).write_text(
        # Within a try, as transformers asks for every other import under the name of its module, not of its package.
        f'"""Needs the package linmu."""\n\ntry:\n    from {model_class.__module__} import '
        f"{config_class.__name__}, {model_class.__name__}\nexcept ModuleNotFoundError as error:\n"
        "    hint = \"pip install 'linmu[models]'\"\n"
        '    raise ImportError(f"this model needs the package linmu ({error}): {hint}") from error\n\n'
        f'__all__ = ["{config_class.__name__}", "{model_class.__name__}"]\n'
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    module = REMOTE_CODE.removesuffix(".py")
    config["auto_map"] = {
        "AutoConfig": f"{module}.{config_class.__name__}",
        model_class.auto_class: f"{module}.{model_class.__name__}",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


FAMILIES: dict[str, type[LinmuModel]] = {}
