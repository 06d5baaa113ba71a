"""Checks a teacher's attention: a block can do what it does, or the teacher is refused by the name of the part."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linmu_ops import LinmuWarning
from linmu_ops.nn import ExactConfig, MMATEConfig
from linmu_ops.nn._inputs import apply_rotary

from .attention import attention_window
from .config import sees_images
from .hooks import attention_modules, decoder_of, has_attention, record_inputs, record_outputs
from .parts import read_parts

# Of a decoder's configuration: what must not be set, as attention modules name it too, and what it would do.
REFUSED = {
    "attn_logit_softcapping": "scores are capped",
    "clip_qkv": "queries, keys and values are clipped",
    "attn_output_gate": "outputs are gated",
    "use_alibi": "scores fall with distance",
    "alibi": "scores fall with distance",
}
KNOWN_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "attention")
LINEAR_LAYERS = ("linear_attention", "conv")  # in the teacher already; they stay
TOKENS = 12  # of the probe


def check_teacher(
    teacher: PreTrainedModel,
    keep: Iterable[int],
    options: MMATEConfig | ExactConfig,
    facts: Sequence[Mapping[str, bool]],
    prompt_sees_itself: bool = False,
    values: bool = True,
) -> None:
    """Refuse a teacher if a block cannot take the place of one of its layers.

    Args:
        keep: layers that keep their attention; they are not checked.
        options: of the blocks.
        facts: what the block of each layer is told of the attention of this family.
        prompt_sees_itself: as `LinmuModel.prompt_sees_itself` of this family.
        values: also compare outputs, where the teacher is not on the meta device.

    Raises:
        ValueError: a layer has a part or an option that a block has no place for; or a block with the same weights, all
            tokens in its window, gives another output.
    """
    config: Any = teacher.config.get_text_config(decoder=True)
    layers: Any = decoder_of(teacher).layers
    kinds = getattr(config, "layer_types", None) or []
    there = {i for i, kind in enumerate(kinds) if kind in LINEAR_LAYERS and not has_attention(layers[i])}
    kept = {i % len(layers) for i in keep}
    if kept & there:
        raise ValueError(
            f"convert: keep_attention must hold layers with attention, got {min(kept & there)}, which is linear in the "
            "teacher"
        )
    linear = sorted(set(range(len(layers))) - kept - there)
    if not linear:
        return
    for name, what in REFUSED.items():
        value = getattr(config, name, None)
        if value and not (name == "attn_output_gate" and _gated(layers[linear[0]])):
            raise ValueError(f"convert: the teacher's {name} must be off, as a block has none ({what}), got {value!r}")
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("llama_4_scaling_beta"):
        raise ValueError(
            "convert: the teacher's llama_4_scaling_beta must be off, as a block has none (queries grow with their "
            f"position), got {rope['llama_4_scaling_beta']!r}"
        )
    causal = all(getattr(a, "is_causal", True) for a in (getattr(layers[i], "self_attn", None) for i in linear))
    if not causal and not prompt_sees_itself:
        raise ValueError("convert: the teacher's attention must be causal, got one that sees later tokens")
    if getattr(config, "attention_dropout", 0):
        warnings.warn(
            f"convert: attention_dropout={config.attention_dropout} is left out of the blocks", LinmuWarning, 3
        )
    _check_shared(layers, linear)
    _check_temperature(layers, linear)
    _check_chunks(config, kinds, linear, options)
    for index, layer in enumerate(layers):
        if index in there:
            continue
        kind = kinds[index] if index < len(kinds) else "attention"
        attention = getattr(layer, "self_attn", None)
        if not isinstance(attention, nn.Module) or (kind not in KNOWN_LAYERS and index in linear):
            got = f"a {type(layer).__name__} without self_attn" if kind in KNOWN_LAYERS else kind
            raise ValueError(f"convert: layer {index} must have full, sliding or chunked attention, got {got}")
        if index in linear:
            _check_parts(attention, index)
    windows_of = {i: attention_window(getattr(layers[i], "self_attn", None)) for i in linear}
    shortest = min((w for w in windows_of.values() if w), default=None)
    largest = max(math.prod(w) for w in (options.window, options.image_window) if w)
    # Where tokens of an image see each other, a sliding window does not part them.
    within = any(facts[i].get("causal_windows", isinstance(options, ExactConfig)) for i in linear if windows_of[i])
    if shortest is not None and shortest < largest and within and sees_images(teacher.config):
        raise ValueError(
            f"convert: window and image_window must hold at most as many tokens as the teacher's sliding window, "
            f"{shortest}, got {largest}"
        )
    if values and next(decoder_of(teacher).parameters()).device.type != "meta":
        _check_values(teacher, {i: facts[i] for i in linear})


def _check_parts(attention: Any, index: int) -> None:
    name = f"layer {index}'s {type(attention).__name__}"
    try:
        found = read_parts(attention)
    except ValueError as error:
        raise ValueError(f"convert: layer {index}'s {error}") from None
    sinks = [n for n, _ in attention.named_parameters(recurse=False)]
    known = {*found.names.values(), "rotary_emb"}
    parts = [n for n, m in attention.named_children() if n not in known and any(True for _ in m.parameters())]
    if sinks or parts:
        raise ValueError(
            f"convert: {name} must have no part beside its projections and norms, got {(sinks + parts)[0]}"
        )
    size = found.head_dim
    for norm in ("q_norm", "k_norm"):
        weight = getattr(found.norms[norm], "weight", None)
        if weight is not None and tuple(weight.shape) != (size,):
            raise ValueError(f"convert: {name}.{norm} must be of one head, ({size},), got {tuple(weight.shape)}")
    if any(True for _ in getattr(found.norms["v_norm"], "parameters", tuple)()):
        raise ValueError(f"convert: {name}.v_norm must have no weights, as a block's has none, got some")
    for option, what in REFUSED.items():
        if getattr(attention, option, None) and not (option == "attn_output_gate" and found.gated):
            raise ValueError(f"convert: {name}.{option} must be off, as a block has none ({what})")


def _check_shared(layers: Any, linear: list[int]) -> None:
    """Layers that read the keys and values of an earlier one stay attention, and so does that one."""
    attentions: list[Any] = [getattr(layer, "self_attn", None) for layer in layers]
    readers = [i for i, a in enumerate(attentions) if getattr(a, "is_kv_shared_layer", False)]
    kinds = {getattr(attentions[i], "layer_type", None) for i in readers}
    read = [i for i, a in enumerate(attentions) if getattr(a, "store_full_length_kv", False) and a.layer_type in kinds]
    left = sorted({*readers, *read} & set(linear))
    if left:
        raise ValueError(
            f"convert: keep_attention must hold the layers that share keys and values, {sorted({*readers, *read})}, "
            f"got none of {left}"
        )


def _check_temperature(layers: Any, linear: list[int]) -> None:
    def tuned(attention: Any) -> bool:
        # Where queries are rotated, Llama 4 leaves them as they are.
        return bool(getattr(attention, "attn_temperature_tuning", False)) and not getattr(attention, "use_rope", False)

    found = [i for i, layer in enumerate(layers) if tuned(getattr(layer, "self_attn", None))]
    left = sorted(set(found) & set(linear))
    if left:
        raise ValueError(
            f"convert: the teacher's attn_temperature_tuning must be off in layer {left[0]}, as a block has none "
            f"(queries grow with their position); keep_attention={found} keeps the layers that have it"
        )


def _check_chunks(config: Any, kinds: Sequence[str], linear: list[int], options: MMATEConfig | ExactConfig) -> None:
    size = getattr(config, "attention_chunk_size", None)
    windows = (options.window, options.image_window or options.window, (options.text_window,))
    largest = max(math.prod(w) for w in windows)
    if size and size < largest and any(kinds[i] == "chunked_attention" for i in linear if i < len(kinds)):
        raise ValueError(
            f"convert: window, image_window and text_window must hold at most as many tokens as the teacher's "
            f"attention_chunk_size, {size}, got {largest}"
        )


def block_attention(attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """What a block makes of an attention module's weights: softmax attention of `x` (1, L, D), scores in float32."""
    parts = read_parts(attention)
    heads = [parts.apply(part, x).unflatten(-1, (-1, parts.head_dim)) for part in "qkv"]
    for i, name in enumerate(("q_norm", "k_norm", "v_norm")):
        norm = parts.norms[name]
        if norm is not None:
            heads[i] = norm(heads[i])
    turn = None if rotary is None else (rotary[0].float(), rotary[1].float())
    heads[:2] = (apply_rotary(head.float(), turn, interleaved) for head in heads[:2])
    q, k, v = (t.float().transpose(1, 2) for t in heads)
    y = nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        is_causal=getattr(attention, "is_causal", True),
        scale=parts.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    y = y.transpose(1, 2).flatten(2).to(x.dtype)
    return parts.apply("o", y * parts.apply("gate", x).sigmoid() if parts.gated else y)


def _gated(layer: Any) -> bool:
    try:
        return read_parts(layer.self_attn).gated
    except (AttributeError, ValueError):
        return False


@torch.no_grad()
def find_facts(teacher: Any, keep: Iterable[int], together: str) -> dict[str, Any]:
    """What the blocks of a teacher without an adapter are told: how its attention turns queries and keys, and the
    layers in which tokens of an image see each other.

    Layers that keep their attention, or that no turning explains, are left out; the checks of a teacher name these.
    """
    attentions = {i: a for i, a in attention_modules(teacher).items() if i not in set(keep)}
    turns: dict[int, str] = {}
    for index, (module, given, out) in zip(
        attentions, _probe(decoder_of(teacher), list(attentions.values())), strict=True
    ):
        if given.get("position_embeddings") is None:
            continue
        try:
            errors = {
                "unrotated": _distance(module, given["hidden_states"], out, None, False),
                "interleaved": _distance(module, given["hidden_states"], out, given["position_embeddings"], True),
                "plain": _distance(module, given["hidden_states"], out, given["position_embeddings"], False),
            }
        except (ValueError, RuntimeError):  # named by `check_teacher`
            continue
        turns[index] = min(errors, key=lambda name: (errors[name], name))
    facts: dict[str, Any] = {}
    if turns and set(turns.values()) <= {"interleaved", "unrotated"} and "interleaved" in turns.values():
        facts["interleaved_rotary"] = True
    unrotated = [index for index, how in turns.items() if how == "unrotated"]
    if unrotated:
        facts["unrotated"] = unrotated
    if together in ("sliding", "everywhere"):
        facts["together"] = [i for i, a in attentions.items() if together == "everywhere" or attention_window(a)]
    return facts


def _distance(module: Any, x: Tensor, out: Tensor, rotary: Any, interleaved: bool) -> float:
    """How far a module's output is from that of a block with its weights."""
    limit = min(attention_window(module) or TOKENS, TOKENS)
    expected = block_attention(module, x, rotary, interleaved).double()[:, :limit]
    return float((out.double()[:, :limit] - expected).norm() / expected.norm().clamp(min=1e-30))


@torch.no_grad()
def _check_values(teacher: Any, facts: Mapping[int, Mapping[str, bool]]) -> None:
    decoder = decoder_of(teacher)
    modules = [attention_modules(teacher)[i] for i in facts]
    for index, (module, given, out) in zip(facts, _probe(decoder, modules), strict=True):
        interleaved = facts[index].get("interleaved_rotary", False)
        rotary = given.get("position_embeddings") if facts[index].get("rotates", True) else None
        error = _distance(module, given["hidden_states"], out, rotary, interleaved)
        if not error < (1e-3 if out.dtype in (torch.float32, torch.float64) else 0.1):
            raise ValueError(
                f"convert: layer {index}'s {type(module).__name__} must be softmax attention of its projections "
                f"with {'interleaved' if interleaved else 'plain'} rotary embeddings, got outputs that differ by "
                f"{error:.1%}"
            )


def _probe(decoder: nn.Module, modules: list[nn.Module]) -> Iterator[tuple[nn.Module, dict[str, Any], Tensor]]:
    """Each module, what it is given and what it makes of it, for a few random tokens."""
    weight = decoder.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.randint(len(weight), (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(weight.device)
    training = decoder.training
    decoder.eval()
    try:
        with record_inputs(modules) as inputs, record_outputs(modules) as outputs:
            decoder(input_ids=ids, use_cache=False)
    finally:
        decoder.train(training)
    for module, given, out in zip(modules, inputs, outputs, strict=True):
        assert out is not None
        yield module, given, out
