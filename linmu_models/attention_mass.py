"""How much of a teacher's attention each token gets from text, for `calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from .hooks import record_inputs

RECORDED = "linmu_recorded"
_QUERIES_AT_ONCE = 256

_seen: dict[nn.Module, list[tuple[Tensor, Tensor, Tensor | None, float]]] = {}


def _recorded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if module in _seen:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        _seen[module].append((query, key, attention_mask, scale))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(RECORDED, _recorded_attention)
AttentionMaskInterface.register(RECORDED, eager_mask)  # it gives the whole mask, where others leave out a causal one


@torch.no_grad()
def record_mass(
    teacher: Any, attention: nn.Module, inputs: Mapping[str, Any], visual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run `teacher` and see what `attention`, one of its layers, is given and where its text queries look.

    Args:
        inputs: keywords of the teacher's forward.
        visual: (B, L) bool, True at visual tokens; None: all tokens are text.

    Returns:
        hidden_states: (n, D), inputs of the layer at the n tokens that are not padding.
        mass: (n, H), attention from the row's text queries on each token, in units of the row's mean.
    """
    config = teacher.get_decoder().config
    before = config._attn_implementation
    _seen[attention] = []
    try:
        config._attn_implementation = RECORDED
        with record_inputs([attention]) as given:
            teacher.model(**inputs, use_cache=False)
        ((query, key, mask, scale),) = _seen[attention]
    finally:
        config._attn_implementation = before
        del _seen[attention]
    hidden = given[0]["hidden_states"]
    padded = inputs.get("attention_mask")
    real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if padded is None else padded.bool().to(hidden.device)
    asking = real if visual is None else real & ~visual.to(hidden.device)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    masses = []
    for row in range(len(hidden)):
        mass = hidden.new_zeros(key.shape[1], key.shape[2], dtype=torch.float32)
        for queries in asking[row].nonzero()[:, 0].split(_QUERIES_AT_ONCE):
            logits = (query[row][:, queries] @ key[row].mT).float() * scale
            if mask is not None:
                logits += mask[row if len(mask) > 1 else 0][:, queries, : key.shape[2]]
            mass += logits.softmax(-1).sum(1)
        mass = mass[:, real[row]]
        masses.append((mass / mass.mean(1, keepdim=True).clamp(min=1e-20)).T)
    return hidden[real], torch.cat(masses)
