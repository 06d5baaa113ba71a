"""Fits new blocks to the attention that they replace, on a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linmu_ops import TokenLayout

from .accumulated_attention import read_later, record_attention
from .attention import LinmuAttention
from .hooks import attention_modules, decoder_of, record_inputs, record_outputs
from .masks import place_by_mask

# Layers whose inputs and outputs are kept at a time: fewer cost more runs of the teacher, more cost memory.
_TOGETHER = 8


def as_batches(name: str, batches: Any) -> list[dict[str, Any]]:
    """Batches as dicts without their labels.

    Args:
        name: what errors call them.

    Raises:
        TypeError: these are no batches.
        ValueError: a batch has no `input_ids` (B, L).
    """
    rule = f"{name} must be a list of dicts, the teacher's inputs"
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"{rule}, got {type(batches).__name__}")
    checked = []
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(f"{rule}, got {type(batch).__name__} among them")
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            got = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"{name} must have input_ids (B, L) in each batch, got {got}")
        checked.append({key: value for key, value in batch.items() if key != "labels"})
    return checked


@torch.no_grad()
def calibrate(student: Any, teacher: Any, batches: Iterable[Mapping[str, Any]], *, step_sizes: bool = False) -> None:
    """Fit each block of `student` to the teacher's attention at its layer.

    The input of a block is what the teacher's attention gets. The block's `calibrate` says what is fitted.

    Args:
        student: made from `teacher` by `convert`, on the same devices.
        teacher: runs several times over each batch, each time for a few layers, so that only theirs is kept.
        batches: keywords of the teacher's forward; `labels` are left out.
        step_sizes: first fit each block's step sizes to the attention that tokens get from text (see
            `Scan.fit_step_sizes`). So a block remembers from the start what the teacher looks at. In all other fits a
            token then counts half by what text reads of it in later layers. For this the teacher runs once more, and
            the attention of text is computed in full, a few hundred rows at a time.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a batch has no `input_ids`, or the models differ in their number of layers.
    """
    if not hasattr(student, "block_inputs"):
        raise TypeError(f"calibrate: student must be a model that `convert` made, got {type(student).__name__}")
    if not hasattr(teacher, "get_decoder"):
        raise TypeError(f"calibrate: teacher must be a transformers model, got {type(teacher).__name__}")
    if not isinstance(step_sizes, bool):
        raise TypeError(f"calibrate: step_sizes must be a bool, got {step_sizes!r}")
    batches = as_batches("calibrate: batches", batches)
    ours, theirs = attention_modules(student), attention_modules(teacher)
    if ours.keys() != theirs.keys():
        raise ValueError(f"calibrate: teacher must have the student's {len(ours)} layers, got {len(theirs)}")
    placed = place_by_mask(getattr(teacher, "model", teacher), decoder_of(teacher))
    try:
        _fit(student, teacher, batches, ours, theirs, step_sizes)
    finally:
        for hook in placed:
            hook.remove()


def _fit(
    student: Any,
    teacher: Any,
    batches: Sequence[Mapping[str, Any]],
    ours: Mapping[int, nn.Module],
    theirs: Mapping[int, nn.Module],
    step_sizes: bool,
) -> None:
    shared = [student.block_inputs(inputs, inputs["input_ids"].shape[1]) for inputs in batches]
    layouts = [inputs.layout for inputs in shared]
    linear = {i: (block, theirs[i]) for i, block in ours.items() if isinstance(block, LinmuAttention)}
    looks = [_looks_of_text(teacher, *pair) for pair in zip(batches, layouts, strict=True) if step_sizes]
    for start in range(0, len(linear), _TOGETHER):
        numbers = list(linear)[start : start + _TOGETHER]
        blocks, attentions = zip(*(linear[i] for i in numbers), strict=True)
        seen: list[list[tuple[dict[str, Any], Any]]] = [[] for _ in blocks]
        for inputs, common in zip(batches, shared, strict=True):
            with record_inputs(attentions) as given, record_outputs(attentions) as made:
                getattr(teacher, "model", teacher)(**inputs, use_cache=False)
            for block, kept, arguments, output in zip(blocks, seen, given, made, strict=True):
                if not block.rotates:
                    arguments.pop("position_embeddings", None)
                padding, sequences = (
                    None if t is None else t.to(output.device) for t in (common.padding, common.seq_idx)
                )
                call = dict(layout=common.layout, attention_mask=padding, seq_idx=sequences)
                kept.append(({**arguments, **call}, output))
        for number, block, kept in zip(numbers, blocks, seen, strict=True):
            if looks and block.scan is not None:
                hidden = [arguments["hidden_states"] for arguments, _ in kept]
                found = [batch.at_layer(number, states) for batch, states in zip(looks, hidden, strict=True)]
                block.scan.fit_step_sizes(*(torch.cat(parts) for parts in zip(*found, strict=True)))
            block.calibrate(kept, [batch.later[number] for batch in looks] or None)


@dataclass
class _Looks:
    """Where the text of a batch looks."""

    real: Tensor
    """(B, L) bool: tokens that are not padding."""
    received: dict[int, Tensor]
    """For each layer with attention (B, H, L): the attention that each token gets from its row's text."""
    later: dict[int, Tensor]
    """For each layer with attention (B, L): how much text reads of its output in later layers."""

    def at_layer(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) and (n, H): of the n tokens that are not padding, the rows of `hidden`, (B, L, D), and how much their
        row's text looks at each, in units of the row's mean."""
        real = self.real.to(hidden.device)
        rows = [row[kept] for row, kept in zip(self.received[number].mT.to(hidden.device), real, strict=True)]
        return hidden[real], torch.cat([row / row.mean(0, keepdim=True).clamp(min=1e-20) for row in rows])


def _looks_of_text(teacher: Any, inputs: Mapping[str, Any], layout: TokenLayout | None) -> _Looks:
    ids, padded = inputs["input_ids"], inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if padded is None else padded.bool().to(ids.device)
    text = real if layout is None else real & ~layout.visual_mask(ids.device)
    attentions = attention_modules(teacher)
    with record_attention(teacher, list(attentions.values()), text) as received:
        getattr(teacher, "model", teacher)(**inputs, use_cache=False)
    later = read_later(received, text)
    return _Looks(real, dict(zip(attentions, received, strict=True)), dict(zip(attentions, later, strict=True)))
