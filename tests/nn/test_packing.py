"""Rows of several sequences: each is as it is alone, and nothing of a neighbour reaches it."""

from __future__ import annotations

import pytest
import torch
from blocks import DIM, OPTIONS, build, layout_of

from linmu_ops import ExactConfig, ExactMMATE

# Each row's sequences: (length, blocks of it). Shorter than the sinks, than the taps and than the windows, and longer.
ROWS = [
    [(9, [((1, 2, 3), [2, 3, 4, 5, 6, 7])]), (1, []), (14, [((2, 1, 2), [1, 2, 3, 4]), ((1, 1, 3), [7, 8, 10])])],
    [(2, []), (20, [((3, 1, 3), [3, 4, 5, 6, 7, 8, 9, 10, 12])]), (2, [])],
]
L = 24
TOLERANCE = {torch.float64: dict(rtol=1e-12, atol=1e-12), torch.float32: dict(rtol=2e-5, atol=2e-5)}


def packed(dtype, pads=((), ())):
    """Hidden states, rotary (anew in each sequence), numbers, layout, mask, and of each sequence its row and tokens."""
    g = torch.Generator().manual_seed(0)
    length = L + max(len(p) for p in pads)
    z = torch.randn(2, length, DIM, generator=g, dtype=torch.float64).to(dtype)
    angle = torch.zeros(2, length, 1, dtype=torch.float64)
    number = torch.full((2, length), 7, dtype=torch.int32)
    mask = torch.zeros(2, length, dtype=torch.bool)
    blocks, parts = [], []
    for row, (sequences, padding) in enumerate(zip(ROWS, pads, strict=True)):
        free = [t for t in range(length) if t not in padding][:L]
        mask[row, free] = True
        blocks.append([])
        for i, (size, inside) in enumerate(sequences):
            mine, free = free[:size], free[size:]
            number[row, mine] = (4, 0, 4)[i]
            angle[row, mine, 0] = 0.3 * torch.arange(size, dtype=torch.float64)
            blocks[-1] += [(grid, [mine[p] for p in positions]) for grid, positions in inside]
            parts.append((row, mine, inside))
    rotary = tuple(t.expand(-1, -1, 2).to(dtype) for t in (angle.cos(), angle.sin()))
    return z, rotary, number, layout_of(blocks, length), mask, parts


def alone(block, z, rotary, part):
    row, mine, inside = part
    return block(
        z[row : row + 1, mine], layout=layout_of([inside], len(mine)),
        position_embeddings=tuple(t[row : row + 1, mine] for t in rotary), return_state=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_is_as_alone(name, dtype):
    """Outputs, the state of each row's last sequence, and gradients."""
    block = build(OPTIONS[name], dtype=dtype, perturb=0.1)
    z, rotary, number, layout, _, parts = packed(dtype)
    z.requires_grad_()
    out, state = block(z, layout=layout, position_embeddings=rotary, seq_idx=number, return_state=True)
    weigh = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weigh).sum(), z)
    for i, part in enumerate(parts):
        row, mine, _ = part
        one, last = alone(block, z, rotary, part)
        torch.testing.assert_close(out[row : row + 1, mine], one, **TOLERANCE[dtype])
        if one.requires_grad and out.requires_grad and (name != "no_flex" or part[2]):
            (own,) = torch.autograd.grad((one * weigh[row : row + 1, mine]).sum(), z)
            torch.testing.assert_close(grad[row, mine], own[row, mine], rtol=1e-3, atol=20 * TOLERANCE[dtype]["atol"])
        if i in (2, 5):
            for a, b in zip(state, last, strict=True):
                assert (a is None) == (b is None)
                assert a is None or a[row].shape == b[0].shape
                if a is not None:
                    torch.testing.assert_close(a[row], b[0], **TOLERANCE[dtype])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_neighbour_changes_no_bit(name):
    """Outputs, state and gradients stay when all other tokens are changed."""
    block = build(OPTIONS[name], dtype=torch.float32, perturb=0.1)
    z, rotary, number, layout, _, parts = packed(torch.float32)
    weigh = torch.randn_like(z)
    for row, mine, _ in parts:
        others = torch.ones(2, L, dtype=torch.bool)
        others[row, mine] = False
        found = []
        for size in (0, 1, 10):
            t = torch.where(others[..., None], size * torch.randn_like(z), z).requires_grad_()
            out, state = block(t, layout=layout, position_embeddings=rotary, seq_idx=number, return_state=True)
            (grad,) = torch.autograd.grad((out * weigh).sum(), t)
            last = mine[-1] == L - 1
            found.append([out[row, mine], grad[row, mine], *(s[row] for s in state if s is not None and last)])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["default", "all", "text_window", "exact", "exact_wide", "exact_delta"])
@pytest.mark.parametrize("pads", [((0, 1, 2), (0,)), ((25, 26), (24, 25, 26)), ((9, 10, 11), (2, 3)), ((0, 4, 26), ())])
@torch.no_grad()
def test_padding(name, pads):
    """Anywhere, with any number: before, after, between and within the sequences."""
    if pads[0] == (0, 4, 26):
        pads = ((0, 10, 26), (1, 25))
    block = build(OPTIONS[name])
    z, rotary, number, layout, mask, parts = packed(torch.float64, pads)
    for junk in (0.0, torch.nan):
        t = z.masked_fill(~mask[..., None], junk)
        out, state = block(
            t, layout=layout, position_embeddings=rotary, seq_idx=number, attention_mask=mask, return_state=True
        )
        assert out.isfinite().all()
        for i, part in enumerate(parts):
            row, mine, _ = part
            one, last = alone(block, z, rotary, part)
            torch.testing.assert_close(out[row : row + 1, mine], one, rtol=1e-12, atol=1e-12)
            if i in (2, 5):
                step = torch.randn(1, 1, DIM, dtype=torch.float64)
                turn = tuple(t[:1, :1] for t in rotary)
                mine_then = type(state)(*(None if s is None else s[row : row + 1].clone() for s in state))
                more = [block(step, position_embeddings=turn, state=s) for s in (mine_then, last)]
                torch.testing.assert_close(*more, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_windows_longer_than_a_chunk():
    """Sequences that begin within chunks of queries, and sinks of each."""
    config = ExactConfig(text_window=100, sink_tokens=3, window=(2, 2, 2), image_window=None)
    block = ExactMMATE(DIM, 2, config=config).double()
    sizes = [70, 5, 190, 64, 1]
    z = torch.randn(1, sum(sizes), DIM, dtype=torch.float64)
    number = torch.repeat_interleave(torch.arange(5, dtype=torch.int32), torch.tensor(sizes))[None]
    whole = block(z, seq_idx=number)
    torch.testing.assert_close(whole, torch.cat([block(t) for t in z.split(sizes, 1)], 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["exact", "exact_wide", "exact_delta"])
def test_calibration_counts_within_sequences(name):
    block = build(OPTIONS[name])
    z, rotary, number, layout, _, parts = packed(torch.float64)
    call = dict(layout=layout, position_embeddings=rotary, seq_idx=number)
    near, _, mass = block._far_mass(z, block._call(z, layout, None, rotary, None, None, False, number))
    for row, mine, inside in parts:
        own, turned = z[row : row + 1, mine], tuple(t[row : row + 1, mine] for t in rotary)
        one = block._call(own, layout_of([inside], len(mine)), None, turned, None, None, False, None)
        near_alone, _, mass_alone = block._far_mass(own, one)
        assert torch.equal(near.far[row, mine], near_alone.far[0])
        torch.testing.assert_close(near.lse[row, mine], near_alone.lse[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mass[row, mine], mass_alone[0], rtol=1e-12, atol=1e-12)
    block.calibrate([(dict(hidden_states=z, **call), torch.randn_like(z))])


def test_errors():
    block = build(OPTIONS["default"])
    z, rotary, number, layout, _, _ = packed(torch.float64)
    call = dict(layout=layout, position_embeddings=rotary)
    with pytest.raises(TypeError, match="MMATE: seq_idx must be int32, got int64"):
        block(z, **call, seq_idx=number.long())
    with pytest.raises(ValueError, match=r"MMATE: seq_idx must be \(B, L\) = \(2, 24\), got shape \(2, 23\)"):
        block(z, **call, seq_idx=number[:, 1:])
    with pytest.raises(ValueError, match="MMATE: state must be None where seq_idx is given"):
        block(z, **call, seq_idx=number, state=block.init_state(2))
    number[0, 4:] += 1
    with pytest.raises(ValueError, match=r"seq_idx must be the same all over a visual block, got .* row 0, token 4"):
        block(z, **call, seq_idx=number)
