"""Images and videos that are cut into several calls: `ExactMMATE` gives what one call gives."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from blocks import DIM, build, layout_of, pieces

from linmu_ops import ExactConfig, MMATEConfig, TokenLayout

# Windows that frames and videos exceed, so that windows lie beside each other, shift, and end early.
SMALL = ExactConfig(window=(3, 2, 2), image_window=(1, 2, 3), text_window=4, sink_tokens=2, kept_tokens=3)
CONFIGS = {
    "default": SMALL,
    "nothing_kept": ExactConfig(window=(4, 2, 2), image_window=None, text_window=2, sink_tokens=0, kept_tokens=0),
    "whole_frames": ExactConfig(window=(2, 9, 9), text_window=7, sink_tokens=3, kept_tokens=8, z_gate=False),
    "delta": ExactConfig(window=(3, 2, 2), text_window=4, sink_tokens=2, kept_tokens=3, far="delta", feature_dim=3),
    "longer_than_videos": ExactConfig(window=(50, 2, 2), text_window=5, sink_tokens=1, kept_tokens=4),
}
L = 78


def every_kind():
    """(z, rotary, blocks, mask): two rows of videos, images, and text before, between and after them; in the second
    one text stands between frames, and padding before and between."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, L, DIM, generator=g, dtype=torch.float64)
    angle = torch.randn(2, L, 1, generator=g, dtype=torch.float64)
    rotary = angle.cos().expand(-1, -1, 2), angle.sin().expand(-1, -1, 2)
    between = [p for t in range(7) for p in range(14 + 7 * t, 20 + 7 * t)]  # a token of text before each frame
    blocks = [
        [((5, 2, 3), list(range(3, 33))), ((1, 3, 4), list(range(35, 47))), ((8, 1, 3), list(range(47, 71)))],
        [((1, 2, 2), list(range(8, 12))), ((7, 3, 2), between)],
    ]
    mask = torch.ones(2, L, dtype=torch.bool)
    mask[1, :5] = mask[1, 27] = mask[1, 70:72] = False
    return z, rotary, blocks, mask


def in_pieces(block, z, layout, rotary, mask, cuts, state=None):
    """The outputs of calls that end at these cuts, and the state after them."""
    out, start = [], 0
    for piece, turn, real in zip(
        pieces(z, cuts), zip(*(pieces(t, cuts) for t in rotary), strict=True), pieces(mask, cuts), strict=True
    ):
        part = layout.part(start, start + piece.shape[1])
        start += piece.shape[1]
        y, state = block(
            piece, layout=part, position_embeddings=turn, attention_mask=real, state=state, return_state=True
        )
        out.append(y)
    return torch.cat(out, dim=1), state


def assert_same(state, other):
    for name, mine, its in zip(state._fields, state, other, strict=True):
        assert (mine is None) == (its is None), name
        if mine is not None:
            torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_in_pieces_is_the_prompt(name, layer_idx):
    """Wherever it is cut, within a frame too: output, state, and the tokens that are decoded then."""
    torch.manual_seed(0)
    block = build(CONFIGS[name], layer_idx=layer_idx)
    z, rotary, blocks, mask = every_kind()
    layout, draw = layout_of(blocks, L), random.Random(layer_idx)
    with torch.no_grad():
        whole, after = block(z, layout=layout, position_embeddings=rotary, attention_mask=mask, return_state=True)
        for many in (1, 6):
            cuts = sorted(draw.sample(range(1, L), many))
            out, state = in_pieces(block, z, layout, rotary, mask, cuts)
            torch.testing.assert_close(out[mask], whole[mask], rtol=1e-12, atol=1e-12)
            assert_same(state, after)
        for i in range(9):
            step = dict(position_embeddings=tuple(t[:, i : i + 1] for t in rotary), return_state=True)
            (a, after), (b, state) = (block(z[:, i : i + 1], state=s, **step) for s in (after, state))
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert_same(state, after)


def test_a_video_may_come_token_by_token():
    torch.manual_seed(0)
    block, (z, rotary, blocks, mask) = build(SMALL), every_kind()
    layout = layout_of(blocks, L)
    with torch.no_grad():
        whole, after = block(z, layout=layout, position_embeddings=rotary, attention_mask=mask, return_state=True)
        out, state = in_pieces(block, z, layout, rotary, mask, list(range(1, L)), block.init_state(2))
    torch.testing.assert_close(out[mask], whole[mask], rtol=1e-12, atol=1e-12)
    assert_same(state, after)


def test_gradients_flow_from_piece_to_piece():
    torch.manual_seed(0)
    block, (z, rotary, blocks, mask) = build(SMALL), every_kind()
    layout = layout_of(blocks, L)
    weight = torch.randn(2, L, DIM, dtype=torch.float64) * mask[..., None]
    found = []
    for cuts in ([], [12, 19, 40, 55, 66]):
        leaf = z.clone().requires_grad_()
        out, _ = in_pieces(block, leaf, layout, rotary, mask, cuts)
        found.append(torch.autograd.grad((out * weight).sum(), [leaf, *block.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-10)


@pytest.mark.sweep
def test_a_part_in_a_compiled_graph():
    torch.manual_seed(0)
    block, (z, rotary, blocks, mask) = build(SMALL), every_kind()
    layout, state, out = layout_of(blocks, L), None, []
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad():
        whole = block(z, layout=layout, position_embeddings=rotary, attention_mask=mask)[:, :50]
        for start, stop in ((0, 17), (17, 50)):
            part = layout.part(start, stop)
            block.prepare_layout(part, "cpu")
            y, state = compiled(
                z[:, start:stop], layout=part, position_embeddings=tuple(t[:, start:stop] for t in rotary),
                attention_mask=mask[:, start:stop], state=state, return_state=True,
            )  # fmt: skip
            out.append(y)
    torch.testing.assert_close(torch.cat(out, dim=1)[mask[:, :50]], whole[mask[:, :50]], rtol=1e-12, atol=1e-12)


def test_a_state_holds_the_slab_that_is_cut_and_no_more():
    """Its fixed tensors keep their addresses; it moves with beams; and once a video is over, its tokens are gone."""
    torch.manual_seed(0)
    block, (z, rotary, blocks, mask) = build(SMALL, layer_idx=0), every_kind()
    layout = layout_of(blocks, L)
    with torch.no_grad():
        _, state = in_pieces(block, z[:, :17], layout.part(0, 17), tuple(t[:, :17] for t in rotary), mask[:, :17], [])
        # Row 0 is 14 tokens into its first slab of 18, row 1 three into its own, after a token of text.
        assert state.slab_tokens.tolist()[0] == list(range(14))
        assert state.slab_tokens[1].tolist() == [0, 1, 2] + [-2] * 11
        assert state.slab_keys.shape[2] == state.slab_steps.shape[2] == 14
        addresses = [t.data_ptr() for t in state.without_slab() if t is not None]
        rest = dict(layout=layout.part(17, L), position_embeddings=tuple(t[:, 17:] for t in rotary))
        index = torch.tensor([1, 0])
        swapped = layout_of(blocks[::-1], L).part(17, L)
        moved, _ = block(
            z[index, 17:], layout=swapped, position_embeddings=tuple(t[index, 17:] for t in rotary),
            attention_mask=mask[index, 17:], state=state.reorder(index), return_state=True,
        )  # fmt: skip
        out, state = block(z[:, 17:], attention_mask=mask[:, 17:], state=state, return_state=True, **rest)
        assert [t.data_ptr() for t in state if t is not None] == addresses and state.slab == dict.fromkeys(state.slab)
    torch.testing.assert_close(moved[index][mask[:, 17:]], out[mask[:, 17:]], rtol=1e-12, atol=1e-12)


def test_a_video_whose_rest_never_comes_ends_there():
    torch.manual_seed(0)
    block, z = build(SMALL), torch.randn(1, 30, DIM, dtype=torch.float64)
    layout = TokenLayout([(0, 4, 2, 3)], range(2, 26), 1, 30)
    with torch.no_grad():
        _, state = block(z[:, :15], layout=layout.part(0, 15), return_state=True)
        kept = copy.deepcopy(state)
        out, state = block(z[:, 26:], state=state, return_state=True)
        assert state.slab_keys is None
        # As in a call whose text stands between the frames.
        between = TokenLayout([(0, 4, 2, 3)], [], 1, 4, spans=[(13, 0)])
        same, other = block(z[:, 26:], layout=between, state=kept, return_state=True)
        assert other.slab_tokens[0, -4:].tolist() == [-1] * 4
    torch.testing.assert_close(out, same, rtol=1e-12, atol=1e-12)


def test_windows_that_look_ahead_end_where_a_video_may_be_cut():
    torch.manual_seed(0)
    z = torch.randn(1, 24, DIM, dtype=torch.float64)
    layout = TokenLayout.from_grid((12, 1, 2))
    line = (
        "a video whose tokens see later ones must be cut where the windows of every layer end, {}, got a cut after {}"
    )
    for layer_idx in (0, 1):
        block = build(ExactConfig(window=(4, 2, 2), text_window=4), layer_idx=layer_idx, causal_windows=False)
        whole = block(z, layout=layout, position_embeddings=_no_turn(z))
        place = 8 if layer_idx == 0 else 4  # a border of this layer's windows, not of the others'
        out, _ = in_pieces(block, z, layout, _no_turn(z), torch.ones(1, 24, dtype=torch.bool), [place])
        torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match=line.format("which this one does nowhere", "3 of 12 frames in row 0")):
            block(z[:, :6], layout=layout.part(0, 6))
    # Slabs of one frame end everywhere; odd windows shift to other borders.
    block = build(ExactConfig(window=(1, 2, 2), text_window=4), causal_windows=False)
    out, _ = in_pieces(block, z, layout, _no_turn(z), torch.ones(1, 24, dtype=torch.bool), [6, 10])
    torch.testing.assert_close(out, block(z, layout=layout, position_embeddings=_no_turn(z)), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=line.format("nearest before frame 2 or 3", "2.5 of 12 frames in row 0")):
        block(z[:, :5], layout=layout.part(0, 5))


def _no_turn(z):
    return torch.ones(1, z.shape[1], 2, dtype=z.dtype), torch.zeros(1, z.shape[1], 2, dtype=z.dtype)


def test_a_part_that_does_not_go_on_is_refused():
    torch.manual_seed(0)
    block, z = build(SMALL), torch.randn(1, 24, DIM, dtype=torch.float64)
    layout = TokenLayout.from_grid((4, 2, 3))
    with torch.no_grad():
        _, state = block(z[:, :5], layout=layout.part(0, 5), return_state=True)
    for other, rest, line in (
        (None, (5, 24), "ExactMMATE: state must be of the calls before, where a layout is a part of a video, got None"),
        (state, (4, 24), "cut the video of row 0, 5 tokens into a slab, got one that goes on after 4"),
        (block.init_state(1), (5, 24), "cut the video of row 0, 0 tokens into a slab, got one that goes on after 5"),
    ):
        with pytest.raises(ValueError, match=line):
            block(z[:, rest[0] :], layout=layout.part(*rest), state=other)
    paper = build(MMATEConfig())
    with pytest.raises(ValueError, match="MMATE: layout must be of whole images and videos, as windows, reverse and"):
        paper(z[:, :5], layout=layout.part(0, 5))


def test_a_scan_alone_goes_on_anywhere():
    """`MMATE` without windows, reverse scan and major scan."""
    torch.manual_seed(0)
    block = build(MMATEConfig(branches="flex", reverse=False, major_scan=False))
    z, rotary, blocks, mask = every_kind()
    layout = layout_of(blocks, L)
    whole, after = block(z, layout=layout, position_embeddings=rotary, attention_mask=mask, return_state=True)
    out, state = in_pieces(block, z, layout, rotary, mask, [5, 20, 21, 50])
    torch.testing.assert_close(out[mask], whole[mask], rtol=1e-12, atol=1e-12)
    assert_same(state, after)
    with pytest.raises(ValueError, match="MMATE: state must be of the calls before"):
        block(z[:, 20:], layout=layout.part(20, L))


def test_a_part_of_a_layout():
    layout = layout_of(every_kind()[2], L)
    windows = ((3, 2, 2), (1, 1, 1), "mask", (1, 2, 3), (0, 1, 1))
    part = layout.part(17, 50)
    assert part.is_part and not layout.is_part and not layout.part(0, 3).has_visual
    assert part.spans == [(14, 16), (0, 12), (0, 3), (3, 28)]
    assert torch.equal(part.visual_mask(), layout.visual_mask()[:, 17:50])
    assert torch.equal(part.part(3, 20).numbers(), layout.numbers()[:, 20:37])
    # A window's tokens are those of the whole, as far as they are here.
    whole, own = layout.window_table(*windows), part.window_table(*windows)
    expected = []
    for tokens in whole.tokens.split(whole.offsets.diff().tolist()):
        row, place = tokens // L, tokens % L
        here = (place >= 17) & (place < 50)
        expected += [(row * 33 + place - 17)[here].tolist()] if here.any() else []
    assert [t.tolist() for t in own.tokens.split(own.offsets.diff().tolist())] == expected
    assert own.max_tokens == max(map(len, expected))
    again = pickle.loads(pickle.dumps(part))
    assert again.spans == part.spans and torch.equal(again.numbers(), part.numbers())
    assert layout.part(3, 33).is_part  # row 1 is cut
    assert not TokenLayout.from_grid((2, 2, 2)).part(0, 8).is_part


@pytest.mark.parametrize(
    "arguments, line",
    [
        (dict(spans=[(0, 4)]), "spans must be 2, one for each block, got 1"),
        (dict(spans=[(0, 4), (0, 3)]), "positions must have 7 entries, as spans say, got 6"),
        (dict(spans=[(0, 4), (7, 2)]), r"spans\[1\] must be \(first, count\) of a block's 8 tokens, got \(7, 2\)"),
        (dict(spans=[(0, 4), (3, 2)]), "spans.1. must be all of its block, as another of its row comes before it"),
        (dict(spans=[(0, 3), (0, 3)]), "spans.0. must be all of its block, as another of its row comes after it"),
        (dict(spans=[(0, 4), (0, 2)], positions=[0, 1, 2, 3, 9, 8]), "blocks.1. must have its tokens in the order of"),
        (dict(spans=[(0, 4), (0, 2)], positions=[0, 1, 2, 3, 8, 30]), r"positions must be in 0..11, got 30"),
    ],
)
def test_spans_that_cannot_be_are_refused(arguments, line):
    given = dict(blocks=[(0, 1, 2, 2), (0, 2, 2, 2)], positions=[0, 1, 2, 3, 8, 9], batch_size=1, length=12)
    with pytest.raises(ValueError, match="TokenLayout: " + line):
        TokenLayout(**given | arguments)


def test_a_part_out_of_reach_is_refused():
    layout = TokenLayout([(0, 1, 2, 2)], [0, 3, 2, 1], 1, 6)
    with pytest.raises(ValueError, match=r"TokenLayout: start, stop must be in order within 6, got 2, 7"):
        layout.part(2, 7)
    with pytest.raises(ValueError, match=r"must have its tokens in the order of their positions to be cut, got \(1, 2"):
        layout.part(0, 2)
    assert not layout.part(0, 4).is_part and not layout.part(4, 6).has_visual
    with pytest.raises(ValueError, match="TokenLayout: scan_order must be of whole images and videos"):
        TokenLayout.from_grid((2, 2, 2)).part(0, 5).scan_order(1)
