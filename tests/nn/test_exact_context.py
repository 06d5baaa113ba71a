"""`ExactMMATE` on rows split over processes gives what it gives on whole rows: outputs and every gradient."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from blocks import DIM, GROUPS, HEADS, build, layout_of

from linmu_ops import ExactConfig
from linmu_ops.context_parallel import ContextParallel, SlabLayout
from tests.context_parallel.gang import assert_whole, bytes_sent, results, slabs

# Windows that frames and videos exceed; little is near and kept, so that much is far.
CONFIGS = {
    "default": ExactConfig(window=(3, 2, 2), image_window=(1, 2, 3), text_window=4, sink_tokens=2, kept_tokens=3),
    "nothing_kept": ExactConfig(window=(4, 2, 2), image_window=None, text_window=2, sink_tokens=0, kept_tokens=0),
    "whole_frames": ExactConfig(window=(2, 9, 9), text_window=7, sink_tokens=3, kept_tokens=8, z_gate=False),
    "longer_than_slabs": ExactConfig(window=(50, 2, 2), text_window=40, sink_tokens=9, kept_tokens=30),
}
L = 78
# Borders within frames, within the first sinks, and within padding; slabs that are empty or shorter than a window.
LENGTHS = {1: [78], 2: [41, 37], 3: [1, 27, 50], 4: [20, 0, 3, 55]}
PER_TOKEN = {"z", "cos", "sin", "mask", "seq_idx", "output 0"}
KINDS = ("plain", "padded", "packed", "packed and padded", "text")


def inputs_of(kind):
    """Arguments of a block, whole, and the blocks of its layout: two rows of videos, images and text before, between
    and after them; in the second one text stands between frames."""
    g = torch.Generator().manual_seed(0)
    angle = torch.randn(2, L, 1, generator=g, dtype=torch.float64).expand(-1, -1, 2)
    given = dict(z=torch.randn(2, L, DIM, generator=g, dtype=torch.float64), cos=angle.cos(), sin=angle.sin())
    between = [p for t in range(7) for p in range(14 + 7 * t, 20 + 7 * t)]
    blocks = [
        [((5, 2, 3), list(range(3, 33))), ((1, 3, 4), list(range(35, 47))), ((8, 1, 3), list(range(47, 71)))],
        [((1, 2, 2), list(range(8, 12))), ((7, 3, 2), between)],
    ]
    if "padded" in kind:
        mask = torch.ones(2, L, dtype=torch.bool)
        mask[0, [0, 1, 33, 71]] = mask[1, :5] = mask[1, 27] = mask[1, 70:72] = False
        given |= dict(mask=mask)
    if "packed" in kind:
        seq_idx = torch.zeros(2, L, dtype=torch.int32)
        seq_idx[0, 2:] = 5
        seq_idx[0, 46:] = 0  # an image is the last of a sequence
        seq_idx[0, 47:] = 3
        seq_idx[1, 12:] = -1
        seq_idx[1, 66:] = 4
        seq_idx[1, 75:] = -1
        given |= dict(seq_idx=seq_idx)
        blocks[0][1] = ((1, 3, 4), list(range(34, 46)))
    if kind == "packed and padded":
        given["seq_idx"][~given["mask"]] = 9
    return given, [[], []] if kind == "text" else blocks


def called(block, layout, context=None):
    """The block as a function of its tensors and parameters, all of which are to get gradients."""

    def call(z, cos, sin, mask=None, seq_idx=None, **parameters):
        out = torch.func.functional_call(block, parameters, (z,), dict(
            layout=layout, position_embeddings=(cos.detach(), sin.detach()), attention_mask=mask, seq_idx=seq_idx,
            context=context,
        ))  # fmt: skip
        return out if mask is None else out.masked_fill(~mask[..., None], 0)

    return call


def work(group, name, kind, layer, lengths, weights):
    context = ContextParallel(group, lengths)
    torch.manual_seed(0)
    block = build(CONFIGS[name], layer, perturb=0.1)
    given, blocks = inputs_of(kind)
    mine = slabs(lengths, PER_TOKEN, given)[context.rank] | {k: p.detach() for k, p in block.named_parameters()}
    layout = layout_of(blocks, L)
    layout = (SlabLayout(context, layout) if layer % 2 else layout) if kind != "text" else None
    call = called(block, layout, context)
    found = results(call, mine, weights[context.rank])
    with torch.no_grad():
        alone = call(**mine)
    assert alone.shape == found["output 0"].shape
    torch.testing.assert_close(alone, found["output 0"], rtol=1e-12, atol=1e-12)
    return found


def check(gang, name, kind, layer, lengths):
    torch.manual_seed(0)
    block = build(CONFIGS[name], layer, perturb=0.1)
    given, blocks = inputs_of(kind)
    parameters = {k: p.detach() for k, p in block.named_parameters()}
    call = called(block, layout_of(blocks, L))
    weights = torch.randn(2, L, DIM, dtype=torch.float64)
    want = results(call, given | parameters, [weights])
    got = gang(len(lengths), work, name, kind, layer, lengths, [[w] for w in weights.split(lengths, dim=1)])
    assert_whole(lengths, PER_TOKEN, [], got, want)


FEW = {("default", kind, i % 2) for i, kind in enumerate(KINDS)}
FEW |= {(name, "packed and padded", 1) for name in CONFIGS}
EVERY = [
    pytest.param(name, kind, layer, marks=() if (name, kind, layer) in FEW else pytest.mark.sweep)
    for name in CONFIGS for kind in KINDS for layer in (0, 1)
]  # fmt: skip


@pytest.mark.parametrize("name, kind, layer", EVERY)
def test_a_split_row_is_the_row(gang, name, kind, layer):
    check(gang, name, kind, layer, LENGTHS[4])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_row_split_by_any_number_is_the_row(gang, n):
    check(gang, "default", "padded", 1, LENGTHS[n])


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.sweep) for s in range(1, 40))])
def test_borders_may_lie_anywhere(gang, seed):
    draw = random.Random(seed)
    cuts = [0, *sorted(draw.choices(range(L + 1), k=draw.choice([1, 2, 3]))), L]
    lengths = [b - a for a, b in itertools.pairwise(cuts)]
    check(gang, draw.choice(list(CONFIGS)), draw.choice(KINDS), draw.choice([0, 1]), lengths)


def some_gradients(group, lengths, wanted):
    """Of the parameters `wanted`, which alone get any."""
    context = ContextParallel(group, lengths)
    torch.manual_seed(0)
    block = build(CONFIGS["default"], perturb=0.1)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in wanted)
    z = context.shard(inputs_of("text")[0]["z"])
    block(z, context=context).square().sum().backward()
    return {name: block.get_parameter(name).grad for name in wanted}


@pytest.mark.parametrize("wanted", [["scan.b_map"], ["scan.dt_bias"], ["windows.v_proj.bias"], ["share.bias"]])
def test_a_frozen_part_takes_no_rank_out_of_the_backward_pass(gang, wanted):
    """The last rank sends no map of what is far: without care it would have no backward pass, for which others wait."""
    (want,), got = gang(1, some_gradients, [L], wanted), gang(3, some_gradients, LENGTHS[3], wanted)
    for name in wanted:
        assert (sum(g[name] for g in got) - want[name]).abs().max() <= 1e-12 * max(1, want[name].abs().max())


def test_videos_whose_tokens_see_later_ones_may_end_at_a_border(gang):
    """Where none is cut."""
    want, got = gang(1, without_causal_windows, [L]), gang(2, without_causal_windows, [33, 45])
    assert (torch.cat(got, dim=1) - want[0]).abs().max() < 1e-12


def without_causal_windows(group, lengths):
    context = ContextParallel(group, lengths)
    torch.manual_seed(0)
    block = build(CONFIGS["default"], causal_windows=False)
    given, blocks = inputs_of("plain")
    with torch.no_grad():
        return block(
            context.shard(given["z"]), layout=layout_of([blocks[0][:2], blocks[1][:1]], L), context=context,
            position_embeddings=(context.shard(given["cos"]), context.shard(given["sin"])),
        )  # fmt: skip


def in_half_precision(group, lengths, dtype):
    """The output and the gradient of the input, in float64."""
    context = ContextParallel(group, lengths)
    torch.manual_seed(0)
    block = build(CONFIGS["default"], perturb=0.1).to(dtype)
    given, blocks = inputs_of("padded")
    z, cos, sin = (context.shard(given[name]).to(dtype) for name in ("z", "cos", "sin"))
    z = z.clone().requires_grad_()
    out = block(
        z, layout=layout_of(blocks, L), position_embeddings=(cos, sin), attention_mask=context.shard(given["mask"]),
        context=context,
    )  # fmt: skip
    out = out.double().masked_fill(~context.shard(given["mask"])[..., None], 0)
    (dz,) = torch.autograd.grad(out.square().sum(), z)
    return out.detach(), dz.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_split_row_is_as_exact_as_the_row(gang, dtype):
    """Keys of 16 bits, and step sizes of 32, go between ranks."""
    exact, whole = gang(1, in_half_precision, [L], torch.float64)[0], gang(1, in_half_precision, [L], dtype)[0]
    split = gang(3, in_half_precision, LENGTHS[3], dtype)
    for want, one, parts in zip(exact, whole, zip(*split, strict=True), strict=True):
        error = (torch.cat(parts, dim=1) - want).abs().max()
        assert error <= 2 * (one - want).abs().max() + 1e-6


def sent(group, length):
    """Bytes that this rank gives to each collective of a layer."""
    context = ContextParallel(group, length)
    block = build(CONFIGS["default"], dtype=torch.float32)
    z = torch.randn(2, length, DIM)
    return bytes_sent(lambda: block(context.shard(z), context=context))


def test_what_a_rank_sends_does_not_grow_with_the_row(gang):
    """Of the text before a border the ring and the sinks, and from each rank its best; then a map."""
    config, size, head = CONFIGS["default"], 4, 4
    each = 2 * GROUPS * (2 * head + HEADS // GROUPS) * size  # of two rows
    ring, kept, sinks = 2 * config.text_window, config.kept_tokens, config.sink_tokens
    a_map = 2 * HEADS * ((head + 1) * head + 1) * size
    for length in (120, 480):
        first, middle, last = (sum(sizes) for sizes in gang(3, sent, length))
        assert first == each * ((ring + kept + sinks) + (kept + sinks)) + a_map
        assert middle == each * (ring + kept) + a_map
        assert last == a_map
