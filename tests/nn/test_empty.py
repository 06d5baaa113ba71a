"""No rows, or no tokens: an empty output and an unchanged state, as the ops and PyTorch's own attention give."""

from __future__ import annotations

import pytest
import torch
from blocks import DIM, OPTIONS, build

from linmu_ops import TokenLayout


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_in_nothing_out(name):
    block = build(OPTIONS[name])
    for B, L in ((0, 5), (2, 0), (0, 0)):
        mask = torch.ones(B, L, dtype=torch.bool)
        rotary = (torch.ones(B, L, 2, dtype=torch.float64), torch.zeros(B, L, 2, dtype=torch.float64))
        for call in (
            {}, dict(attention_mask=mask), dict(position_embeddings=rotary), dict(layout=TokenLayout([], [], B, L)),
            dict(attention_mask=mask, position_embeddings=rotary, state=block.init_state(B)),
        ):  # fmt: skip
            for grad in (False, True):
                z = torch.randn(B, L, DIM, dtype=torch.float64, requires_grad=grad)
                with torch.set_grad_enabled(grad):
                    out, state = block(z, **call, return_state=True)
                    assert block(z, **call).shape == out.shape == (B, L, DIM)
                for made, first in zip(state, block.init_state(B), strict=True):
                    assert (made is None) == (first is None)
                    assert made is None or torch.equal(made, first)
                if grad and out.requires_grad:
                    out.sum().backward()
                    assert z.grad is None or z.grad.shape == z.shape


def test_a_grid_of_no_rows():
    assert build(OPTIONS["default"])(torch.randn(0, 12, DIM, dtype=torch.float64), grid=(1, 3, 4)).shape == (0, 12, DIM)


@torch.no_grad()
def test_an_empty_turn_changes_no_state():
    block = build(OPTIONS["exact"])
    _, state = block(torch.randn(2, 9, DIM, dtype=torch.float64), return_state=True)
    before = [None if t is None else t.clone() for t in state]
    assert block(torch.randn(2, 0, DIM, dtype=torch.float64), state=state).shape == (2, 0, DIM)
    assert all(a is None or torch.equal(a, b) for a, b in zip(state, before, strict=True))
