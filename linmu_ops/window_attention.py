"""Softmax attention within windows of a video, an image or a sequence, on tokens left where they lie."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autograd, _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_flags, check_number
from ._traced_layout import TracedGrid
from .reference.window_attention import window_attention as reference
from .token_layout import WRAPS, Partition, TokenLayout

INPUTS = (
    "Tensor tokens, Tensor offsets, Tensor? coords, int[] window, float scale, Tensor? bias, Tensor? cos, "
    "Tensor? sin, bool interleaved, bool causal"
)
SCHEMA = f"(Tensor q, Tensor k, Tensor v, {INPUTS}) -> (Tensor out, Tensor lse)"
BWD_SCHEMA = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {INPUTS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TokenLayout | None = None,
    grid: Sequence[int] | None = None,
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
    """Attention of every visual token to the tokens of its window.

        s[i, j] = scale q[i] . k[j] + bias[coord(i) - coord(j)]    j in the window of i; causal: and at or before i
        out[i] = sum_j softmax_j(s[i, j]) v[j],    lse[i] = log sum_j exp(s[i, j])

    In a dimension of size s with window w and shift h, the token at c is in window ((c - h) mod s) // w. Where w >= s
    there is one window and no shift. The last window is smaller where w does not divide s. Tokens are read and written
    where they lie, and query heads share key/value heads: nothing is rolled, partitioned, padded, masked or repeated in
    memory.

    Args:
        q: (B, L, H, P) float32, float64, bfloat16 or float16. Queries, in token positions.
        k: (B, L, G, P) dtype of q. Keys; G divides H, and query head h reads head h // (H / G).
        v: (B, L, G, P) dtype of q. Values.
        layout: where the visual blocks of the batch are. Give either this or grid.
        grid: (T, H, W), (H, W) or (W,). Every row is one such block of L tokens.
        window: (T, H, W), (H, W) or (W,), each >= 1. Missing leading sizes are 1.
        shift: the same for the shift, each >= 0. Missing leading shifts are 0.
        wrap: "join": tokens that wrapped around an edge share a window with those at the other edge; "mask": they
            form a window of their own, as Swin's mask does.
        image_window: window of blocks with T = 1; `window` if None.
        image_shift: shift of blocks with T = 1; `shift` if None.
        scale: factor of q . k; P ** -0.5 if None.
        bias: (H, 2T-1, 2H-1, 2W-1) float, sizes of `window` as given. Added by relative position, query minus key.
            Not together with image_window.
        cos: (B or 1, L, R) float, R even, R <= P. Rotary embedding of q and k: (x, y) pairs become
            (x cos - y sin, y cos + x sin). Constant: it gets no gradient.
        sin: (B or 1, L, R) float. As cos.
        interleaved: rotary pairs are elements (2i, 2i+1) instead of (i, i + R/2).
        causal: a token attends to no token of its window whose position in the row is after its own.
        return_lse: also return lse, which merges this with attention over other tokens. It has a gradient.

    Returns:
        out: (B, L, H, P), dtype of q. 0 at tokens outside every block. With return_lse: (out, lse), lse (B, L, H)
            float32 (float64 for float64), -inf at tokens outside every block.

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a dtype does.

    Notes:
        Accumulates in float32 (float64 for float64). Where the processor multiplies bfloat16, bfloat16 products take
        rotated q and k, attention weights and score gradients rounded to bfloat16. Deterministic, the gradient of the
        bias too. Linear in L for a given window. Of a causal window all scores are computed, then half are masked.

    Source: Liu et al. 2021, arXiv:2103.14030; LinMU, arXiv:2601.01322. Reference:
    linmu_ops/reference/window_attention.py.
    """
    d = check_rows(q, k, v)
    windows = read_windows(window, shift, wrap, image_window, image_shift)
    if (layout is None) == (grid is None):
        raise ValueError("window_attention: exactly one of layout and grid must be given")
    if layout is None:
        assert grid is not None
        block = _padded("grid", grid, 1)
        if math.prod(block) != d["L"]:
            raise ValueError(f"window_attention: grid must hold L={d['L']} tokens, got {tuple(grid)}")
        if torch.compiler.is_exporting():
            layout = TracedGrid(block, 0, d["B"])  # type: ignore[assignment]  # has what is read here
        else:
            layout = TokenLayout.from_grid(block, d["B"])
        assert layout is not None
    elif (layout.batch_size, layout.length) != (d["B"], d["L"]):
        raise ValueError(
            f"window_attention: layout must be of B={d['B']}, L={d['L']}, "
            f"got batch_size={layout.batch_size}, length={layout.length}"
        )
    if bias is not None:
        if image_window is not None:
            raise ValueError("window_attention: bias must be None with image_window: it belongs to one window")
        rank = bias.dim() if isinstance(bias, Tensor) else 4
        d("bias", bias, "H " + " ".join(f"2{w}-1" for w in "THW"[max(4 - rank, 0) :]), FLOATS)
        if bias.dim() < 4:
            bias = bias.view(d["H"], *[1] * (4 - bias.dim()), *bias.shape[1:])
        if tuple(bias.shape[1:]) != tuple(2 * w - 1 for w in windows.window):
            raise ValueError(
                f"window_attention: bias must be (H, 2T-1, 2H-1, 2W-1) with window {windows.window}, "
                f"got shape {tuple(bias.shape)}"
            )
        bias = bias.to(accumulate_dtype(q.dtype))
    cos, sin = read_rotary(d, q, cos, sin)
    d.same_device(q, k=k, v=v, bias=bias, cos=cos, sin=sin)
    table = layout.window_table(*windows, q.device)
    factor = d["P"] ** -0.5 if scale is None else check_number("window_attention", "scale", scale)
    check_flags("window_attention", interleaved=interleaved, causal=causal, return_lse=return_lse)
    out, lse = _registry.call(
        "window_attention", q, q, k, v, table.tokens, table.offsets, None if bias is None else table.coords,
        list(windows.window), factor, bias, cos, sin, interleaved, causal,
    )  # fmt: skip
    if not return_lse:
        return out
    everywhere = lse.new_full((d["B"] * d["L"], d["H"]), -math.inf)
    return out, everywhere.index_copy(0, table.tokens.long(), lse).view(q.shape[:3])


def check_rows(q: Tensor, k: Tensor, v: Tensor) -> Dims:
    """Raise unless these are queries, keys and values; their axes."""
    d = Dims("window_attention")
    d("q", q, "B L H P", FLOATS)
    d("k", k, "B L G P", q.dtype)
    d("v", v, "B L G P", q.dtype)
    d.divides("k", "G", "H")
    return d


def read_windows(
    window: Sequence[int],
    shift: Sequence[int],
    wrap: str,
    image_window: Sequence[int] | None,
    image_shift: Sequence[int] | None,
) -> Partition:
    """The windows, checked, with three sizes each."""
    if wrap not in WRAPS:
        raise ValueError(f"window_attention: wrap must be one of {', '.join(WRAPS)}, got {wrap!r}")
    return Partition(
        _padded("window", window, 1),
        _padded("shift", shift, 0),
        wrap,
        None if image_window is None else _padded("image_window", image_window, 1),
        None if image_shift is None else _padded("image_shift", image_shift, 0),
    )


def read_rotary(d: Dims, q: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin, checked, as constants of q's accumulate type."""
    if cos is None and sin is None:
        return None, None
    if cos is None or sin is None:
        raise ValueError("window_attention: cos and sin must be given together")
    rows = "1" if isinstance(cos, Tensor) and cos.dim() == 3 and cos.shape[0] == 1 else "B"
    d("cos", cos, f"{rows} L R", FLOATS)
    d("sin", sin, f"{rows} L R", FLOATS)
    if d["R"] % 2 or d["R"] > d["P"]:
        raise ValueError(f"window_attention: cos must have an even R of at most P={d['P']}, got R={d['R']}")
    acc = accumulate_dtype(q.dtype)
    return cos.detach().to(acc), sin.detach().to(acc)


def _padded(name: str, values: Sequence[int], fill: int) -> tuple[int, ...]:
    """Three sizes, missing leading ones filled in; `fill` is also the least allowed value."""
    try:
        # `index` would fix a size that `torch.export` keeps open, which is an int or a SymInt there.
        sizes = [v if isinstance(v, (int, torch.SymInt)) else operator.index(v) for v in values]
    except TypeError:
        sizes = []
    if not 1 <= len(sizes) <= 3 or min(sizes) < fill:
        raise ValueError(f"window_attention: {name} must be one to three integers >= {fill}, got {values}")
    return (*[fill] * (3 - len(sizes)), *sizes)


def _fake(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty(tokens.shape[0], q.shape[2], dtype=acc)


def _bwd_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tokens: Tensor, offsets: Tensor, coords: Tensor | None, window: list[int], scale: float, bias: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = q.new_empty(0, dtype=accumulate_dtype(q.dtype)) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _bwd_reference(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tokens: Tensor, offsets: Tensor, coords: Tensor | None, window: list[int], scale: float, bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (q, k, v, tokens, offsets, coords, window, scale, bias, cos, sin, interleaved, causal)
    dq, dk, dv, dbias = _autograd.gradients(reference, inputs, (0, 1, 2, 8), (grad_out, grad_lse))
    return dq, dk, dv, q.new_empty(0, dtype=accumulate_dtype(q.dtype)) if bias is None else dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tokens, offsets, coords, window, scale, bias, cos, sin, interleaved, causal = inputs
    ctx.save_for_backward(q, k, v, *output, tokens, offsets, coords, bias, cos, sin)
    ctx.consts = (window, scale, interleaved, causal)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, bwd_op: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 13
    *rows, tokens, offsets, coords, bias, cos, sin = ctx.saved_tensors
    window, scale, interleaved, causal = ctx.consts
    if grad_out is None:
        grad_out = torch.zeros_like(rows[3])
    dq, dk, dv, dbias = bwd_op(
        grad_out, grad_lse, *rows, tokens, offsets, coords, window, scale, bias, cos, sin, interleaved, causal
    )
    return dq, dk, dv, None, None, None, None, None, None if bias is None else dbias, None, None, None, None


def _cuda_limit(asked: _registry.Asked) -> str | None:
    """As csrc/cuda/window_attention*.cu lay out shared memory, with the fewest warps and keys that they go down to."""
    P, size = asked["q"].shape[3], asked["q"].element_size()
    if P > 256:
        return f"the CUDA kernels take at most P=256, got P={P}"
    D = next(d for d in (32, 64, 128, 256) if d >= P)
    row = D * size + 16
    queries = 32 if size == 2 and D == 128 else 16
    needed = {"forward": (64 if D == 32 else 32) * (2 * row + 8) + queries * (row + 8)}
    if asked.differentiates:
        needed["gradient of q"] = 32 * (2 * row + 8) + queries * (2 * row + 12)
        needed["gradients of k and v"] = 16 * (2 * row + 8) + 2 * (32 if D <= 128 else 16) * (2 * row + 16)
        if asked["bias"] is not None:
            row = -(-P // 32) * 32 * size + 16
            needed["gradient of bias"] = 16 * (2 * row + 144) + 32 * (2 * row + 8)
    return _registry.more_than(asked, needed)


_registry.define_op(
    "window_attention",
    SCHEMA,
    reference=reference,
    fake=_fake,
    bwd_schema=BWD_SCHEMA,
    bwd_reference=_bwd_reference,
    bwd_fake=_bwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    limits={"cuda": _cuda_limit},
)
