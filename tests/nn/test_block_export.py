"""A prompt that returns its state, and the steps after it, exported, are the block's; of any batch and length too."""

from __future__ import annotations

import pytest
import torch
from blocks import block_class
from torch.utils._pytree import tree_leaves

from linmu_ops import MMATEConfig
from linmu_ops.nn import EXACT, LITERAL, ExactConfig
from linmu_ops.nn.near import Near

DIM, HEADS = 24, 4
CONFIGS = {"paper": MMATEConfig(), "exact": EXACT, "window": MMATEConfig(text_window=3), "literal": LITERAL}
CONFIGS["delta"] = ExactConfig(far="delta")


class Prompt(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, h):
        return self.block(h, return_state=True)


class Step(torch.nn.Module):
    """One token; the state, whose tensors it is given, is written in place."""

    def __init__(self, block, kind):
        super().__init__()
        self.block, self.kind = block, kind

    def forward(self, h, *state):
        return self.block(h, state=self.kind(*state))


def block_of(name):
    torch.manual_seed(0)
    block = block_class(CONFIGS[name])(DIM, HEADS, config=CONFIGS[name]).eval().requires_grad_(False)
    for p in block.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return block


def cases(*quick):
    for name in CONFIGS:
        for dynamic in (True, False):
            for strict in (True, False):
                marks = () if (name, dynamic, strict) in quick else pytest.mark.sweep
                yield pytest.param(name, dynamic, strict, marks=marks)


@pytest.mark.parametrize(("name", "dynamic", "strict"), list(cases(("paper", True, True), ("literal", False, False))))
def test_a_prompt(name, dynamic, strict):
    module, h = Prompt(block_of(name)), torch.randn(3, 6, DIM)
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) if dynamic else None
    program = torch.export.export(module, (h,), dynamic_shapes=shapes, strict=strict)
    for other in (h, torch.randn(4, 9, DIM) if dynamic else h + 1):
        got, want = tree_leaves(program.module()(other)), tree_leaves(module(other))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("name", "dynamic", "strict"),
    list(cases(("paper", True, False), ("literal", True, False), ("window", True, False))),
)
def test_steps(name, dynamic, strict):
    block = block_of(name)
    _, state = block(torch.randn(3, 6, DIM), return_state=True)
    module = Step(block, type(state))
    rows = {0: torch.export.Dim.DYNAMIC}
    shapes = (rows, tuple(None if t is None else rows for t in state)) if dynamic else None
    given = (torch.randn(3, 1, DIM), *(None if t is None else t.clone() for t in state))
    program = torch.export.export(module, given, dynamic_shapes=shapes, strict=strict)
    _, state = block(torch.randn(5 if dynamic else 3, 6, DIM), return_state=True)
    mine, theirs = ([None if t is None else t.clone() for t in state] for _ in range(2))
    for _ in range(3):
        h = torch.randn(5 if dynamic else 3, 1, DIM)
        torch.testing.assert_close(program.module()(h, *mine), module(h, *theirs))
    for a, b in zip(mine, theirs, strict=True):
        assert a is b is None or torch.testing.assert_close(a, b) is None


class Far(torch.nn.Module):
    def __init__(self, scan):
        super().__init__()
        self.scan = scan

    def forward(self, h, q, far, ssm):
        return tuple(self.scan.step(h, q, Near(q, q.sum(-1), far, far), ssm))


@pytest.mark.parametrize("name", ["exact", "delta"])
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_far_from_one_token(strict, name):
    """The scan of ExactMMATE alone: its whole step takes long to trace."""
    module = Far(block_of(name).scan)
    features = module.scan.state_size

    def inputs(rows):
        far = torch.randint(1, 9, (rows, 1))
        return torch.randn(rows, 1, DIM), torch.randn(rows, 1, HEADS, 6), far, torch.rand(rows, HEADS, *features)

    shapes = ({0: torch.export.Dim.DYNAMIC},) * 4
    program = torch.export.export(module, inputs(3), dynamic_shapes=shapes, strict=strict)
    other = inputs(5)
    torch.testing.assert_close(program.module()(*other), module(*other))


@pytest.mark.parametrize(
    "strict, length",
    [(False, 9), pytest.param(True, 9, marks=pytest.mark.sweep), pytest.param(False, 300, marks=pytest.mark.sweep)],
)
def test_one_row_of_any_length_up_to_a_largest(strict, length):
    """Heads of an odd number: what they are multiplied with is still known to divide."""
    torch.manual_seed(0)
    block = block_class(EXACT)(48, 3).eval().requires_grad_(False)
    lengths = {"hidden_states": {1: torch.export.Dim("length", min=2, max=500)}}
    program = torch.export.export(block, (torch.randn(1, length, 48),), dynamic_shapes=lengths, strict=strict)
    for other in (2, 37, 200):
        z = torch.randn(1, other, 48)
        torch.testing.assert_close(program.module()(z), block(z), rtol=1e-5, atol=1e-5)
