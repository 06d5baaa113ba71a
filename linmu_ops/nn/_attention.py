"""What the attention modules of others hold: their projections, norms and scale, and what a block has no place for."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._registry import LinmuWarning

NAMES = {  # in transformers, timm, torchvision, diffusers
    "q": ("q_proj", "query", "to_q", "wq"),
    "k": ("k_proj", "key", "to_k", "wk"),
    "v": ("v_proj", "value", "to_v", "wv"),
    "o": ("o_proj", "out_proj", "dense", "proj", "to_out", "Wo", "wo", "c_proj"),
    "qkv": ("qkv", "qkv_proj", "Wqkv", "c_attn", "query_key_value", "in_proj"),
    "q_norm": ("q_norm", "q_layernorm", "norm_q"),
    "k_norm": ("k_norm", "k_layernorm", "norm_k"),
}
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
SCALES = ("scaling", "scale", "softmax_scale")
# Of the module or its config: values other than these change the result. The words say what it is.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(
        ("attn_logit_softcapping", "attn_logit_softcap", "attention_logit_softcapping", "softcap"),
        ((None, 0, False), "softcapping of scores"),
    ),
    **dict.fromkeys(("clip_qkv",), ((None, 0, False), "clipping of queries, keys and values")),
    **dict.fromkeys(("alibi", "use_alibi"), ((None, False), "ALiBi")),
    **dict.fromkeys(
        ("has_relative_attention_bias", "use_rel_pos", "position_embedding_type"),
        ((None, False, "absolute"), "relative positions"),
    ),
    **dict.fromkeys(("is_cross_attention", "added_kv_proj_dim"), ((None, False), "keys of other tokens")),
    "is_kv_shared_layer": ((None, False), "keys of another layer"),
    "attn_temperature_tuning": ((None, False, 0), "a temperature by position"),
    "add_zero_attn": ((None, False), "a key of zeros"),
    "scale_attn_by_inverse_layer_idx": ((None, False), "a scale by layer"),
    "scale_attn_weights": ((None, True), "scores without a scale"),
    "residual_connection": ((None, False), "a residual connection inside"),
    "rescale_output_factor": ((None, 1), "a scale of the output"),
    "scaled_cosine": ((None, False), "cosine attention"),
    "key_multiplier": ((None, 1), "a scale of the keys"),
}
# Modules whose scores have no scale, and that do not say so.
UNSCALED = ("GPTNeoSelfAttention",)
ALIBI_ARGUMENTS = ("alibi", "position_bias")
WINDOWS = ("sliding_window", "attention_chunk_size")
DROPOUTS = ("attention_dropout", "attn_dropout", "attn_drop", "dropout", "resid_dropout", "proj_drop", "to_out")

OP = "from_attention"  # what errors begin with


class Parts(NamedTuple):
    """The linear maps of an attention module, the bias None where there is none, and what they are called there."""

    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    names: dict[str, str]
    norms: dict[str, nn.Module | None]


def first(module: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(module, n) for n in names if getattr(module, n, None) is not None), None)


def read(attention: nn.Module, heads: int | None, reach: int) -> Parts:
    """The parts of an attention module; what a block cannot do as it does is refused by name.

    reach: how many tokens the block's windows hold, if they are causal as the module's.
    """
    kind = type(attention).__name__
    used: set[str] = set()
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor | None] = {}
    names: dict[str, str] = {}
    for part in "qkvo":
        found = _linear(attention, part)
        if found is not None:
            names[part], weights[part], biases[part] = found
    fused = _fused(attention)
    missing = [part for part in "qkvo" if part not in weights and (fused is None or part == "o")]
    if missing:
        raise ValueError(
            f"{OP}: {kind} must have a projection for {', '.join(missing)}, under a name such as "
            f"{', '.join(NAMES[missing[0]])}; or call load_attention_weights"
        )
    if heads is None:
        raise ValueError(f"{OP}: num_heads must be given for {kind}, got None")
    if fused is not None:
        _split(attention, heads, fused, weights, biases, names)
    used |= set(names.values())
    width = weights["o"].shape[1]
    if weights["q"].shape[0] == 2 * width:
        raise ValueError(
            f"{OP}: {kind}.{names['q']} must have {width} rows, one for each column of {names['o']}, got {2 * width}: "
            "a block has no place for an output gate"
        )
    for part, weight in weights.items():
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise TypeError(f"{OP}: {kind}.{names[part]}.weight must be of a float dtype, got {dtype}; dequantise it")
    norms: dict[str, nn.Module | None] = {}
    for part in ("q_norm", "k_norm"):
        name = next((n for n in NAMES[part] if getattr(attention, n, None) is not None), None)
        norm = None if name is None else getattr(attention, name)
        norms[part] = None if isinstance(norm, nn.Identity) else norm
        if name is not None and norms[part] is not None:
            names[part] = name
            used.add(name)
            _check_norm(kind, name, norms[part], width // heads)
    if (norms["q_norm"] is None) != (norms["k_norm"] is None):
        raise ValueError(f"{OP}: {kind} must have norms of both queries and keys, or none, got one of them")
    _refuse_the_rest(attention, used, reach)
    return Parts(weights, biases, names, norms)


def _linear(attention: nn.Module, part: str) -> tuple[str, Tensor, Tensor | None] | None:
    """Name, weight (out, in) and bias of a projection."""
    for name in NAMES[part]:
        module = getattr(attention, name, None)
        if isinstance(module, (nn.ModuleList, nn.Sequential)):  # diffusers: Linear, Dropout
            linears = [m for m in module if not isinstance(m, (nn.Dropout, nn.Identity))]
            module = linears[0] if len(linears) == 1 else None
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            # transformers' Conv1D, of GPT-2, holds (in, out).
            turned = type(module).__name__ == "Conv1D"
            return name, weight.T if turned else weight, getattr(module, "bias", None)
    return None


def _fused(attention: nn.Module) -> tuple[str, Tensor, Tensor | None] | None:
    weight = getattr(attention, "in_proj_weight", None)
    if isinstance(weight, Tensor):
        return "in_proj_weight", weight, getattr(attention, "in_proj_bias", None)
    return _linear(attention, "qkv")


def _split(
    attention: nn.Module,
    heads: int,
    fused: tuple[str, Tensor, Tensor | None],
    weights: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    names: dict[str, str],
) -> None:
    """Part one projection into those of queries, keys and values. The layout is the module's own secret."""
    kind = type(attention).__name__
    name, weight, bias = fused
    width = weights["o"].shape[1]
    size = width // heads
    rows = torch.arange(weight.shape[0])
    if len(rows) < width or (len(rows) - width) % (2 * size):
        raise ValueError(
            f"{OP}: {kind}.{name} must have (H + 2 G) P rows with H P = {width} and P = {size}, got {len(rows)}"
        )
    layout = _layout(attention, name)
    if layout == "joined":
        parts = rows.split([width, *[(len(rows) - width) // 2] * 2])
    else:
        # Falcon's groups: the queries of a key, the key, the value; one query each in BLOOM and GPT-NeoX.
        groups = heads if layout == "by head" else (len(rows) - width) // (2 * size)
        each = rows.view(groups, -1, size)
        parts = (each[:, :-2].flatten(), each[:, -2].flatten(), each[:, -1].flatten())
    for part, at in zip("qkv", parts, strict=True):
        names[part] = name
        weights[part], biases[part] = weight[at.to(weight.device)], None if bias is None else bias[at.to(bias.device)]


def _layout(attention: nn.Module, name: str) -> str:
    """How a fused projection orders its rows: "joined" (q, k, v), "by head" or "by group"."""
    kind, module = type(attention).__name__, getattr(attention, name, None)
    many = getattr(attention, "multi_query", None)
    if name == "query_key_value" and not hasattr(attention, "multi_query_attention"):
        if getattr(attention, "new_decoder_architecture", False):
            return "by group"
        return "joined" if many else "by head"
    if name == "c_attn" and type(module).__name__ != "Conv1D" and many is not None:
        return "joined" if many else "by head"
    known = name != "query_key_value" and (name != "c_attn" or type(module).__name__ == "Conv1D")
    if not known or kind.startswith("CodeGen"):
        raise ValueError(
            f"{OP}: {kind}.{name} must order queries, keys and values in a way that is known, got one that is not; "
            "call load_attention_weights"
        )
    return "joined"


def _check_norm(kind: str, name: str, norm: Any, size: int) -> None:
    if any(isinstance(module, nn.ModuleList) for module in norm.modules()):
        raise ValueError(f"{OP}: {kind}.{name} must be one norm for all heads, got a list of them")
    sizes = {tuple(p.shape) for p in norm.parameters()}
    if sizes - {(size,), (1,), ()}:
        largest = max(map(math.prod, sizes))
        raise ValueError(f"{OP}: {kind}.{name} must be a norm of one head of {size} channels, got one of {largest}")


def _values(attention: nn.Module, name: str) -> Iterator[Any]:
    """The module's own, else its config's."""
    config = getattr(attention, "config", None)
    if hasattr(attention, name):
        yield getattr(attention, name)
    elif hasattr(config, name):
        yield getattr(config, name)


def _refuse_the_rest(attention: nn.Module, used: set[str], reach: int) -> None:
    """Whatever else changes the result of the module, and would be lost."""
    kind = type(attention).__name__

    def refuse(name: str, what: str, value: Any) -> None:
        raise ValueError(f"{OP}: {kind} must be without {name}, {what}, which a block cannot do, got {value}")

    for name, (neutral, what) in NEUTRAL.items():
        for value in _values(attention, name):
            if isinstance(value, (Tensor, nn.Module)):
                refuse(name, what, type(value).__name__)
            elif value not in neutral:
                refuse(name, what, repr(value))
    for value in _values(attention, "rope_parameters"):
        beta = value.get("llama_4_scaling_beta") if isinstance(value, dict) else None
        if beta:
            refuse("llama_4_scaling_beta", "a temperature by position", repr(beta))
    for name in ALIBI_ARGUMENTS:
        takes = name in inspect.signature(attention.forward).parameters
        if takes and not any(value is False for value in _values(attention, "alibi")):
            refuse(name, "ALiBi", "an argument of its forward")
    allowed = used | {"in_proj_bias"}
    for name, parameter in attention.named_parameters(recurse=False):
        if name not in allowed:
            refuse(name, "a parameter", f"shape {tuple(parameter.shape)}")
    for name, child in attention.named_children():
        changes = not isinstance(child, nn.Identity) and (list(child.parameters()) or "norm" in name.lower())
        if name not in allowed and changes:
            refuse(name, "a module", type(child).__name__)
    for name, value in sliding_windows(attention):
        if isinstance(value, int) and 0 < value < reach:
            raise ValueError(
                f"{OP}: {kind}.{name} must not be shorter than the block's windows of {reach} tokens, got {value}"
            )
    for name in DROPOUTS:
        for value in _values(attention, name):
            inside = [m for m in value.modules() if isinstance(m, nn.Dropout)] if isinstance(value, nn.Module) else []
            rate = max((m.p for m in inside), default=value if isinstance(value, float) else 0.0)
            if rate > 0:
                warnings.warn(f"{OP}: {kind}.{name} of {rate} is left out of the block", LinmuWarning, stacklevel=5)


def sliding_windows(attention: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and size of each sliding window that this layer has."""
    config: Any = getattr(attention, "config", None)
    for name in WINDOWS if _slides(attention) else ():
        yield from ((name, value) for value in _values(attention, name))
    layers = getattr(config, "attention_layers", None)  # GPT-Neo names its windows by layer
    if layers and layers[getattr(attention, "layer_id", None) or 0] == "local":
        yield "window_size", config.window_size


def _slides(attention: nn.Module) -> bool:
    """Whether this layer's window is in use; a config may name one for other layers."""
    flags = [value for name in ("use_sliding_window", "is_sliding") for value in _values(attention, name)]
    return all(flag is not False for flag in flags)
