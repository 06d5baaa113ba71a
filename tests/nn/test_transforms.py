"""Blocks under what PyTorch does to a module: checkpoints, transforms, modes, export, copies, threads, processes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import linmu_ops
from linmu_ops import MMATEConfig
from linmu_ops.nn.config import EXACT

DIM, HEADS = 24, 4
CONFIGS = {
    "paper": MMATEConfig(),
    "exact": EXACT,
    "window": MMATEConfig(text_window=3),
    "window-conv": MMATEConfig(text_window=4, conv_width=4),
    "conv-separate": MMATEConfig(conv_width=3, reverse_projections="separate", gate="token"),
}


def block(name, dtype=torch.float64):
    torch.manual_seed(0)
    made = linmu_ops.MMATE(DIM, HEADS, config=CONFIGS[name]).to(dtype).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


def hidden(length=12, batch=2, dtype=torch.float64):
    return torch.randn(batch, length, DIM, dtype=dtype)


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def same(a, b, bound=1e-12):
    return (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("with_state", [True, False])
def test_checkpoint_gives_the_same_gradients(name, reentrant, length, with_state):
    """Of the input and of every parameter, also through two blocks, of which the second's input asks for none."""
    first, second = block(name), block(name)
    before, after = hidden(5), hidden(length)
    found = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        states = [None, None]
        if with_state:
            with torch.no_grad():
                states = [b(before, return_state=True)[1] for b in (first, second)]
        kept = [None if s is None else [None if t is None else t.clone() for t in s] for s in states]
        x = after.clone().requires_grad_()
        y = run(lambda x: second(first(x, state=states[0]), state=states[1]), x)  # noqa: B023
        first.zero_grad()
        second.zero_grad()
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for b in (first, second) for p in b.parameters() if p.grad is not None)])
        for state, copy in zip(states, kept, strict=True):
            assert state is None or all(t is None or torch.equal(t, c) for t, c in zip(state, copy, strict=True))
    assert len(found[0]) == len(found[1])
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_state_is_written_where_gradients_are_off(name, mode):
    b, h = block(name), hidden(6)
    with mode():
        state = b(h, return_state=True)[1]
        addresses = [None if t is None else t.data_ptr() for t in state]
        b(hidden(1), state=state)
        wanted = b(hidden(3), state=state, return_state=True)[1]
    assert wanted is state and addresses == [None if t is None else t.data_ptr() for t in state]


class Exported(torch.nn.Module):
    """A block on a grid of fixed size, on one whose frames are counted, and on text."""

    def __init__(self, made, kind):
        super().__init__()
        self.made, self.kind = made, kind

    def forward(self, h):
        grid = {"text": None, "grid": (2, 3, 4), "frames": (h.shape[1] // 12, 3, 4)}[self.kind]
        return self.made(h, grid=grid)


def export_cases():
    quick = {("paper", "frames", True), ("window-conv", "text", False)}
    for config in ("paper", "exact", "window-conv", "conv-separate"):
        for kind in ("grid", "frames", "text"):
            for strict in (True, False):
                marks = () if (config, kind, strict) in quick else pytest.mark.sweep
                yield pytest.param(config, kind, strict, marks=marks)


@pytest.mark.parametrize("config, kind, strict", list(export_cases()))
def test_export_serves_other_batches_and_lengths(config, kind, strict):
    module, Dim = Exported(block(config, torch.float32), kind), torch.export.Dim
    length = {"grid": None, "frames": 12 * Dim("frames", min=2, max=9), "text": Dim("length", min=2, max=200)}[kind]
    shapes = {0: Dim("batch", min=2, max=64)} | ({1: length} if length is not None else {})
    example, other = (
        hidden(24, 3, torch.float32),
        hidden({"grid": 24, "frames": 60, "text": 77}[kind], 5, torch.float32),
    )
    program = torch.export.export(module, (example,), dynamic_shapes=(shapes,), strict=strict)
    for h in (example, other):
        torch.testing.assert_close(program.module()(h), module(h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_one_size(strict):
    module, h = Exported(block("paper", torch.float32), "grid"), hidden(24, 2, torch.float32)
    program = torch.export.export(module, (h,), strict=strict)
    torch.testing.assert_close(program.module()(h), module(h))
    assert type(module(h)) is torch.Tensor  # what was traced is not kept
