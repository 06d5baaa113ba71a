"""A rank's part of a layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..token_layout import Partition, TokenLayout, WindowTable
from ._context import ContextParallel, MovedOrder


class Neighbourhood(NamedTuple):
    """The windows that reach into a slab, in rows made longer by what they hold of other slabs.

    Such a row has `before` places, the slab, and `after` places; what came lies in the order of its positions, so that
    an earlier token stays an earlier one.

    Attributes:
        table: the windows, of rows of `length` tokens.
        length, before, after: tokens of a row, and of its parts outside the slab.
        send: flat positions row * n + position of the slab's tokens that others need, by rank.
        place: flat places of what comes, in the order in which it comes.
        to, of: how many tokens go to, and come from, each rank.
    """

    table: WindowTable
    length: int
    before: int
    after: int
    send: Tensor
    place: Tensor
    to: list[int]
    of: list[int]


class SlabLayout:
    """What a rank's ops and blocks read of a `TokenLayout` of whole rows. Build one for each forward, from a layout
    that is the same on all ranks.

    Args:
        context: how rows are split.
        layout: of whole rows of L tokens. A block's tokens may lie on several ranks.

    Attributes:
        batch_size, length: of slabs.
        has_visual: of whole rows, so that all ranks make the same calls.

    Raises:
        ValueError: the layout is of rows of another length.
    """

    def __init__(self, context: ContextParallel, layout: TokenLayout) -> None:
        if layout.length != context.length:
            raise ValueError(f"ContextParallel: layout must be of L={context.length} tokens, got {layout.length}")
        if layout.is_part:
            raise ValueError("ContextParallel: layout must be of whole images and videos, got a part of one")
        self.is_part = False
        self.context, self.layout = context, layout
        self.batch_size, self.length = layout.batch_size, context.stop - context.start
        self.has_visual = layout.has_visual
        self._cache: dict[Any, Any] = {}

    def visual_mask(self, device: torch.device | str | None = None) -> Tensor:
        """(B, n) bool."""
        return self.context.shard(self.layout.visual_mask(device))

    def reverse_seq_idx(self, device: torch.device | str | None = None) -> Tensor:
        """(B, n) int32."""
        return self.context.shard(self.layout.reverse_seq_idx(device))

    def scan_order(self, layer: int, device: torch.device | str | None = None) -> Tensor | MovedOrder:
        """(B, n) int32, or a `MovedOrder` where a block of several ranks is visited across them."""
        return self.kept(
            ("order", layer % 4, device), lambda: self.context.order(self.layout.scan_order(layer, device), move=True)
        )

    def text_chunks(self, size: int, device: torch.device | str | None = None) -> Tensor:
        """(m,) int64: the slab's chunks of `size` tokens, row after row, in which not every token is visual."""

        def chunks() -> Tensor:
            text = F.pad(~self.visual_mask(device), (0, -self.length % size))
            return text.view(-1, size).any(1).nonzero()[:, 0]

        return self.kept(("text_chunks", size, device), chunks)

    def neighbourhood(
        self, windows: Partition, causal: bool, device: torch.device | str | None = None
    ) -> Neighbourhood:
        """causal: no token needs a later one."""
        return self.kept((windows, causal, device), lambda: self._neighbourhood(windows, causal, device))

    def part(self, t: Tensor) -> Tensor:
        """The slab's part of a (B, L) that every rank has whole; `whole` then need not ask."""
        mine = self.context.shard(t)
        self._cache["whole", id(mine)] = mine, t
        return mine

    def whole(self, t: Tensor) -> Tensor:
        """(B, L): of whole rows, a mask or numbers of which each rank has (B, n). Ranks tell each other once."""
        wide = t.to(torch.uint8) if t.dtype == torch.bool else t
        # With the tensor, of which another may have the same id later.
        return self.kept(("whole", id(t)), lambda: (t, self.context.unshard(wide).to(t.dtype)))[1]

    def numbers(self, seq_idx: Tensor, mask: Tensor | None) -> Tensor:
        """`context.number` of these. Ranks tell each other once."""
        key = ("numbers", id(seq_idx), id(mask))
        return self.kept(key, lambda: (seq_idx, mask, self.context.number(seq_idx, mask)))[2]

    def kept(self, key: Any, make: Any) -> Any:
        """What `make()` gives, made once for all layers that ask for this key."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _neighbourhood(self, windows: Partition, causal: bool, device: Any) -> Neighbourhood:
        context, me, n = self.context, self.context.rank, self.length
        table = self.layout.window_table(*windows)
        tokens, offsets = (np.asarray(t, dtype=np.int64) for t in (table.tokens, table.offsets))
        window = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))  # of an entry
        row, position = np.divmod(tokens, context.length)
        holder = np.searchsorted(context.bounds[1:], position, side="right")
        reaches = np.zeros((len(offsets) - 1, context.size), dtype=bool)  # whether a window has tokens of a rank
        reaches[window, holder] = True

        def needed(by: int) -> np.ndarray:
            later = holder > by if causal else np.zeros(len(holder), dtype=bool)
            return reaches[window, by] & ~later

        def between(holding: int, by: int) -> np.ndarray:
            """Entries that one rank has and another needs, in the order of tokens, as both sides go through them."""
            chosen = needed(by) & (holder == holding) & (holding != by)
            return in_order[chosen[in_order]]

        in_order = np.argsort(tokens)
        sent = [between(me, r) for r in range(context.size)]
        came = [between(r, me) for r in range(context.size)]
        mine = needed(me)
        # Places of what came: within each row, in the order of positions, before and after the slab.
        place = np.where(holder == me, position - context.start, 0)
        extents = []
        for outside in (mine & (holder < me), mine & (holder > me)):
            entries = in_order[outside[in_order]]
            first = np.searchsorted(row[entries], row[entries])
            place[entries] = np.arange(len(entries)) - first
            extents.append(int(np.bincount(row[entries], minlength=1).max(initial=0)))
        before, after = extents
        place[holder == me] += before
        place[holder > me] += before + n
        length = before + n + after
        flat = row * length + place
        counts = np.bincount(window[mine], minlength=len(offsets) - 1)
        counts = counts[counts > 0]

        def tensor(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.from_numpy(array).to(device, dtype)

        local = WindowTable(
            tensor(flat[mine], torch.int32), tensor(np.concatenate(([0], np.cumsum(counts))), torch.int32),
            tensor(np.asarray(table.coords)[mine], torch.int32), int(counts.max(initial=0)),
        )  # fmt: skip
        slab = row * n + position - context.start
        return Neighbourhood(
            local, length, before, after, tensor(slab[np.concatenate(sent)]), tensor(flat[np.concatenate(came)]),
            [len(s) for s in sent], [len(c) for c in came],
        )  # fmt: skip


class ExtendedRows:
    """A layout of the longer rows of a `Neighbourhood`, as `linmu_ops.window_attention` reads it."""

    def __init__(self, near: Neighbourhood, batch_size: int) -> None:
        self.near, self.batch_size, self.length = near, batch_size, near.length

    def window_table(self, *windows: Any) -> WindowTable:
        return self.near.table
