"""Which tokens each token sees before it, as `near_attention` takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..token_layout import SLAB_CHUNK, Partition, TokenLayout
from ._inputs import take
from .past import Past, Sizes


class Seen(NamedTuple):
    """Arguments of `near_attention`, int32, of L places and T tokens.

    Attributes:
        low, high: (B, L).
        which: (B, G, L).
        listed: (n, m).
        when: (B, L) int64. After how many steps of the call each place reads.
    """

    low: Tensor
    high: Tensor
    which: Tensor
    listed: Tensor
    when: Tensor


def seen_before(
    sizes: Sizes, past: Past, layout: TokenLayout | None, windows: Partition, nothing_beyond: bool, all_near: bool
) -> Seen:
    """Of each place. Text sees the last tokens of its sequence; a visual token what has not left before its slab, but
    not its window. Both see a list: sinks, what is kept, and for visual tokens the text between those of their slab.

    nothing_beyond: of `NearAttention`. all_near: whether nothing has left before text.
    """
    device, (batch, length), groups = past.keys.device, past.start.shape, past.keys.shape[2]
    size, place = sizes.leave, torch.arange(length, device=device)
    index = place - past.start
    read = sizes.read_by_text(index)
    low, end = past.start + read * size, (place + 1).expand(batch, -1)
    beyond = read > 0
    if nothing_beyond:
        low, beyond = torch.maximum(low, place - sizes.window + 1), torch.zeros_like(beyond)
    real, slabs, visual, chunk = place < past.real[:, None], None, ~past.text, read
    if layout is not None and layout.has_visual:
        slabs = layout.slab_chunks(*windows, device)
        chunk = slabs[2] // SLAB_CHUNK
        begins = past.places(slabs[1], layout.length)
        if past.order is not None:
            chunk = take(F.pad(chunk, (past.held, 0)), past.order)
            real = real & (past.order >= past.held)
        read = torch.where(visual, (begins[chunk] - past.start) // size, read)
        low = torch.where(visual, past.start + read * size, low)
        end, beyond = torch.where(visual, begins[chunk], end), torch.where(visual, read > 0, beyond)
    # Padding, too, sees a token: itself. So do tokens of earlier calls, whose results are not asked for.
    low, end, beyond = torch.where(real, low, place), torch.where(real, end, place + 1), beyond & real
    when = (past.base + read).clamp(0, past.kept.shape[2] - 1)
    which = torch.full((batch, groups, length), -1, device=device)
    listed = which.new_empty(0, 0)
    between = 0 if slabs is None else slabs[3].shape[1]
    if between or not (slabs is None and all_near):
        listed = _listed(sizes, past, read, when, beyond)
        rows = torch.arange(batch * groups, device=device).view(batch, groups, 1) * past.kept.shape[2]
        which = torch.where(beyond[:, None], rows + when[:, None], which)
    if slabs is not None and layout is not None and between:
        rows, text = slabs[0][:, 0] // layout.length, past.places(slabs[3], layout.length)
        there = (slabs[3] >= 0) & (text < past.real[rows][:, None])
        # Of each chunk, what its tokens read, and the text between them.
        first = torch.arange(batch, device=device)[:, None] * length + place
        first = chunk.new_zeros(rows.shape[0]).scatter(0, chunk[visual & real], first[visual & real])
        old = which.transpose(1, 2).flatten(0, 1)[first].flatten()
        more = torch.where(there, past.before + text, -1)[:, None].expand(-1, groups, -1).flatten(0, 1)
        old = torch.where((old >= 0)[:, None], listed[old.clamp(min=0)], -1)
        numbers = torch.arange(groups, device=device)[:, None] + (listed.shape[0] + chunk * groups)[:, None]
        which = torch.where((visual & real)[:, None], numbers, which)
        listed = torch.cat((F.pad(listed, (0, between), value=-1), torch.cat((old, more), dim=1)))
    low, end = ((t + past.before).clamp(0, past.keys.shape[1]) for t in (low, end))
    return Seen(low.int(), end.int(), which.int(), listed.int(), when)


def _listed(sizes: Sizes, past: Past, read: Tensor, when: Tensor, beyond: Tensor) -> Tensor:
    """(B G (U + 1), s + m): sinks and what is kept, of each row and group after each step, as those read it that
    do, `beyond`."""
    batch, groups, steps, _ = past.kept.shape
    if not sizes.sinks:
        return past.kept.flatten(0, 2)
    # One that reads stands for all that read with it.
    length, device = read.shape[1], read.device
    place = torch.arange(length, device=device).expand(batch, -1)
    reader = place.new_zeros(batch, steps + 1).scatter(1, torch.where(beyond, when, steps), place)[:, :steps]
    rows = torch.arange(batch, device=device)[:, None].expand(-1, steps).flatten()
    ids, there = past.sinks(rows, reader.flatten(), sizes.sinks)
    gone = read.gather(1, reader).flatten()[:, None] * sizes.leave
    there = there & (torch.arange(sizes.sinks, device=device) < gone)
    sinks = torch.where(there, ids, -1).view(batch, 1, steps, ids.shape[1]).expand(-1, groups, -1, -1)
    return torch.cat((sinks, past.kept), dim=3).flatten(0, 2)
