"""Asks an attention module itself whether it is softmax attention of the projections that were found in it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attention import sliding_windows
from .shape import AttentionShape

OP = "from_attention"
TOKENS = 61  # of the probe: enough for a module that chooses some of them, and no multiple of what it may fold them by
# Arguments of a forward that are hidden states: of the module's own tokens, and of others.
OWN = ("hidden_states", "x", "hidden", "inputs", "input", "query", "key", "value", "query_states", "hidden_state")
OTHERS = ("key_value_states", "encoder_hidden_states", "context", "memory")
# A module whose own parts turn queries and keys by their positions is another attention on the same input.
TURNS = ("rot", "rope", "pos")


def check_softmax(attention: nn.Module, weights: Mapping[str, Any], shape: AttentionShape) -> None:
    """Raise ValueError where the module makes something else of a few random tokens than softmax attention does.

    What it makes is what a copy of it gives, in evaluation: it is left as it is, and random numbers too. A module that
    cannot be called with hidden states alone, or that brings its own rotary embedding, is not judged.
    """
    kind = type(attention).__name__
    parameters = inspect.signature(attention.forward).parameters
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind in _NAMED]
    others = [name for name in required if name in OTHERS]
    if others:
        _refuse_others(kind, others[0])
    held = (*attention.parameters(), *attention.buffers())
    plain = all(type(t) in (nn.Parameter, Tensor) and not t.is_meta for t in held)
    turns = any(word in name.lower() for name, _ in attention.named_children() for word in TURNS)
    if not plain or turns or isinstance(attention, nn.MultiheadAttention):
        return
    weight = weights["q_weight"]
    length = min([TOKENS, *(size for _, size in sliding_windows(attention) if isinstance(size, int) and size > 0)])
    x = torch.randn(1, length, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    expected = [_softmax(weights, x, shape, causal) for causal in (False, True)]
    errors = []
    for tokens in (x, x.transpose(0, 1), x[None]):  # some take (L, B, D), some (B, 1, L, D)
        # Some turn a part of a head's channels.
        sizes = [shape.head_dim // part for part in (1, 2, 4) if shape.head_dim % part == 0]
        made = (_made_of(attention, parameters, required, tokens, size) for size in sizes)
        out = next((out for out in made if out is not None), None)
        if out is not None:
            errors.append(min(_distance(out.reshape(x.shape), want) for want in expected))
            if errors[-1] < (0.1 if x.element_size() < 4 else 1e-2 if x.is_cuda else 1e-3):  # a GPU may round to TF32
                return
    for name in [] if errors else [name for name in OTHERS if name in parameters]:
        if _made_of(attention, parameters, required, x, shape.head_dim, name) is not None:
            _refuse_others(kind, name)
    if errors:
        raise ValueError(
            f"{OP}: {kind} must be softmax attention of its projections, got outputs that differ by {min(errors):.1%}; "
            "or call load_attention_weights"
        )


def _refuse_others(kind: str, name: str) -> None:
    raise ValueError(f"{OP}: {kind} must attend to its own tokens, got one that needs {name}, which are others")


_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _made_of(
    attention: nn.Module, parameters: Mapping[str, inspect.Parameter], required: list[str], x: Tensor, size: int,
    others: str = "",
) -> Tensor | None:  # fmt: skip
    """What a copy of the module makes of x; None where it cannot be called so. others: an argument that is x too."""
    ones = torch.ones(1, x.shape[-2], size, dtype=x.dtype, device=x.device)
    given: dict[str, Any] = {name: x for name in OWN if name in required or name == next(iter(parameters), None)}
    if "position_embeddings" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given["position_embeddings"] = (ones, torch.zeros_like(ones))
    given |= {others: x} if others else {}
    given |= {name: None for name in required if name not in given}
    if not any(value is x for value in given.values()):
        return None
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            out = copy.deepcopy(attention).eval()(**given)
    except Exception:  # a stranger's forward, called with less than it may need: anything may be missing
        return None
    out = out[0] if isinstance(out, (tuple, list)) else out
    return out if isinstance(out, Tensor) and out.shape == x.shape else None


def _softmax(weights: Mapping[str, Any], x: Tensor, shape: AttentionShape, causal: bool) -> Tensor:
    """Softmax attention of x with the projections that were found."""
    with torch.no_grad():
        q, k, v = (
            F.linear(x, weights[f"{p}_weight"], weights[f"{p}_bias"]).unflatten(2, (-1, shape.head_dim)) for p in "qkv"
        )
        q, k = (t if norm is None else norm(t) for t, norm in ((q, weights["q_norm"]), (k, weights["k_norm"])))
        q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=shape.scale, enable_gqa=shape.num_heads != shape.num_kv_heads
        )
        return F.linear(y.transpose(1, 2).flatten(2).to(x.dtype), weights["o_weight"], weights["o_bias"])


def _distance(out: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30))
