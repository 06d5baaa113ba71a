"""`linmu_ops.causal_conv1d` over rows that are split over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dims import FLOATS, Dims
from ..causal_conv1d import causal_conv1d as op
from ..causal_conv1d import check_filter
from ._context import ContextParallel


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    context: ContextParallel,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    token_order: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linmu_ops.causal_conv1d` of whole rows, of which this rank holds a slab.

    Args:
        context: how rows are split.
        token_order: (B, n) int32, positions in the slab, as `context.order` makes them. In place if None.
        initial_state: (B, K-1, D) dtype of x, the same on all ranks. The K-1 inputs before the row's first visit.
        return_final_state: also return the K-1 inputs before the row's next visit, on every rank.
        The others are the op's, with the n tokens of the slab for L.

    Returns:
        y: (B, n, D), dtype of x. With return_final_state: (y, state), state (B, K-1, D), dtype of x.

    Raises:
        ValueError: a shape, device or value breaks the table. TypeError: a dtype does.

    Notes:
        A rank sends its last K-1 tokens, B (K-1) D numbers, to the next one (or further, past slabs that are shorter),
        however long the row is; their segments too; and with a final state to all ranks.
    """
    d = Dims("causal_conv1d")
    d("x", x, "B L D", FLOATS)
    check_filter(d, weight, bias, activation)
    d.optional("seq_idx", seq_idx, "B L", torch.int32)
    d.optional("token_order", token_order, "B L", torch.int32)
    context.check("causal_conv1d", "x", x)
    before = weight.shape[1] - 1
    if initial_state is not None:
        d.sizes["K-1"] = before
        d("initial_state", initial_state, "B K-1 D", x.dtype)
    past = context.before(x, before, token_order)
    index = None
    if seq_idx is not None:
        first = seq_idx if token_order is None else seq_idx.gather(1, token_order[:, :1].long())
        index = torch.cat((context.before(seq_idx, before, token_order), first[:, :1]), dim=1)
    past = _of_one_segment(past, index, initial_state, context.start)
    y = op(
        x, weight, bias, activation=activation, seq_idx=seq_idx, token_order=token_order, initial_state=past
    )  # fmt: skip
    assert isinstance(y, Tensor)
    if not return_final_state:
        return y
    latest = context.last(x, before, token_order)
    index = None if seq_idx is None else context.last(seq_idx, before, token_order)
    return y, _of_one_segment(latest, index, initial_state, context.length)


def _of_one_segment(last: Tensor, index: Tensor | None, initial: Tensor | None, seen: int) -> Tensor:
    """The last k inputs (B, k, D), continued from the initial ones where only `seen` visits lie before; 0 where they
    are of another segment than the last of `index` (B, k or k + 1)."""
    missing = max(last.shape[1] - seen, 0)
    if missing and initial is not None:
        last = torch.cat((initial[:, initial.shape[1] - missing :], last[:, missing:]), dim=1)
    if index is None or index.shape[1] <= missing:
        return last
    # What lies before the row is of its first segment.
    index = torch.cat((index[:, missing : missing + 1].expand(-1, missing), index[:, missing:]), dim=1)
    changes = (index[:, 1:] != index[:, :-1]).flip(1).cumsum(1).flip(1) > 0
    cut = torch.zeros(last.shape[:2], dtype=torch.bool, device=last.device)
    cut[:, : changes.shape[1]] = changes
    return torch.where(cut[..., None], 0.0, last)
