"""Finds where sequences begin in rows that hold several, as the collators of transformers and TRL make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linmu_ops import TokenLayout

NAMES = ("position_ids", "seq_idx", "cu_seq_lens_q")


@torch.compiler.disable
def find_sequences(inputs: Mapping[str, Any], batch: int, length: int, padding: Tensor | None) -> Tensor | None:
    """Number the sequences of each row.

    Args:
        inputs: keywords of a model's forward. Any of these tell the sequences:
            position_ids: start anew in each sequence. (B or 1, L), with a leading dimension of 1 or not; (3, B, L); or
                (4, B, L), with those of text first.
            seq_idx: (B, L). Changes where a sequence begins.
            cu_seq_lens_q: (n + 1,). Where each of n sequences of the one row begins, and L at last.
        padding: (B, L) bool, False at padding. Padding may have any of these values.

    Returns:
        (B, L) int32: 0, 1, ... None where each row is one sequence.

    Raises:
        ValueError: these contradict each other, or have another shape.
        TypeError: one is no tensor, or not of integers; position_ids may be of any real numbers.
    """
    for name in (*NAMES, "cu_seq_lens_k"):
        _check_kind(name, inputs.get(name))
    found = {name: inputs[name] for name in NAMES if inputs.get(name) is not None}
    if not found or length < 2 or not batch:
        return None
    device = next(iter(found.values())).device
    real = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding
    real = real.to(device)
    places = torch.arange(length, device=device)
    latest = torch.where(real, places, -1).cummax(1).values
    before = torch.cat((latest.new_full((batch, 1), -1), latest[:, :-1]), dim=1)  # the token before, padding left out
    follows = real & (before >= 0)
    at = before.clamp(min=0)
    begins: dict[str, Tensor] = {}
    if "position_ids" in found:
        begins["position_ids"] = follows & _starts_anew(found["position_ids"], batch, length, at, real)
    if "seq_idx" in found:
        numbers = found["seq_idx"].to(device)
        if tuple(numbers.shape) != (batch, length):
            raise ValueError(f"linmu: seq_idx must be (B, L) = {(batch, length)}, got shape {tuple(numbers.shape)}")
        begins["seq_idx"] = follows & (numbers != numbers.gather(1, at))
    if "cu_seq_lens_q" in found:
        begins["cu_seq_lens_q"] = _from_lengths(inputs, batch, length).to(device) & follows
    (first, where), *others = begins.items()
    for name, other in others:
        if not torch.equal(where, other):
            row, token = (where != other).nonzero()[0].tolist()
            raise ValueError(
                f"linmu: {first} and {name} must agree where a sequence begins, "
                f"got one of them at row {row}, token {token}"
            )
    return where.cumsum(1, dtype=torch.int32) if where.any() else None


def _check_kind(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"linmu: {name} must be a tensor, got a {type(value).__name__}")
    if value.is_complex() or (value.is_floating_point() and name != "position_ids"):
        kind = "real numbers" if name == "position_ids" else "integers"
        raise TypeError(f"linmu: {name} must be {kind}, got {str(value.dtype).removeprefix('torch.')}")


def _starts_anew(positions: Tensor, batch: int, length: int, before: Tensor, real: Tensor) -> Tensor:
    """(B, L) bool: where the position is not after that of the token before."""
    if positions.dim() == 3 and positions.shape[0] in (1, 4):
        positions = positions[0]
    wanted = (3, batch, length) if positions.dim() == 3 else (batch, length)
    *first, rows, last = (0, 0, *positions.shape)[-max(positions.dim(), 2) :]
    if last != length or rows not in (1, batch) or tuple(first) != wanted[:-2]:
        raise ValueError(f"linmu: position_ids must be (B, L) = {wanted[-2:]}, got shape {tuple(positions.shape)}")
    positions = positions.expand(wanted)
    if positions.dim() == 2:
        return positions <= positions.gather(1, before)
    # Of time, height and width, each may fall back within a sequence (after a video, in an image), but one of a
    # token's three is always above those of the first token.
    highest = positions.amax(0)
    none = torch.finfo(highest.dtype).max if highest.is_floating_point() else torch.iinfo(highest.dtype).max
    lowest = torch.where(real, highest, none).cummin(1).values
    return highest <= lowest.gather(1, before)


def _from_lengths(inputs: Mapping[str, Any], batch: int, length: int) -> Tensor:
    if inputs["cu_seq_lens_q"].dim() != 1:
        shape = tuple(inputs["cu_seq_lens_q"].shape)
        raise ValueError(f"linmu: cu_seq_lens_q must be (n + 1,), of n sequences, got shape {shape}")
    ends = inputs["cu_seq_lens_q"].tolist()
    other = inputs.get("cu_seq_lens_k")
    if other is not None and other.tolist() != ends:
        raise ValueError("linmu: cu_seq_lens_k must be cu_seq_lens_q, got another")
    if batch != 1 or not ends or ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
        raise ValueError(
            f"linmu: cu_seq_lens_q must rise from 0 to L={length} in one row, got {ends[:1]} to {ends[-1:]} in {batch}"
        )
    begins = torch.zeros(1, length, dtype=torch.bool)
    begins[0, [end for end in ends if 0 < end < length]] = True
    return begins


def positions_in(sequences: Tensor) -> Tensor:
    """(B, L) int64: each token's place in its sequence, of numbers as `find_sequences` makes them."""
    places = torch.arange(sequences.shape[1], device=sequences.device).expand_as(sequences)
    begins = torch.zeros_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    return places - torch.where(begins, places, 0).cummax(1).values


def check_blocks(layout: TokenLayout, sequences: Tensor) -> None:
    """An image or a video lies in one sequence."""
    blocks, numbers = layout.reverse_seq_idx(), sequences.cpu()
    cut = (numbers[:, 1:] != numbers[:, :-1]) & (blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] > 0)
    if cut.any():
        row, token = cut.nonzero()[0].tolist()
        raise ValueError(
            f"linmu: an image or video must lie in one sequence, got one that row {row} cuts at token {token + 1}"
        )
