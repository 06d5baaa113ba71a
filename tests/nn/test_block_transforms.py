"""Blocks under what PyTorch does to a module: checkpoints, transforms, modes, export, copies, threads, processes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from blocks import block_class
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import linmu_ops
from linmu_ops import MMATEConfig
from linmu_ops.nn import EXACT, LITERAL, ExactConfig

DIM, HEADS = 24, 4
CONFIGS = {
    "paper": MMATEConfig(),
    "exact": EXACT,
    "window": MMATEConfig(text_window=3),
    "literal": LITERAL,
}
SMALL = ExactConfig(text_window=3, sink_tokens=1, kept_tokens=2)


def block(name, dtype=torch.float64):
    torch.manual_seed(0)
    made = block_class(CONFIGS[name])(DIM, HEADS, config=CONFIGS[name]).to(dtype).eval()
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
        for state, was in zip(states, kept, strict=True):
            assert state is None or all(t is None or torch.equal(t, c) for t, c in zip(state, was, strict=True))
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


def along_and_slopes(f, h):
    """A direction, the gradient, and the second derivative in that direction, by differences of gradients."""
    along = torch.randn_like(h)

    def gradient(h):
        h = h.clone().requires_grad_()
        return torch.autograd.grad(f(h), h)[0]

    return along, gradient(h), (gradient(h + 1e-5 * along) - gradient(h - 1e-5 * along)) / 2e-5


@pytest.mark.parametrize("grid", [None, (1, 3, 4)], ids=["text", "grid"])
def test_transforms(name, grid):
    b, h = block(name), hidden(12, 1)
    made = linmu_ops.TokenLayout([(0, 1, 2, 4)], range(2, 10), 1, 12) if grid is None and name == "exact" else None

    def f(h):
        return b(h, grid=grid, layout=made).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linmu_ops.LinmuWarning)
        along, slope, bend = along_and_slopes(f, h)
        assert same(torch.func.grad(f)(h), slope)
        torch.testing.assert_close(torch.func.jvp(f, (h,), (along,))[1], (slope * along).sum())
        both = torch.stack([h, h + along])
        torch.testing.assert_close(torch.vmap(f)(both), torch.stack([f(x) for x in both]))
        mapped = torch.vmap(torch.func.grad(f))(both)
        assert same(mapped[0], slope) and same(mapped[1], torch.func.grad(f)(both[1]))
        torch.testing.assert_close(torch.func.functionalize(f)(h), f(h))
        x = h.clone().requires_grad_()
        first = torch.autograd.grad(f(x), x, create_graph=True)[0]
        assert same(first, slope)
        if "window" in name and grid is None:  # PyTorch's own attention, which says so
            with pytest.raises(RuntimeError, match="scaled_dot_product"):
                torch.autograd.grad((first * along).sum(), x)
        else:
            assert same(torch.autograd.grad((first * along).sum(), x)[0], bend, 1e-6)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert b(mode.from_tensor(h), grid=grid, layout=made).shape == h.shape
        with torch.inference_mode():
            assert torch.equal(f(h), f(h.clone()))
        again = h.clone().requires_grad_()
        f(again).backward()
        assert type(again.grad) is torch.Tensor and same(again.grad, slope)


STATEFUL = CONFIGS | {"delta": ExactConfig(far="delta", text_window=3, kept_tokens=2), "far": SMALL}


@pytest.mark.parametrize("name", STATEFUL)
@torch.no_grad()
def test_steps_mapped_over_states(name):
    """Each sample's state is written."""
    torch.manual_seed(0)
    b = block_class(STATEFUL[name])(DIM, HEADS, config=STATEFUL[name]).double()
    _, state = b(hidden(9), return_state=True)
    names = [field for field, t in state._asdict().items() if t is not None]
    states, xs = [torch.stack([t, t]) for t in state if t is not None], torch.stack([hidden(1), hidden(1)])

    def step(x, *tensors):
        y, after = b(x, state=type(state)(**dict(zip(names, tensors, strict=True))), return_state=True)
        return y, *(getattr(after, field) for field in names)

    for i in range(4):
        want = [step(x * (i + 1), *(t[n].clone() for t in states)) for n, x in enumerate(xs)]
        y, *states = torch.vmap(step)(xs * (i + 1), *states)
        for got, each in zip((y, *states), zip(*want, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(each), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("made_fake", [True, False])
def test_shapes_alone_of_padded_rows_with_images(name, made_fake):
    """As memory estimators ask for them: every input may have no values."""
    b, h = block(name), hidden(12)
    layout = linmu_ops.TokenLayout([(0, 1, 2, 2), (1, 1, 2, 3)], [*range(2, 6), *range(4, 10)], 2, 12)
    mask, numbers = torch.ones(2, 12, dtype=torch.bool), torch.zeros(2, 12, dtype=torch.int32)
    mask[0, :2] = False
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [mode.from_tensor(t) if made_fake else t for t in (mask, numbers)]
        for more in ({}, dict(attention_mask=given[0]), dict(seq_idx=given[1])):
            assert b(mode.from_tensor(h), layout=layout, **more).shape == h.shape
            with torch.no_grad():
                _, state = b(mode.from_tensor(h), layout=layout, **more, return_state=True)
                assert b(mode.from_tensor(h[:, :1]), state=state).shape == (2, 1, DIM)


def test_copies(name):
    """A block, its state and its configuration: copied, pickled, and with weights from elsewhere."""
    b, h = block(name), hidden(5)
    with torch.no_grad():
        y, state = b(h, return_state=True)
        for other in (copy.deepcopy(b), pickle.loads(pickle.dumps(b))):
            assert torch.equal(other(h), y) and other.config == b.config
            for kept in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
                assert type(kept) is type(state)
                mine = type(state)(*(None if t is None else t.clone() for t in state))
                assert torch.equal(other(h[:, :1], state=kept), b(h[:, :1], state=mine))
                assert all(t is None or torch.equal(t, m) for t, m in zip(kept, mine, strict=True))
    assert pickle.loads(pickle.dumps(b.config)) == copy.deepcopy(b.config) == b.config


def test_threads(name):
    b, h = block(name), hidden(12)
    want = b(h, grid=(1, 3, 4)).detach()
    found = []
    threads = [threading.Thread(target=lambda: found.append(b(h, grid=(1, 3, 4)))) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 2 and all(torch.equal(y, want) for y in found)


FORKED = """
import multiprocessing, sys, torch

torch.set_num_threads(1)
cases = torch.load(sys.argv[1], weights_only=False)

def answers():
    return [b(h, grid=(1, 3, 4)).detach() for b, h, _ in cases]

def work():
    torch.set_num_threads(1)
    writer.send([y.numpy() for y in answers()])

reader, writer = multiprocessing.get_context("fork").Pipe()
found = answers()
process = multiprocessing.get_context("fork").Process(target=work)
process.start()
assert reader.poll(60)
found += [torch.from_numpy(y) for y in reader.recv()]
process.join()
assert all(torch.equal(y, want) for y, (_, _, want) in zip(found, cases * 2, strict=True))
"""


def test_a_fork(tmp_path):
    """Of a process that has run blocks, and has had no threads: while one ends, MKL holds locks that a fork keeps shut,
    and PyTorch's own matrix products wait for them."""
    made = [(block(name), hidden(12)) for name in CONFIGS]
    torch.save([(b, h, b(h, grid=(1, 3, 4)).detach()) for b, h in made], tmp_path / "cases")
    subprocess.run([sys.executable, "-c", FORKED, tmp_path / "cases"], check=True, timeout=120)


class Exported(torch.nn.Module):
    """A block on a grid of fixed size, on one whose frames are counted, and on text."""

    def __init__(self, made, kind):
        super().__init__()
        self.made, self.kind = made, kind

    def forward(self, h):
        grid = {"text": None, "grid": (2, 3, 4), "frames": (h.shape[1] // 12, 3, 4)}[self.kind]
        return self.made(h, grid=grid)


def export_cases():
    quick = {("paper", "frames", True), ("exact", "text", False)}
    for config in ("paper", "exact", "window", "literal"):
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
