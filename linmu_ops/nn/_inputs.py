"""What the modules share about their inputs: where visual tokens are, and the rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _transforms
from .._dims import autocasts
from .._traced_layout import TracedGrid
from ..context_parallel import ContextParallel, SlabLayout
from ..token_layout import Partition, TokenLayout
from .state import MMATEState, on_host

Rotary = tuple[Tensor, Tensor]
Triple = tuple[int, int, int]

_RIDGE = 1e-3
_LOGITS = 8.0  # outside of this range a sigmoid is all but constant
_LOGISTIC_STEPS = 30


class Call(NamedTuple):
    """What one forward gives every part of a block beside the hidden states; checked, and without padding's values.

    Attributes:
        layout: where the visual tokens are; None where no token is visual.
        rotary: (cos, sin), each (B or 1, L, R), or None.
        mask: (B, L) bool, False at padding, or None.
        state: what an earlier call left, or None.
        keep: whether the state after these tokens is wanted.
        seq_idx: (B, L) int32, the number of a token's sequence, 0, 1, ...; None where each row is one.
        context: how rows are split, of which these are slabs; None where they are whole. `layout` is the slab's too.
        borders: what an `ExactMMATE` gets from other ranks, where rows are split.
    """

    layout: TokenLayout | None
    rotary: Rotary | None
    mask: Tensor | None
    state: MMATEState | None
    keep: bool
    seq_idx: Tensor | None
    context: ContextParallel | None = None
    borders: Any = None


def slab_layout(
    op: str,
    context: ContextParallel,
    hidden_states: Tensor,
    layout: TokenLayout | SlabLayout | None,
    grid: Sequence[int] | None,
) -> SlabLayout:
    """The slab's part of a layout of whole rows, or of a grid that is one."""
    context.check(op, "hidden_states", hidden_states)
    if layout is not None and grid is not None:
        raise ValueError(f"{op}: layout must be None where grid is given, got both")
    if grid is not None:
        layout = TokenLayout.from_grid(grid, hidden_states.shape[0])
    if layout is None:
        layout = TokenLayout([], [], hidden_states.shape[0], context.length)
    return SlabLayout(context, layout) if isinstance(layout, TokenLayout) else layout


def check_inputs(
    op: str,
    hidden_states: Tensor,
    dim: int,
    layout: TokenLayout | None,
    grid: Sequence[int] | None,
    attention_mask: Tensor | None,
    layer_idx: int,
    windows: Partition | None,
) -> TokenLayout | None:
    """Check the tensors every module takes, and return the layout; None where no token is visual."""
    if hidden_states.dim() != 3 or hidden_states.shape[2] != dim:
        raise ValueError(f"{op}: hidden_states must be (B, L, D) with D={dim}, got shape {tuple(hidden_states.shape)}")
    if not hidden_states.is_floating_point():
        raise TypeError(
            f"{op}: hidden_states must be of a float dtype, got {str(hidden_states.dtype).removeprefix('torch.')}"
        )
    batch, length, _ = hidden_states.shape
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool:
            raise TypeError(
                f"{op}: attention_mask must be bool, got {str(attention_mask.dtype).removeprefix('torch.')}"
            )
        if attention_mask.shape != (batch, length):
            raise ValueError(
                f"{op}: attention_mask must be (B, L) = ({batch}, {length}), got shape {tuple(attention_mask.shape)}"
            )
    if layout is not None and grid is not None:
        raise ValueError(f"{op}: layout must be None where grid is given, got both")
    if grid is not None:
        layout = grid_layout(grid, 0, batch, hidden_states.device, layer_idx, windows)
    if layout is None:
        return None
    if (layout.batch_size, layout.length) != (batch, length):
        raise ValueError(
            f"{op}: layout must be for (B, L) = ({batch}, {length}), got ({layout.batch_size}, {layout.length})"
        )
    return layout if layout.has_visual or layout.is_part else None


def check_held(op: str, hidden_states: Tensor, projection: nn.Module) -> None:
    """Where plain weights are there to see, hidden states must be of their dtype and device.

    What holds weights in another way (quantised, offloaded, sharded, wrapped) may cast or move hidden states itself.
    """
    if type(projection) is not nn.Linear or "forward" in vars(projection) or projection._forward_pre_hooks:
        return
    weight = projection.weight
    if type(weight) is not nn.Parameter or weight.is_meta:
        return
    if hidden_states.device != weight.device:
        raise ValueError(
            f"{op}: hidden_states must be on {weight.device}, as the weights are, got {hidden_states.device}"
        )
    if hidden_states.dtype != weight.dtype and not autocasts(weight.device):
        wanted, got = (str(t.dtype).removeprefix("torch.") for t in (weight, hidden_states))
        raise TypeError(f"{op}: hidden_states must be {wanted}, as the weights are, or under autocast, got {got}")


def check_rotary(op: str, rotary: Rotary, hidden_states: Tensor, head_dim: int) -> None:
    """Check cos and sin of position embeddings."""
    batch, length, _ = hidden_states.shape
    pair = isinstance(rotary, (tuple, list)) and len(rotary) == 2 and all(isinstance(t, Tensor) for t in rotary)
    for t in rotary if pair else (None,):
        if t is None or t.dim() != 3 or t.shape[0] not in (1, batch) or t.shape[1] != length or t.shape[2] > head_dim:
            wanted = f"cos and sin (B or 1, L, R), B={batch}, L={length}, R <= {head_dim}"
            if t is None:
                raise TypeError(f"{op}: position_embeddings must be a pair, {wanted}, got a {type(rotary).__name__}")
            raise ValueError(f"{op}: position_embeddings must be {wanted}, got shape {tuple(t.shape)}")


def check_began(op: str, layout: TokenLayout, state: MMATEState | None) -> None:
    """Raise ValueError where a part of a video goes on from nothing."""
    if state is None and any(first for first, _ in layout.spans):
        raise ValueError(f"{op}: state must be of the calls before, where a layout is a part of a video, got None")


def prepare_layout(layout: TokenLayout, device: torch.device | str, layer_idx: int, windows: Partition | None) -> None:
    """Compute everything a layer reads from the layout; the layout keeps it."""
    if layout.is_part:
        layout.visual_mask(device)
        if windows is not None:
            layout.cut(windows, device)
            layout.numbers(device)
    elif layout.has_visual:
        layout.scan_order(layer_idx, device)
    if layout.has_visual:
        layout.visual_mask(device)
        if windows is not None:
            layout.window_table(*windows, device)
            layout.slab_chunks(*windows, device)


def grid_layout(
    grid: Sequence[int], num_text: int, batch_size: int, device: torch.device, layer_idx: int, windows: Partition | None
) -> TokenLayout:
    """Layout of rows that are one (T, H, W) grid and then `num_text` tokens of text."""
    if torch.compiler.is_exporting():
        return TracedGrid(grid, num_text, batch_size)  # type: ignore[return-value]  # has what blocks read
    if not torch.compiler.is_dynamo_compiling():
        return _grid_layout(tuple(grid), num_text, batch_size)
    # A layout cannot be built inside a graph: it is built while tracing, for one batch size and grid (len(range(n))
    # turns a symbolic n into a number, with a guard), and the graph reads its tensors from the global table.
    key = (tuple(len(range(size)) for size in grid), num_text, len(range(batch_size)))
    _prepare_while_tracing(*key, device, layer_idx, windows)
    return _traced[key]


_traced: dict[tuple[tuple[int, ...], int, int], TokenLayout] = {}


def _prepare_while_tracing(
    grid: tuple[int, ...],
    num_text: int,
    batch_size: int,
    device: torch.device,
    layer_idx: int,
    windows: Partition | None,
) -> None:
    layout = _traced.setdefault((grid, num_text, batch_size), _grid_layout(grid, num_text, batch_size))
    prepare_layout(layout, device, layer_idx, windows)


# What torch.compiler.assume_constant_result does, without importing the compiler with this module.
_prepare_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=32)
def _grid_layout(grid: tuple[int, ...], num_text: int, batch_size: int) -> TokenLayout:
    if num_text == 0:
        return TokenLayout.from_grid(grid, batch_size)
    size = math.prod(grid)
    blocks = [(row, *grid) for row in range(batch_size)]
    return TokenLayout(blocks, list(range(size)) * batch_size, batch_size, size + num_text)


def without_padding(hidden_states: Tensor, call: Call) -> tuple[Tensor, Call]:
    """Both, 0 at padding: what is there, NaN or Inf, must not reach a real token through a product with 0."""
    if call.mask is None:
        return hidden_states, call
    padding = ~call.mask[..., None]
    if call.rotary is not None:
        cos, sin = (t.masked_fill(padding, 0) for t in call.rotary)
        call = call._replace(rotary=(cos, sin))
    return hidden_states.masked_fill(padding, 0), call


def number_sequences(
    op: str,
    seq_idx: Tensor | None,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    layout: TokenLayout | None,
    state: object,
) -> Tensor | None:
    """(B, L) int32: 0, 1, ... for the sequences of each row; padding belongs to the sequence before it, or after it
    where there is none before. Numbers stay as they are."""
    if seq_idx is None:
        return None
    shape = tuple(hidden_states.shape[:2])
    if seq_idx.dtype != torch.int32:
        raise TypeError(f"{op}: seq_idx must be int32, got {str(seq_idx.dtype).removeprefix('torch.')}")
    if tuple(seq_idx.shape) != shape:
        raise ValueError(f"{op}: seq_idx must be (B, L) = {shape}, got shape {tuple(seq_idx.shape)}")
    if state is not None:
        raise ValueError(f"{op}: state must be None where seq_idx is given, got one: its sequence cannot be told")
    if not hidden_states.shape[1]:
        return seq_idx
    if attention_mask is not None:
        places = torch.arange(shape[1], device=seq_idx.device)
        before = torch.where(attention_mask, places, -1).cummax(1).values
        first = attention_mask.int().argmax(1, keepdim=True)
        seq_idx = seq_idx.gather(1, torch.where(before < 0, first, before))
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    if layout is not None and on_host(seq_idx):
        blocks = layout.reverse_seq_idx()
        cut = begins[:, 1:] & (blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] > 0)
        if cut.any():
            row, token = cut.nonzero()[0].tolist()
            raise ValueError(
                f"{op}: seq_idx must be the same all over a visual block, got a change at row {row}, token {token + 1}"
            )
    return begins.cumsum(1, dtype=torch.int32)


def split_heads(t: Tensor, head_dim: int) -> Tensor:
    """(..., heads P) to (..., heads, P); the number is not left to PyTorch, which cannot find it of no tokens."""
    return t.unflatten(-1, (t.shape[-1] // head_dim, head_dim))


def apply_rotary(x: Tensor, rotary: Rotary | None, interleaved: bool) -> Tensor:
    """Rotate the first R channels of x (B, L, heads, P) by cos, sin (B or 1, L, R)."""
    if rotary is None:
        return x
    cos, sin = (t.to(x.dtype).unsqueeze(2) for t in rotary)
    size = cos.shape[-1]
    head, rest = x[..., :size], x[..., size:]
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _transforms.active():
        # The same sums without a copy of what is turned.
        first, second = slice(size // 2), slice(size // 2, None)
        if interleaved:
            first, second = slice(0, None, 2), slice(1, None, 2)
        out = head * cos
        out[..., first].addcmul_(head[..., second], sin[..., first], value=-1)
        out[..., second].addcmul_(head[..., first], sin[..., second])
        return out if rest.shape[-1] == 0 else torch.cat((out, rest), dim=-1)
    if interleaved:
        turned = torch.stack((-head[..., 1::2], head[..., ::2]), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-head[..., size // 2 :], head[..., : size // 2]), dim=-1)
    out = torch.addcmul(head * cos, turned, sin)
    return out if rest.shape[-1] == 0 else torch.cat((out, rest), dim=-1)


def real_tokens_first(attention_mask: Tensor) -> Tensor:
    """(B, L) int64: the positions of each row's tokens in order, then those of its padding."""
    return torch.argsort(~attention_mask, dim=1, stable=True)


def last_tokens(
    t: Tensor, before: Tensor | None, n: int, attention_mask: Tensor | None, order: Tensor | None
) -> Tensor:
    """The last n tokens of each row of t (B, L, ...) that are not padding, oldest first, continued from `before`.

    before: (B, n, ...), the n tokens before t; zeros if None. order: (B, L) int64, the row's tokens and then its
    padding; needed where attention_mask is given.
    """
    if before is None:
        before = t.new_zeros(t.shape[0], n, *t.shape[2:])
    if attention_mask is None or order is None or not t.shape[1]:
        return torch.cat((before, t[:, max(t.shape[1] - n, 0) :]), dim=1)[:, -n:]
    index = attention_mask.sum(1, keepdim=True) + torch.arange(n, device=t.device) - n  # < 0: in `before`
    new = take(t, order.gather(1, index.clamp(min=0)))
    return torch.where(expand_as(index >= 0, new), new, take(before, (index + n).clamp(max=n - 1)))


def take(t: Tensor, index: Tensor) -> Tensor:
    """t[b, index[b]] for t (B, L, ...) and index (B, n)."""
    return torch.gather(t, 1, index.view(*index.shape, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:]))


def expand_as(mask: Tensor, t: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (t.dim() - mask.dim()))


def ridge(z: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted ridge regression target ~ z @ w + b, in float64.

    z: (n, D). target: (n,) or (n, H). weight: (n,), sums to 1. Returns w (D,) or (D, H) and b () or (H,).
    """
    z = torch.cat((z.double(), z.new_ones(len(z), 1, dtype=torch.float64)), dim=1)
    weighted = (z * weight[:, None]).T
    gram = weighted @ z
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=z.dtype, device=z.device)
    solution = torch.linalg.solve(gram, weighted @ target)
    return solution[:-1], solution[-1]


def logistic(z: Tensor, offset: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted logistic regression target ~ sigmoid(offset + z @ w + b) by cross entropy, with a ridge, in float64.

    z: (n, D). offset, target in [0, 1]: (n, H). weight: (n,), sums to 1. Returns w (D, H) and b (H,).
    """
    start = ridge(z, target.double().logit().clamp(-_LOGITS, _LOGITS) - offset.double(), weight)
    z = torch.cat((z.double(), z.new_ones(len(z), 1, dtype=torch.float64)), dim=1)
    offset, target, weighted = offset.double(), target.double(), (z * weight[:, None]).T
    gram = weighted @ z
    penalty = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=z.dtype, device=z.device)
    # The curvature is at most a quarter of the gram. Nesterov's steps, from the ridge regression of logits.
    factor = torch.linalg.cholesky(gram / 4 + penalty)
    found = last = torch.cat((start[0], start[1][None]))
    for step in range(_LOGISTIC_STEPS):
        ahead = found + step / (step + 3) * (found - last)
        slope = weighted @ ((offset + z @ ahead).sigmoid() - target) + penalty @ ahead
        found, last = ahead - torch.cholesky_solve(slope, factor), found
    return found[:-1], found[-1]
