"""Convolutions and windows of rows split over processes are those of whole rows: values and every gradient."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops import TokenLayout
from linmu_ops._testing import run_op, small_inputs
from linmu_ops.context_parallel import ContextParallel, SlabLayout, causal_conv1d, window_attention
from linmu_ops.nn.text_window import causal_window_attention
from tests.context_parallel.gang import assert_whole, bytes_sent, results, slabs

ROWS = 2
LENGTHS = {1: [19], 2: [11, 8], 3: [2, 1, 16], 4: [1, 0, 9, 9]}


def conv(group, lengths, inputs, order, weights):
    context = ContextParallel(group, lengths)
    order = None if order is None else context.order(order)
    given, mine = inputs[context.rank], weights[context.rank]
    return results(lambda **v: causal_conv1d(context=context, token_order=order, **v), given, mine)


def weigh(outputs):
    """Weights, of whole rows, of what an op returns."""
    return [torch.randn(o.shape, dtype=torch.float64) for o in outputs if o is not None]


CONV = {"everything": {}, "no past": {"initial_state": None}, "one sequence": {"seq_idx": None}}
CONV["one tap"] = {"weight": torch.randn(24, 1).double(), "initial_state": torch.zeros(2, 0, 24).double()}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("changes", CONV)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_slabs_are_convolved_as_a_row(gang, n, changes, ordered):
    """Slabs shorter than the filter, where a token needs those of several ranks; segments that end at borders."""
    lengths, per_token = LENGTHS[n], {"x", "seq_idx", "output 0"}
    inputs = small_inputs("causal_conv1d", dtype=torch.float64) | dict(token_order=None) | CONV[changes]
    inputs = {k: v for k, v in inputs.items() if v is not None}
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    order = torch.cat([s + torch.randperm(k) for s, k in zip(starts, lengths, strict=False)]).int().repeat(ROWS, 1)
    order = order if ordered else None
    y, state = run_op("causal_conv1d", token_order=order, **inputs)
    weights = weigh((y, state))
    want = results(lambda **v: run_op("causal_conv1d", token_order=order, **v), inputs, weights)
    shares = [[w, weights[1] / n] for w in weights[0].split(lengths, dim=1)]
    given = slabs(lengths, per_token, inputs)
    got = gang(n, conv, lengths, given, order, shares)
    assert_whole(lengths, per_token, {"output 1"}, got, want)


# A video of frames that end within slabs, between text; then an image; the second row has its blocks elsewhere.
BLOCKS = [(0, 5, 2, 3), (0, 1, 4, 4), (1, 1, 3, 5), (1, 3, 3, 3)]
POSITIONS = [*range(3, 18), *range(20, 35), *range(40, 56), *range(15), *range(20, 47)]
LAYOUT = (BLOCKS, POSITIONS, ROWS, 60)
GRIDS = {1: [60], 2: [29, 31], 3: [10, 7, 43], 4: [22, 0, 1, 37]}
WINDOWS = {
    "a video's": dict(window=(2, 2, 2), shift=(1, 1, 1), image_window=(1, 4, 4), image_shift=(0, 2, 2)),
    "masked": dict(window=(3, 2, 3), shift=(1, 1, 0), wrap="mask"),
    "causal": dict(window=(5, 1, 2), shift=(2, 0, 1), causal=True),
}


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_slabs_attend_in_windows_as_a_row(gang, n, kind):
    """Windows of several ranks, wherever a frame is cut, those that join a block's ends too; rotary, bias, groups."""
    lengths, options = GRIDS[n], WINDOWS[kind]
    inputs = {name: torch.randn(ROWS, 60, heads, 8).double() for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    angle = torch.randn(1 if kind == "masked" else ROWS, 60, 6).double()
    constants = dict(cos=angle.cos(), sin=angle.sin())
    if "image_window" not in options:
        inputs["bias"] = torch.randn(4, *(2 * w - 1 for w in options["window"])).double()
    layout = TokenLayout(*LAYOUT)

    def whole(**values):
        out, lse = linmu_ops.window_attention(layout=layout, return_lse=True, **options, **values, **constants)
        return out, lse.where(visual, 0)

    visual = layout.visual_mask()[..., None]
    weights = weigh(whole(**inputs))
    want = results(whole, inputs, weights)
    per_token = {"q", "k", "v", "output 0", "output 1"}
    shares = list(zip(*(w.split(lengths, dim=1) for w in weights), strict=True))
    given = slabs(lengths, per_token, inputs)
    rest = slabs(lengths, {"cos", "sin"}, constants)
    got = gang(n, attend, lengths, given, options, rest, shares)
    assert_whole(lengths, per_token, (), got, want)


def attend(group, lengths, inputs, options, constants, shares):
    context = ContextParallel(group, lengths)
    layout = SlabLayout(context, TokenLayout(*LAYOUT))

    def call(**values):
        out, lse = window_attention(
            layout=layout, context=context, return_lse=True, **options, **values, **constants[context.rank]
        )
        return out, lse.where(layout.visual_mask()[..., None], 0)

    return results(call, inputs[context.rank], shares[context.rank])


def text(group, lengths, inputs, weights, window):
    """Softmax attention of text over the last `window` tokens, of which the slab before has some."""
    context = ContextParallel(group, lengths)

    def call(q, k, v):
        keys, values = context.before(torch.cat((k, v), dim=3), window).split(k.shape[3], dim=3)
        filled = (torch.arange(window) >= window - context.start).expand(len(q), -1)
        valid = torch.ones(q.shape[:2], dtype=torch.bool)
        return causal_window_attention(q, k, v, valid, window, 0.3, keys, values, filled)

    return results(call, inputs[context.rank], weights[context.rank])


@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_text_sees_the_last_tokens_of_other_ranks(gang, n, window):
    lengths = LENGTHS[n] if n != 4 else [1, 2, 7, 9]
    inputs = {name: torch.randn(ROWS, 19, heads, 8).double() for name, heads in (("q", 4), ("k", 2), ("v", 2))}

    def whole(q, k, v):
        return causal_window_attention(q, k, v, torch.ones(ROWS, 19, dtype=torch.bool), window, 0.3)

    weights = weigh([whole(**inputs)])
    per_token = {*inputs, "output 0"}
    shares = list(zip(*(w.split(lengths, dim=1) for w in weights), strict=True))
    got = gang(n, text, lengths, slabs(lengths, per_token, inputs), shares, window)
    assert_whole(lengths, per_token, (), got, results(whole, inputs, weights))


def sent(group, frames):
    """Bytes of a convolution and of windows over videos of so many frames of 3 x 4 tokens."""
    context = ContextParallel(group, 12 * frames)
    n = context.lengths[context.rank]
    q, k = (torch.randn(1, n, heads, 8, requires_grad=True) for heads in (4, 2))
    layout = SlabLayout(context, TokenLayout.from_grid((frames, 3, 4)))
    x, weight = torch.randn(1, n, 24, requires_grad=True), torch.randn(24, 4)
    return (
        bytes_sent(lambda: causal_conv1d(x, weight, context=context).sum().backward()),
        bytes_sent(lambda: window_attention(
            q, k, k, layout=layout, context=context, window=(2, 3, 4), shift=(1, 0, 0)
        ).sum().backward()),
    )  # fmt: skip


def test_what_is_sent_is_the_halo_however_long_the_row_is(gang):
    """Three tokens of the convolution go to the next rank. A window holds two frames: each rank gives its last frame to
    the next and its first to the one before; the windows of the video's ends are joined."""
    for frames in (6, 60):
        for rank, (of_conv, of_windows) in enumerate(gang(3, sent, frames)):
            there, back = 3 * 24 * 4 * (rank < 2), 3 * 24 * 4 * (rank > 0)
            assert of_conv == [there, back]
            assert of_windows == [2 * 12 * 2 * 2 * 8 * 4] * 2
