"""Ops under what PyTorch does to a function: derived twice and forwards, mapped, traced, in threads and processes."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import linmu_ops
from linmu_ops import TokenLayout, _registry
from linmu_ops._testing import run_op, small_inputs, written

# Smaller than the small case, where differences by every element would take long.
SIZES = {
    "branch_mix_norm": dict(L=4, D=6),
    "causal_conv1d": dict(L=6, D=5),
    "gated_delta_scan": dict(L=4, K=4, V=3),
    "gated_norm": dict(L=4, D=6),
    "near_attention": dict(L=4, before=1, P=3),
    "ssd_scan": dict(L=4, P=3, N=4),
    "window_attention": dict(P=4, R=4, grid=(1, 3, 4), window=(1, 2, 3)),
}
DIFFERENTIABLE = [op for op, o in _registry.OPS.items() if o.backward]
STEPS = [op for op, o in _registry.OPS.items() if not o.backward]
CONSTANT = {"cos", "sin"}
# By which name an op takes its first values.
VALUES = {op: "x" if "x" in small_inputs(op) else "q" for op in STEPS}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linmu_ops.LinmuWarning)
        yield


@pytest.fixture(params=["cpu", "reference"])
def impl(request):
    with linmu_ops.use_impl(f"*:{request.param}"):
        yield request.param


def case(op, dtype=torch.float64):
    """A function of the op's float arguments alone, to a number, and these."""
    inputs = small_inputs(op, dtype=dtype, **SIZES.get(op, {}))
    names = [n for n, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point() and n not in CONSTANT]

    def f(*values):
        out = run_op(op, **{**inputs, **dict(zip(names, values, strict=True))})
        outs = out if isinstance(out, tuple) else (out,)
        return sum((o * (1 + 0.1 * o)).sum() for o in outs)  # not linear: every second derivative is asked for

    return f, [inputs[n] for n in names]


def directions(values):
    torch.manual_seed(1)
    return [torch.randn_like(v) for v in values]


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def leaves(values):
    return [v.clone().requires_grad_() for v in values]


def derivative(f, values, along, step=1e-5):
    """Of a function of float64 values, by differences."""
    moved = [[v + s * step * d for v, d in zip(values, along, strict=True)] for s in (1, -1)]
    return (f(*moved[0]) - f(*moved[1])) / (2 * step)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_of_gradients(op, impl):
    f, values = case(op)
    along, other = directions(values), [torch.roll(d, 1) for d in directions(values)]

    def slope(*at):
        at = leaves(at)
        return dot(torch.autograd.grad(f(*at), at), along).detach()

    at = leaves(values)
    first = torch.autograd.grad(f(*at), at, create_graph=True)
    second = torch.autograd.grad(dot(first, along), at)
    torch.testing.assert_close(dot(second, other), derivative(slope, values, other), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_graph_of_the_gradient_that_nobody_asks(op, impl):
    f, values = case(op)
    found = []
    for kept in (False, True):
        at = leaves(values)
        grads = torch.autograd.grad(f(*at), at, create_graph=kept)
        assert all(g.requires_grad == kept for g in grads)
        found.append([g.detach() for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode(op, impl):
    """By torch.func.jvp and by dual tensors: what the gradient says of this direction."""
    f, values = case(op)
    along, at = directions(values), leaves(values)
    want = dot(torch.autograd.grad(f(*at), at), along)
    torch.testing.assert_close(torch.func.jvp(f, tuple(values), tuple(along))[1], want, rtol=1e-9, atol=1e-9)
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(v, d) for v, d in zip(values, along, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, want, rtol=1e-9, atol=1e-9)
        assert forward_ad.unpack_dual(f(*values)).tangent is None


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_functional_gradients(op, impl):
    f, values = case(op)
    at, along = leaves(values), directions(values)
    want = torch.autograd.grad(f(*at), at, create_graph=True)
    every = tuple(range(len(values)))
    for found in (torch.func.grad(f, every)(*values), torch.func.jacrev(f, every)(*values)):
        for g, w in zip(found, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    # Reverse over reverse, and forward over reverse.
    products = torch.autograd.grad(dot(want, along), at)
    over = torch.func.grad(lambda *at: dot(torch.func.grad(f, every)(*at), along), every)(*values)
    forward = torch.func.jvp(torch.func.grad(f, every), tuple(values), tuple(along))[1]
    for p, g, t in zip(products, over, forward, strict=True):
        torch.testing.assert_close(g, p, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(t, p, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_functional_gradients_within_inference_mode(op, impl):
    f, values = case(op)
    every = tuple(range(len(values)))
    want = torch.func.grad(f, every)(*values)
    with torch.inference_mode():
        for given in (values, [v.clone() for v in values]):  # of outside, and of inference mode
            for g, w in zip(torch.func.grad(f, every)(*given), want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_vmap(op, impl):
    """Alone, over a gradient, under a gradient, and under a backward pass."""
    f, values = case(op)
    batch = [torch.stack([v, v + 0.05, v - 0.03], dim=min(v.dim(), 1)) for v in values]
    dims = tuple(min(v.dim(), 1) for v in values)
    samples = [[b.select(d, i) for b, d in zip(batch, dims, strict=True)] for i in range(3)]
    every = tuple(range(len(values)))
    want = torch.stack([f(*s) for s in samples])
    torch.testing.assert_close(torch.vmap(f, dims)(*batch), want)
    grads = [torch.func.grad(f, every)(*s) for s in samples]
    mapped = torch.vmap(torch.func.grad(f, every), dims)(*batch)
    under = torch.func.grad(lambda *b: torch.vmap(f, dims)(*b).sum(), every)(*batch)
    at = leaves(batch)
    outer = torch.autograd.grad(torch.vmap(f, dims)(*at).sum(), at)
    for i in range(len(values)):
        expected = torch.stack([g[i] for g in grads])
        torch.testing.assert_close(mapped[i], expected)
        for found in (under[i], outer[i]):
            torch.testing.assert_close(found.movedim(dims[i], 0), expected)


@pytest.mark.parametrize(("op", "optional"), [*((op, True) for op in STEPS), ("exact_step", False)])
def test_vmap_of_a_step_writes_each_state(op, optional, impl):
    inputs = small_inputs(op)
    if not optional:
        sinks = inputs.pop("sinks").shape[1]
        inputs |= {name: inputs[name][:, :, sinks:].contiguous() for name in ("keys", "values")}
    names = [name for name in written(op) if name in inputs]
    state, x = [inputs.pop(name) for name in names], inputs.pop(VALUES[op])

    def step(v, *state):
        out = getattr(linmu_ops, op)(**inputs | dict(zip(names, state, strict=True)) | {VALUES[op]: v})
        return out if isinstance(out, tuple) else (out,)

    states, xs = [torch.stack([t, t.roll(1, 0)]) for t in state], torch.stack([x, 2 * x])
    expected = [t.clone() for t in states]
    want = [step(*each) for each in zip(xs, *expected, strict=True)]
    found = torch.vmap(step)(xs, *states)
    assert all(torch.equal(f, torch.stack(w)) for f, w in zip(found, zip(*want, strict=True), strict=True))
    assert all(torch.equal(s, e) for s, e in zip(states, expected, strict=True))
    with pytest.raises(ValueError, match=f"{op}: {written(op)[0]} must be mapped over by vmap"):
        torch.vmap(lambda v: step(v, *state))(xs)


@pytest.mark.parametrize("op", STEPS)
def test_a_step_has_no_derivative(op, impl):
    inputs = small_inputs(op)
    x = inputs.pop(VALUES[op])

    def run(x):
        return getattr(linmu_ops, op)(**inputs | {VALUES[op]: x})

    with pytest.raises(RuntimeError, match=f"{op}: has no forward-mode derivative"):
        torch.func.jvp(run, (x,), (x,))
    with pytest.raises(RuntimeError, match=f"{op}: has no gradient"):
        torch.func.grad(lambda x: run(x).sum())(x)


def test_the_slow_way_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _registry._warned.clear()
        f, values = case("causal_conv1d")
        for _ in range(2):
            torch.func.jvp(f, tuple(values), tuple(values))
    assert [str(w.message) for w in caught if w.category is linmu_ops.LinmuWarning] == [
        "linmu_ops.causal_conv1d: forward-mode AD runs the slow reference"
    ]


def fake(f, q):
    with FakeTensorMode() as mode:
        return f(mode.from_tensor(q))


def fake_with_real(f, q):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return f(mode.from_tensor(q))


AROUND = {
    "fake": fake,
    "fake, with real tensors": fake_with_real,
    "functionalize": lambda f, q: torch.func.functionalize(f)(q),
    "grad": lambda f, q: torch.func.grad(lambda q: f(q).sum())(q),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "vmap": lambda f, q: torch.vmap(f)(q[None]),
    "inference": lambda f, q: torch.inference_mode()(f)(q),
}


@pytest.mark.parametrize("around", AROUND)
def test_a_layout_keeps_nothing_made_under(around):
    """Neither a mode's, nor a transform's, nor a trace's tensors: whoever asks later is given plain ones."""
    from linmu_ops import token_layout

    token_layout._from_grid.cache_clear()
    q = torch.randn(2, 12, 2, 4)

    def f(q):
        layout = TokenLayout.from_grid((1, 3, 4), 2)
        layout.scan_order(1), layout.visual_mask(), layout.slab_chunks((1, 2, 2)), layout.text_chunks(4)
        return linmu_ops.window_attention(q, q, q, grid=(1, 3, 4), window=(1, 2, 2))

    want = type(AROUND[around](f, q))
    layout = TokenLayout.from_grid((1, 3, 4), 2)
    kept = [t for made in layout._cache.values() for t in made if isinstance(t, torch.Tensor)]
    assert len(kept) >= 7
    for t in kept:
        assert type(t) is torch.Tensor and not t.is_inference()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(t)
        t.sum().item()
    assert type(f(q)) is torch.Tensor and type(AROUND[around](f, q)) is want
    f(q.requires_grad_()).sum().backward()


def test_two_threads_at_once(impl):
    f, values = case("ssd_scan")
    want, found = f(*values), []

    def run():
        at = leaves(values)
        out = f(*at)
        out.backward()
        found.append(out.detach())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    # use_impl holds in the thread that asked: these choose for themselves.
    assert len(found) == 4 and all(torch.allclose(o, want, rtol=1e-12) for o in found)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        f, values = case("ssd_scan")
        return f(*values) + TokenLayout.from_grid((1, 2, 3), 1).scan_order(i).sum()


def test_workers_of_a_data_loader():
    """Forked from a process that has run ops, and kept layouts, already."""
    want = [Rows()[i] for i in range(4)]
    found = [row[0] for row in torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork")]
    assert torch.equal(torch.stack(want), torch.stack(found))


def test_grids_inside_an_exported_graph_are_those_of_the_planner():
    from linmu_ops._traced_layout import TracedGrid

    draw = torch.Generator().manual_seed(0)

    def sizes(low, high):
        return tuple(torch.randint(low, high + 1, (3,), generator=draw).tolist())

    for n in range(200):
        grid, batch, text = sizes(1, 6), 1 + n % 3, 3 * (n % 2)
        size = grid[0] * grid[1] * grid[2]
        layout = TokenLayout([(r, *grid) for r in range(batch)], [*range(size)] * batch, batch, size + text)
        traced = TracedGrid(grid, text, batch)
        assert torch.equal(layout.visual_mask(), traced.visual_mask())
        assert torch.equal(layout.reverse_seq_idx(), traced.reverse_seq_idx())
        assert all(torch.equal(layout.scan_order(i), traced.scan_order(i)) for i in range(4))
        image = (sizes(1, 5), sizes(0, 5)) if n % 5 < 2 else (None, None)
        windows = (sizes(1, 5), sizes(0, 5), ("join", "mask")[n % 4 // 2], *image)
        for a, b in zip(layout.window_table(*windows)[:3], traced.window_table(*windows)[:3], strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
        visual = layout.visual_mask().flatten().nonzero()[:, 0]
        begins = []
        for tokens, begin, inverse, between in (layout.slab_chunks(*windows), traced.slab_chunks(*windows, "cpu")):
            slots = inverse.flatten()[visual]
            assert torch.equal(tokens.flatten()[slots], visual)
            begins.append(begin[slots // tokens.shape[1]])
            assert not between.numel()
        assert torch.equal(*begins)
