"""The block in the place of a decoder layer's attention: its interface, how it begins, and in which dtype."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from linmu_ops import TokenLayout
from linmu_ops.nn import MMATE, ExactConfig, ExactMMATE, MMATEConfig
from linmu_ops.nn.near import NearAttention
from linmu_ops.nn.state import in_checkpoint
from linmu_ops.nn.transfer import TransferRow, copied

from .cache import LinmuCacheLayer, linear_layer
from .hooks import rotary_pair
from .layout import LinmuInputs
from .parts import AttentionParts, read_parts
from .rewind import Inputs, Record
from .states import adopt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from linmu_ops.nn.block import Block as _Block

    _Part = PreTrainedModel
else:  # the class that a mixin is mixed into brings them
    _Block = _Part = object

# The few parameters per head or channel that stay float32 in a half-precision model: decay and step sizes need it.
IN_FLOAT32 = re.compile(
    r"self_attn\.(mix|share\.bias|norm\.weight|norm\.bias"
    r"|scan\.((reverse_)?(dt_bias|A_log)|beta_bias|scale|gate|head_norm))$"
)


def attention_window(attention: Any) -> int | None:
    """How many tokens, itself included, a token sees in a transformers attention module. None: all before it."""
    config = getattr(attention, "config", None)
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    kinds, index = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    if kinds and index is not None and kinds[index] != "sliding_attention":
        return None
    return window or None


_ROTARY = ("cos", "sin")


class LinmuAttention(_Block):
    """Mixed into a block: the interface of the transformers attention module whose place it takes.

    Args:
        attention: that module; sizes, biases, scale and norms of q and k are read off it, its weights are not.
        config: options of the block.
        layer_idx: index of the decoder layer.
        text_only: the model has no visual tokens, which see text by the first tokens of their row and by the scan.
        rotates: queries and keys are rotated by the position embeddings that the layer is given.
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
        rotates: bool = True,
        **facts: bool,
    ) -> None:
        parts = read_parts(attention)
        norm = parts.norms["q_norm"]
        for there, what in ((parts.gated, "output gates"), (parts.norms["v_norm"] is not None, "norms of values")):
            if there and not isinstance(config, ExactConfig):
                raise ValueError(f"linmu: options must be of the preset exact for a teacher with {what}, got another")
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
            qk_norm=None if norm is None else functools.partial(copied, norm),
            scale=parts.scale,
            config=config,
            **facts,
        )
        self.rotates = rotates
        if parts.norms["v_norm"] is not None and isinstance(self.windows, NearAttention):
            self.windows.v_norm = copy.deepcopy(parts.norms["v_norm"])
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
        position_embeddings = rotary_pair(position_embeddings) if self.rotates else None
        linmu = linmu or LinmuInputs()
        padding = None if linmu.padding is None else linmu.padding.to(hidden_states.device)
        seq_idx = None if linmu.seq_idx is None else linmu.seq_idx.to(hidden_states.device)
        if cache is None:
            out: Any = super().forward(
                hidden_states, layout=linmu.layout, position_embeddings=position_embeddings, attention_mask=padding,
                seq_idx=seq_idx, context=linmu.context,
            )  # fmt: skip
            return self._gated(hidden_states, out, padding), None
        if linmu.context is not None:
            raise ValueError("linmu: cache must be None where rows are split over processes, got one")
        if in_checkpoint():
            raise RuntimeError(
                "linmu: cache must be None inside a checkpoint, which runs a layer twice; use_cache=False"
            )
        adopt(cache)
        layer = linear_layer(cache, self.layer_idx, self.beside_attention)
        if layer.packed:
            raise ValueError(
                "linmu: a cache must not go on after rows of several sequences, whose positions it cannot count; "
                "got one that was filled by such rows"
            )
        rotary = position_embeddings
        if layer.record is not None and seq_idx is None:
            out = self._recorded(layer, layer.record, hidden_states, linmu.layout, rotary, padding)
        else:
            out = self._read(layer, hidden_states, linmu.layout, rotary, padding, seq_idx)
            if layer.record is not None:  # of several sequences, after which no cache goes on
                layer.record.forget()
        layer.packed = seq_idx is not None
        layer.count(hidden_states.shape[1])
        return self._gated(hidden_states, out, padding), None

    def _read(
        self,
        layer: LinmuCacheLayer,
        hidden_states: Tensor,
        layout: TokenLayout | None,
        rotary: tuple[Tensor, Tensor] | None,
        padding: Tensor | None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """What the block gives for more tokens. The layer keeps their state, and does not count them yet."""
        read: Any = super().forward(
            hidden_states, layout=layout, position_embeddings=rotary, attention_mask=padding,
            state=layer.writable_state() if seq_idx is None else None, return_state=True, seq_idx=seq_idx,
        )  # fmt: skip
        layer.keep(read[1])
        out: Tensor = read[0]
        return out

    def _recorded(
        self,
        layer: LinmuCacheLayer,
        record: Record,
        hidden_states: Tensor,
        layout: TokenLayout | None,
        rotary: tuple[Tensor, Tensor] | None,
        padding: Tensor | None,
    ) -> Tensor:
        """The same, of a layer that keeps what it needs to take tokens back."""
        given = {"hidden_states": hidden_states}
        if rotary is not None:
            given |= {name: t.expand(len(hidden_states), -1, -1) for name, t in zip(_ROTARY, rotary, strict=True)}
        if padding is not None:
            given["padding"] = padding

        def run(inputs: Inputs, first: bool) -> Tensor:
            z = inputs["hidden_states"]
            visual = layout.part(0, z.shape[1]) if first and layout is not None else None
            turned = (inputs["cos"], inputs["sin"]) if rotary is not None else None
            return self._read(layer, z, visual, turned, inputs.get("padding"))

        seen = layout is not None and layout.has_visual
        rest = record.begin(layer, run, given, int(layout.positions.max()) + 1 if layout is not None and seen else 0)
        return record.end(run(rest, False) if rest["hidden_states"].shape[1] else None)

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
        given: dict[str, Any] = {norm: parts.norms[norm] for norm in ("q_norm", "k_norm")}
        given["names"] = {part: name for part, name in parts.names.items() if part != "v_norm"}
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
    block = kind(attention, config, layer_idx, text_only, **facts)
    # transformers reads weights that stay on the disk in the dtype that they have before anything is loaded.
    for name, parameter in block.named_parameters():
        if IN_FLOAT32.search(f"self_attn.{name}"):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return block


class HoldsBlocks(_Part):
    """Mixed into a transformers class some part of which has M-MATE blocks: how these begin, and in which dtype."""

    _keep_in_fp32_modules_strict = {IN_FLOAT32.pattern}  # noqa: RUF012  # as transformers declares it
    # Students were saved before there was a limit: they go on without one.
    _keys_to_ignore_on_load_missing = {r"self_attn\.far_limit$"}  # noqa: RUF012

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # The inner models, which initialise their own parts, know linear maps but not a block's other parameters.
        blocks = [m for m in self.modules() if isinstance(m, LinmuAttention)]
        new = [b for b in blocks if not getattr(b, "_is_hf_initialized", False)]
        super().initialize_weights()
        for block in new:
            if all(getattr(t, "_is_hf_initialized", False) for t in (*block.parameters(), *block.buffers())):
                continue
            with _loaded_put_aside(block):
                block.reset_new_parameters()


@contextlib.contextmanager
def _loaded_put_aside(block: nn.Module) -> Iterator[None]:
    """While the context is open, copies stand in for a block's loaded tensors: a quantised one cannot be written to,
    nor read as a matrix."""
    loaded: list[tuple[Any, nn.Module, str, Any]] = [
        (held, module, name, p)
        for module in block.modules()
        for held in (module._parameters, module._buffers)
        for name, p in held.items()
        if p is not None and getattr(p, "_is_hf_initialized", False)
    ]
    for held, module, name, p in loaded:
        if held is module._buffers:
            held[name] = p.detach().clone()
            continue
        plain = type(p) is nn.Parameter and type(p.data) is Tensor and p.is_floating_point()
        shape = p.shape
        if not plain and isinstance(module, nn.Linear) and name == "weight":
            shape = torch.Size((module.out_features, module.in_features))
        copy_ = p.detach().clone() if plain else torch.empty(shape, device=p.device)
        held[name] = nn.Parameter(copy_, requires_grad=False)
    try:
        yield
    finally:
        for held, _, name, p in loaded:
            held[name] = p
