"""`linmu_ops.window_attention` over rows that are split over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.window_attention import rotate
from ..token_layout import TokenLayout
from ..window_attention import check_rows, read_rotary, read_windows
from ..window_attention import window_attention as op
from ._context import ContextParallel
from ._layout import ExtendedRows, SlabLayout


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TokenLayout | SlabLayout,
    context: ContextParallel,
    window: Sequence[int],
    shift: Sequence[int] = (0, 0, 0),
    wrap: str = "join",
    image_window: Sequence[int] | None = None,
    image_shift: Sequence[int] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linmu_ops.window_attention` of whole rows, of which this rank holds a slab.

    A window may lie on several ranks, of which each attends for its own tokens: it gets the others' keys and values.

    Args:
        layout: of whole rows, the same on all ranks; or `SlabLayout(context, layout)`, which several calls share.
        context: how rows are split.
        cos, sin: (B or 1, n, R) float. Of the slab's tokens.
        The others are the op's, with the n tokens of the slab for L.

    Returns:
        out: (B, n, H, P), dtype of q. With return_lse: (out, lse), lse (B, n, H) float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or value breaks the table. TypeError: a dtype does.

    Notes:
        A rank sends 2 G P numbers, dtype of q, for each token and each other rank that has tokens in its window: those
        of windows that lie across borders, however long the row is. With wrap="join" a block's last windows hold tokens
        of its beginning too.
    """
    d = check_rows(q, k, v)
    windows = read_windows(window, shift, wrap, image_window, image_shift)
    context.check("window_attention", "q", q)
    slab = layout if isinstance(layout, SlabLayout) else SlabLayout(context, layout)
    if slab.batch_size != d["B"]:
        raise ValueError(f"window_attention: layout must be of B={d['B']}, got batch_size={slab.batch_size}")
    cos, sin = read_rotary(d, q, cos, sin)
    if cos is not None and sin is not None:
        q, k = (rotate(t.to(cos.dtype), cos, sin, interleaved).to(t.dtype) for t in (q, k))
    near = slab.neighbourhood(windows, causal, q.device)
    both = torch.cat((k, v), dim=2)
    came = context.exchange(both.flatten(0, 1)[near.send], near.to, near.of)
    around = (0, 0, 0, 0, near.before, near.after)
    longer = F.pad(both, around).flatten(0, 1).index_copy(0, near.place, came).unflatten(0, (d["B"], near.length))
    k, v = longer.split(k.shape[2], dim=2)
    found = op(
        F.pad(q, around), k, v, layout=ExtendedRows(near, d["B"]),  # type: ignore[arg-type]  # has what is read there
        window=window, shift=shift, wrap=wrap, image_window=image_window, image_shift=image_shift, scale=scale,
        bias=bias, causal=causal, return_lse=return_lse,
    )  # fmt: skip
    own = slice(near.before, near.before + slab.length)
    if isinstance(found, Tensor):
        return found[:, own]
    return found[0][:, own], found[1][:, own]
