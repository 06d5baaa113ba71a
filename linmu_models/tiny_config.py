"""A configuration like a given one, so small that its decoder is built in milliseconds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

VOCABULARY = 512
_WIDTH, _HEADS, _HEAD = 64, 4, 16
# What a field of the decoder becomes, by its name: the first pattern that matches it.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size\w*", VOCABULARY),
    (r"(moe|expert|shared_expert)\w*_(intermediate|hidden)_size|intermediate_size\w*|ffn_dim|\w*_ffn_dim", 64),
    (r"hidden_size_per_layer_input", 8),
    (r"hidden_size|d_model|n_embd|embed_dim|word_embed_proj_dim", _WIDTH),
    (r"num_attention_heads|n_head|decoder_attention_heads|attention_heads", _HEADS),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"qk_rope_head_dim|qk_nope_head_dim", 8),
    (r"\w*head_dim\w*", _HEAD),
    (r"\w*_lora_rank", 16),
    (r"num_experts_per_tok|top_k_experts|moe_top_?k|moe_num_experts_per_tok|moe_k", 2),
    (r"n_group|topk_group", 1),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
)
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "layers")
_TOKEN = re.compile(r"(^|_)(tokens?|token_ids?|token_index|idx|id)$")
_WIDTHS = ("text_hidden_size", "out_hidden_size", "llm_hidden_size", "projection_dim")
_MOST = 8  # layers


def tiny_config(config: Any, vocabulary: int | None = VOCABULARY) -> Any:
    """A small configuration of the same class, whose decoder has the same kinds of layers and attention.

    Only the decoder shrinks, and the numbers of tokens. All kinds of layers stay, in their order. vocabulary: its size;
    None: as it is.
    """
    values = config.to_dict()
    text = values
    for name in _path(config, config.get_text_config(decoder=True)) or ():
        text = text[name]
    width = text.get("hidden_size")
    words = {name: value for name, value in text.items() if name.startswith("vocab_size")}
    _shrink(text)
    if vocabulary is None:
        text |= words
    else:
        _renumber(values, {})
    _join(values, text, width)
    for key in ("transformers_version", "architectures"):
        values.pop(key, None)
    return type(config).from_dict(values)


def _path(config: Any, wanted: Any) -> list[str] | None:
    """The names of the fields that lead from a configuration to one within it."""
    if config is wanted:
        return []
    for name in getattr(type(config), "sub_configs", {}):
        inner = getattr(config, name, None)
        below = None if inner is None else _path(inner, wanted)
        if below is not None:
            return [name, *below]
    return None


def _join(values: dict[str, Any], text: dict[str, Any], width: int | None) -> None:
    """Other parts name the decoder's width, too."""
    for name, value in values.items():
        if isinstance(value, dict) and value is not text:
            _join(value, text, width)
        elif (
            (name in _WIDTHS or (name == "hidden_size" and text in values.values()))
            and value == width
            and width is not None
            and values is not text
        ):
            values[name] = text["hidden_size"]


def _shrink(text: dict[str, Any]) -> None:
    depth = next((text[name] for name in _DEPTHS if isinstance(text.get(name), int)), 0)
    picked = _layers(text, depth)
    key_heads = text.get("num_key_value_heads"), text.get("num_attention_heads")
    head = text.get("head_dim") or (text.get("hidden_size") or 0) // (text.get("num_attention_heads") or 1)
    for name, value in list(text.items()):
        if name in _DEPTHS and value == depth:
            text[name] = len(picked)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            text[name] = _of_layers(name, list(value), picked, depth)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            text[name] = {
                picked.index(int(i)): {n: _size(n, v) for n, v in one.items()}
                for i, one in value.items()
                if str(i).isdigit() and int(i) in picked
            }
        else:
            text[name] = _size(name, value)
    if key_heads[0] is not None:
        text["num_key_value_heads"] = {1: 1, key_heads[1]: _HEADS}.get(key_heads[0], 2)
    if text.get("num_kv_shared_layers"):
        text["num_kv_shared_layers"] = sum(i >= depth - text["num_kv_shared_layers"] for i in picked)
    if "qk_head_dim" in text:
        text["qk_head_dim"] = text.get("qk_rope_head_dim", 8) + text.get("qk_nope_head_dim", 8)
    _sections(text, head)


def _size(name: str, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        for pattern, size in _SIZES:
            if re.fullmatch(pattern, name):
                return size if name.startswith("vocab") else min(size, value)
    return value


def _layers(text: Mapping[str, Any], depth: int) -> list[int]:
    """Layers that stay: the first of each kind, and as few others as make two."""
    kinds: list[tuple[Any, ...]] = [() for _ in range(depth)]
    for name, value in text.items():
        if not isinstance(value, Sequence) or isinstance(value, str):
            continue
        if len(value) == depth:
            kinds = [(*kind, str(one)) for kind, one in zip(kinds, value, strict=True)]
        elif _numbers_layers(name, value, depth):
            kinds = [(*kind, i in value) for i, kind in enumerate(kinds)]
    shared = text.get("num_kv_shared_layers") or 0
    kinds = [(*kind, i >= depth - shared) for i, kind in enumerate(kinds)]
    found = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:_MOST]
    return sorted({*found, *range(min(2, depth))})


def _numbers_layers(name: str, value: Any, depth: int) -> bool:
    return "layer" in name and all(isinstance(i, int) and 0 <= i < depth for i in value) and 0 < len(value) < depth


def _of_layers(name: str, value: list[Any], picked: Sequence[int], depth: int) -> list[Any]:
    if depth and len(value) == depth:
        return [value[i] for i in picked]
    if _numbers_layers(name, value, depth):
        return [picked.index(i) for i in value if i in picked]
    return value


def _sections(values: Any, head: int) -> None:
    """The parts of a head that turn with time, height and width, in the proportions of the large one."""
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        if name == "mrope_section" and isinstance(value, Sequence) and head:
            values[name] = _parts(list(value), round(sum(value) * _HEAD / head))
        else:
            _sections(value, head)


def _parts(value: list[int], total: int) -> list[int]:
    parts = [max(1, math.floor(v * total / sum(value))) if v else 0 for v in value]
    parts[-1] += total - sum(parts)
    return parts


def _renumber(values: Any, new: dict[int, int]) -> None:
    """Give tokens outside the small vocabulary a number within it, each its own."""
    if isinstance(values, list):
        for value in values:
            _renumber(value, new)
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        if not _TOKEN.search(str(name)):
            _renumber(value, new)
        elif isinstance(value, list):
            values[name] = [_number(v, new) for v in value]
        else:
            values[name] = _number(value, new)


def _number(value: Any, new: dict[int, int]) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or value < VOCABULARY:
        return value
    return new.setdefault(value, VOCABULARY - 2 - len(new))
