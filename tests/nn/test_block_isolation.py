"""What no token may see changes nothing: padding, other rows and sequences, later text; nor gradients and states."""

from __future__ import annotations

import pytest
import torch
from blocks import DIM, OPTIONS, build, layout_of, prompt

VALUES = {"nan": torch.nan, "inf": torch.inf, "huge": 1e30}
PAD = 4


def padded_call(side):
    """Two rows; the second has `PAD` tokens of padding, with text around its image."""
    z, (cos, sin), blocks = prompt(dtype=torch.float32)
    L = z.shape[1]
    mask = torch.ones(2, L, dtype=torch.bool)
    at = {"left": slice(0, PAD), "right": slice(L - PAD, L), "inside": slice(13, 13 + PAD)}[side]
    mask[1, at] = False
    return z, (cos.clone(), sin.clone()), blocks, mask


def run(block, z, rotary, mask, layout, weigh):
    """What a call makes of its real tokens: outputs, states, the gradients of inputs and of parameters."""
    z = z.clone().requires_grad_()
    out, state = block(z, layout=layout, position_embeddings=rotary, attention_mask=mask, return_state=True)
    kept = torch.ones(z.shape[:2], dtype=torch.bool) if mask is None else mask
    parameters = list(block.parameters())
    grads = torch.autograd.grad((out * weigh)[kept].sum(), [z, *parameters], allow_unused=True)
    assert out.isfinite().all()
    return [out[kept], grads[0], *state, *grads[1:]]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.isfinite().all())


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", OPTIONS)
def test_padding(name, value):
    block = build(OPTIONS[name], dtype=torch.float32, perturb=0.1)
    side = ("left", "right", "inside")[list(OPTIONS).index(name) % 3]
    z, rotary, blocks, mask = padded_call(side)
    if side == "inside":
        layout = layout_of([blocks[0], [((1, 3, 2), [4, 5, 7, 8, 10, 11])]], z.shape[1])
    else:
        layout = layout_of([blocks[0], [((1, 3, 2), [5, 6, 8, 9, 11, 12])]], z.shape[1])
    weigh = torch.randn_like(z)
    clean = run(block, z, rotary, mask, layout, weigh)
    junk, turned = z.masked_fill(~mask[..., None], value), [t.masked_fill(~mask[..., None], value) for t in rotary]
    assert_same(run(block, junk, turned, mask, layout, weigh), clean)
    assert not clean[1][~mask].any()


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_padding_of_later_turns(name):
    """A row that has ended, and a turn that is padded on either side, after a state."""
    block = build(OPTIONS[name], dtype=torch.float32, perturb=0.1)
    z, (cos, sin), _ = prompt(dtype=torch.float32)
    for mask in ([[True], [False]], [[True, True, True], [False, True, True]], [[True, True], [True, False]]):
        mask = torch.tensor(mask)
        n, found = mask.shape[1], []
        for value in (0.5, *VALUES.values()):
            state = block.init_state(2)
            block(z[:, :9], position_embeddings=(cos[:, :9], sin[:, :9]), state=state)
            new = z[:, 9 : 9 + n].masked_fill(~mask[..., None], value)
            turned = tuple(t[:, 9 : 9 + n].masked_fill(~mask[..., None], value) for t in (cos, sin))
            out = block(new, position_embeddings=turned, attention_mask=mask, state=state)
            assert out.isfinite().all()
            found.append([out[mask], *state])
        for other in found[1:]:
            assert_same(other, found[0])


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", OPTIONS)
def test_other_rows(name, value):
    block = build(OPTIONS[name], dtype=torch.float32, perturb=0.1)
    z, rotary, blocks = prompt(dtype=torch.float32)
    call = dict(layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    found = []
    for other in (z[1], torch.full_like(z[1], value)):
        both = torch.stack((z[0], other)).requires_grad_()
        out, state = block(both, **call, return_state=True)
        (grad,) = torch.autograd.grad(out[0].square().sum(), both)
        found.append([out[0], grad[0], *(None if t is None else t[0] for t in state)])
    assert_same(*found)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_later_text(name, value):
    """Text before a token that broke, bit by bit."""
    block = build(OPTIONS[name], dtype=torch.float32, perturb=0.1)
    z = torch.randn(1, 20, DIM)
    whole = block(z)
    for at in (1, 9, 19):
        broken = z.clone()
        broken[:, at] = value
        assert torch.equal(block(broken)[:, :at], whole[:, :at])


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_other_sequences(name, value):
    """Of a packed row: those before and behind one that broke, and the state of the last, bit by bit."""
    block = build(OPTIONS[name], dtype=torch.float32, perturb=0.1)
    z = torch.randn(1, 20, DIM)
    number = torch.tensor([[0] * 7 + [1] * 6 + [2] * 7], dtype=torch.int32)
    found = []
    for middle in (z[:, 7:13], torch.full_like(z[:, 7:13], value)):
        out, state = block(torch.cat((z[:, :7], middle, z[:, 13:]), dim=1), seq_idx=number, return_state=True)
        found.append([out[:, :7], out[:, 13:], *(t for t in state if t is not None)])
    for clean, other in zip(*found, strict=True):
        assert torch.equal(other, clean)
