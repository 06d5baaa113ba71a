"""How rows are split over ranks, and what goes between these."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _transforms
from ..reference._visits import visited


class MovedOrder(NamedTuple):
    """A visiting order that moves tokens between ranks: rank r visits as many as its slab has, in its turn.

    Attributes:
        send: (B n,) int64. The slab's flat positions row * n + position, by the rank that visits them.
        place: (B n,) int64. The flat visits row * n + visit of this rank, in the order in which their tokens arrive.
        to, of: how many tokens go to, and come from, each rank.
    """

    send: Tensor
    place: Tensor
    to: list[int]
    of: list[int]


class ContextParallel:
    """Rows of L tokens split over the ranks of a group. Each rank holds one slab: of every row the tokens from
    `start` to `stop`.

    The functions of `linmu_ops.context_parallel` take slabs and give slabs. Together they are what the op of the same
    name gives for the whole rows. Parameters (A, D, weight, ...) and a row's `initial_state` are the same on all ranks.

    A gradient is that of the sum of the ranks' losses. A slab's is whole. Of what is the same on all ranks, each rank
    gets a part of the gradient, and the sum is the whole one, as DDP and FSDP make it of any parameter. Every rank must
    make the same calls, with and without gradients, and run the same backward passes: collectives wait for each other.

    Args:
        group: a `ProcessGroup`, or a `DeviceMesh` of one dimension, as `mesh["cp"]`.
        lengths: the length of each rank's slab, >= 0, in the order of ranks; or L, which is split evenly, where the
            first L mod R ranks get one more.

    Attributes:
        rank, size: of this process in the group, and the number R of ranks.
        lengths, length: of the slabs, and their sum L.
        start, stop: the slab of this rank.

    Raises:
        ValueError: there is not one length >= 0 for each rank, or the mesh has several dimensions.

    Example:
        >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("fsdp", "cp"))
        >>> context = ContextParallel(mesh["cp"], x.shape[1])
        >>> y = ssd_scan(context.shard(x), ..., context=context)   # (B, L / 4, H, P)
    """

    def __init__(self, group: Any, lengths: int | Sequence[int]) -> None:
        if hasattr(group, "get_group"):
            if group.ndim != 1:
                raise ValueError(f"ContextParallel: group must be a mesh of one dimension, got {group.ndim}")
            group = group.get_group()
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        if isinstance(lengths, Sequence):
            self.lengths = tuple(operator.index(n) for n in lengths)
        else:
            each, more = divmod(operator.index(lengths), self.size)
            self.lengths = tuple(each + (r < more) for r in range(self.size))
        if len(self.lengths) != self.size or min(self.lengths) < 0:
            raise ValueError(f"ContextParallel: lengths must be {self.size} numbers >= 0, got {lengths}")
        self.bounds = (0, *itertools.accumulate(self.lengths))
        self.length = self.bounds[-1]
        self.start, self.stop = self.bounds[self.rank : self.rank + 2]

    def __repr__(self) -> str:
        return f"ContextParallel(rank={self.rank}, size={self.size}, lengths={self.lengths})"

    def shard(self, t: Tensor, dim: int = 1) -> Tensor:
        """This rank's slab of t, a view, where t has L tokens in `dim`."""
        if t.shape[dim] != self.length:
            raise ValueError(
                f"ContextParallel: t must have {self.length} tokens in dim {dim}, got shape {tuple(t.shape)}"
            )
        return t.narrow(dim, self.start, self.stop - self.start)

    def unshard(self, t: Tensor, dim: int = 1) -> Tensor:
        """The slabs of all ranks, joined in `dim`: L tokens, on every rank."""
        self.check("ContextParallel", "t", t, dim)
        widest = max(self.lengths)
        first = t.movedim(dim, 0)
        padded = torch.cat((first, first.new_zeros(widest - first.shape[0], *first.shape[1:])))
        every = self.all_gather(padded).unflatten(0, (self.size, widest))
        return torch.cat([every[r, :n] for r, n in enumerate(self.lengths)]).movedim(0, dim)

    def resplit(self, t: Tensor, other: ContextParallel) -> Tensor:
        """(B, m, ...): this rank's slab by another split, of t (B, slab, ...) by this one. Rows of the other may be
        longer: of tokens that there are not, no slab has any."""
        ends = [min(end, self.length) for end in other.bounds]

        def common(holder: int, taker: int) -> tuple[int, int]:
            first = max(self.bounds[holder], ends[taker])
            return first, max(min(self.bounds[holder + 1], ends[taker + 1]), first)

        given = [common(self.rank, taker) for taker in range(self.size)]
        counts = [last - first for first, last in (common(holder, self.rank) for holder in range(self.size))]
        parts = [t[:, first - self.start : last - self.start] for first, last in given]
        each = t.shape[0] * math.prod(t.shape[2:])
        sent = torch.cat([part.reshape(-1) for part in parts])
        came = self.exchange(sent, [part.numel() for part in parts], [each * n for n in counts])
        pieces = came.split([each * n for n in counts])
        return torch.cat(
            [piece.view(t.shape[0], n, *t.shape[2:]) for piece, n in zip(pieces, counts, strict=True)], dim=1
        )

    def check(self, op: str, name: str, t: Tensor, dim: int = 1) -> None:
        """Raise ValueError unless t has this rank's tokens in `dim`; RuntimeError where PyTorch's transforms, which
        know of one process, would take derivatives."""
        if not torch.compiler.is_compiling() and _transforms.differentiates():
            raise RuntimeError(f"{op}: context must be None under torch.func.grad, jvp and forward-mode AD, got one")
        if t.dim() <= dim or t.shape[dim] != self.lengths[self.rank]:
            raise ValueError(
                f"{op}: {name} must have the {self.lengths[self.rank]} tokens of rank {self.rank} in dim {dim}, "
                f"got shape {tuple(t.shape)}"
            )

    def order(self, token_order: Tensor, move: bool = False) -> Tensor | MovedOrder:
        """A visiting order of whole rows as `ssd_scan` takes it here. Every rank calls it, with the same order.

        Args:
            token_order: (B, L) int32. The position visited at t, as the op takes it.
            move: let tokens be sent to the rank that visits them, and what they get back again. This is as many bytes
                as the slab's tokens have, and grows with L.

        Returns:
            (B, n) int32, positions in the slab, where every slab's tokens are visited within its own visits. Else a
            `MovedOrder`.

        Raises:
            ValueError: a token is visited among another slab's, and `move` is False.
        """
        if token_order.dim() != 2 or token_order.shape[1] != self.length:
            raise ValueError(
                f"ContextParallel: token_order must be (B, L) with L={self.length}, "
                f"got shape {tuple(token_order.shape)}"
            )
        here = slice(self.start, self.stop)
        rows, order = token_order.shape[0], token_order.cpu().long()
        starts = torch.tensor(self.bounds[1:])
        at = torch.searchsorted(starts, order, right=True)  # the rank that holds what is visited at t
        by = torch.searchsorted(starts, torch.arange(self.length), right=True)  # the rank that visits at t
        away = at != by
        if not away.any():
            return self.shard(token_order) - self.start
        if not move:
            row, t = away.nonzero()[0].tolist()
            raise ValueError(
                "ContextParallel: token_order must visit a rank's tokens within its slab, unless move=True sends them, "
                f"got position {int(order[row, t])} of rank {int(at[row, t])} at visit {t} of rank {int(by[t])} "
                f"in row {row}"
            )
        n = self.stop - self.start
        row = torch.arange(rows)[:, None].expand_as(order)
        # Both sides go through the other's ranks in turn, and for each through rows and then visits.
        mine = at == self.rank
        flat = (row * n + order - self.start)[mine]
        rank = by.expand_as(order)[mine]
        sent = torch.argsort(rank, stable=True)
        source = at[:, here].reshape(-1)
        device = token_order.device
        return MovedOrder(
            flat[sent].to(device), torch.argsort(source, stable=True).to(device),
            torch.bincount(rank, minlength=self.size).tolist(), torch.bincount(source, minlength=self.size).tolist(),
        )  # fmt: skip

    def to_visits(self, order: MovedOrder, *tensors: Tensor | None) -> list[Tensor | None]:
        """Of (B, n, ...) in token positions, what this rank visits, in visiting order. None stays None."""
        return self._moved(tensors, order.send, order.place, order.to, order.of)

    def to_positions(self, order: MovedOrder, *tensors: Tensor | None) -> list[Tensor | None]:
        """Of (B, n, ...) in visiting order, what belongs to this rank's positions."""
        return self._moved(tensors, order.place, order.send, order.of, order.to)

    def _moved(
        self, tensors: Sequence[Tensor | None], send: Tensor, place: Tensor, to: list[int], of: list[int]
    ) -> list[Tensor | None]:
        """Tensors of one dtype go together."""
        result: list[Tensor | None] = [None] * len(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors if t is not None):
            given = [(i, t) for i, t in enumerate(tensors) if t is not None and t.dtype == dtype]
            parts = [t.reshape(t.shape[0] * t.shape[1], math.prod(t.shape[2:])) for _, t in given]
            rows = torch.cat(parts, dim=1)
            came = self.exchange(rows[send], to, of)
            rows = torch.zeros_like(rows).index_copy(0, place, came)
            for (i, t), part in zip(given, rows.split([p.shape[1] for p in parts], dim=1), strict=True):
                result[i] = part.view(t.shape)
        return result

    def before(self, t: Tensor, n: int, order: Tensor | None = None) -> Tensor:
        """(B, n, ...): of t (B, slab, ...) in token positions, the last n tokens before this slab, oldest first; 0
        before the first token of a row. order: (B, slab) int32, where they are visited in one."""
        return self._until(t, n, self.bounds[:-1], order)

    def last(self, t: Tensor, n: int, order: Tensor | None = None) -> Tensor:
        """(B, n, ...): the last n tokens of each row, on every rank; otherwise as `before`."""
        return self._until(t, n, [self.length] * self.size, order)

    def _until(self, t: Tensor, n: int, ends: Sequence[int], order: Tensor | None) -> Tensor:
        """The n tokens before ends[r] on rank r."""

        def common(holder: int, end: int) -> tuple[int, int]:
            """Of these, the holder's."""
            first, last = self.bounds[holder : holder + 2]
            first = max(end - n, first)
            return first, max(min(end, last), first)

        parts = []
        for end in ends:
            first, last = (at - self.start for at in common(self.rank, end))
            held = first < last and order is not None
            parts.append(visited(t, order[:, first:last].long()) if held else t[:, first:last])  # type: ignore[index]
        rows, end = t.shape[0], ends[self.rank]
        counts = [last - first for first, last in (common(holder, end) for holder in range(self.size))]
        sent = torch.cat([p.flatten(0, 1) for p in parts])
        came = self.exchange(sent, [rows * p.shape[1] for p in parts], [rows * c for c in counts])
        # The empty ones too: they tie the result to the exchange, in whose backward every rank must take part.
        pieces = [
            p.view(rows, c, *t.shape[2:]) for p, c in zip(came.split([rows * c for c in counts]), counts, strict=True)
        ]
        return torch.cat((t.new_zeros(rows, max(n - end, 0), *t.shape[2:]), *pieces), dim=1)

    def tokens_before(
        self, n: int, *tensors: Tensor, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The last n tokens before this slab that are not padding, oldest first, of each (B, slab, ..., P) tensor; and
        (B, n) bool, which of them there are.

        mask: (B, slab) bool, False at padding. Where it is given, each rank sends its last n tokens to all.
        seq_idx: (B, slab) int32, as `number` makes it: none are there of a sequence that ends before this slab.
        """
        sizes = [t.shape[-1] for t in tensors]
        joined, rows = torch.cat(tensors, dim=-1), tensors[0].shape[0]
        numbers = torch.zeros(joined.shape[:2], dtype=torch.int32, device=joined.device) if seq_idx is None else seq_idx
        if mask is None:
            found, number = self.before(joined, n), self.before(numbers, n)
            there = (torch.arange(n, device=joined.device) >= n - self.start).expand(rows, n)
        else:
            found, number, there = self._real_before(joined, numbers, mask, n)
        if numbers.shape[1]:
            there = there & (number == numbers[:, :1])
        return (*found.split(sizes, dim=-1), there)

    def _real_before(self, t: Tensor, numbers: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        def last(real: Tensor, *tensors: Tensor) -> list[Tensor]:
            """The last n that are real, after what fills up."""
            latest = torch.argsort(real, dim=1, stable=True)[:, max(real.shape[1] - n, 0) :]
            short = n - latest.shape[1]
            return [torch.cat((t.new_zeros(len(t), short, *t.shape[2:]), visited(t, latest)), 1) for t in tensors]

        mine, number, real = last(mask, t, numbers, mask.int())
        whose = torch.arange(self.size, device=t.device)[:, None, None]
        every, number, real = (
            self.all_gather(s).unflatten(0, (self.size, len(t))) for s in (mine, number, real)
        )  # (R, B, n, ...)
        real = real * (whose < self.rank)
        found, number, real = (s.transpose(0, 1).flatten(1, 2) for s in (every, number, real))
        found, number, real = last(real.bool(), found, number, real)
        return found, number, real.bool()

    def number(self, seq_idx: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, slab) int32: 0, 1, ... for the sequences of whole rows. One begins where seq_idx (B, slab) int32 differs
        from the token before. mask: (B, slab) bool, False at padding, which may have any number, and gets that of a
        token beside it."""
        rows, n = seq_idx.shape
        real = torch.ones_like(seq_idx, dtype=torch.bool) if mask is None else mask
        told, local = seq_idx.new_zeros(rows, 4), seq_idx
        if n:
            before = torch.where(real, torch.arange(n, device=seq_idx.device), -1).cummax(1).values
            numbers = seq_idx.gather(1, torch.where(before < 0, real.int().argmax(1, keepdim=True), before))
            changes = numbers[:, 1:] != numbers[:, :-1]
            local = torch.cat((changes.new_zeros(rows, 1), changes), dim=1).cumsum(1, dtype=torch.int32)
            told = torch.stack((real.any(1).int(), numbers[:, 0], numbers[:, -1], local[:, -1]), dim=1)
        count, last = seq_idx.new_full((rows,), -1), seq_idx.new_zeros(rows)
        mine = count
        for k, (there, first, end, more) in enumerate(t.unbind(1) for t in self.all_gather(told).split(rows)):
            begins = (there > 0) & ((count < 0) | (first != last))
            count = count + begins
            mine = count.clamp(min=0) if k == self.rank else mine
            count, last = torch.where(there > 0, count + more, count), torch.where(there > 0, end, last)
        return (mine[:, None] + local).int()

    def exchange(self, rows: Tensor, to: list[int], of: list[int]) -> Tensor:
        """Send rows (sum of `to`, ...), to[r] of them to rank r in turn; what came: of[r] from rank r in turn."""
        from torch.distributed import _functional_collectives as functional

        return functional.all_to_all_single_autograd(rows.contiguous(), of, to, self.group)

    def all_gather(self, t: Tensor) -> Tensor:
        """(R n, ...): t (n, ...) of all ranks in turn."""
        from torch.distributed import _functional_collectives as functional

        # The second name is that of PyTorch before 2.13.
        named = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd
        return named(t.contiguous(), 0, self.group)
