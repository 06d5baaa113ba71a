"""What training and serving do to a module: autocast, half precision, compile, checkpointing, copies, DDP."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from blocks import DIM, OPTIONS, build, layout_of, prompt
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from linmu_ops import MMATE, GridAttention, TokenLayout

COMPILED = ["default", "all", "no_flex", "exact"]


def float_call(name, seed=0):
    block = build(OPTIONS[name], dtype=torch.float32, perturb=0.1)
    z, rotary, blocks = prompt(seed=seed, dtype=torch.float32)
    return block, z, dict(layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)


@pytest.mark.parametrize("name", [*COMPILED, "literal", "exact_wide", "exact_delta"])
def test_autocast_and_bfloat16(name):
    block, z, call = float_call(name)
    exact = block(z, **call)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = block(z, **call, return_state=True)
        step = dict(position_embeddings=tuple(t[:, :1] for t in call["position_embeddings"]))
        with torch.no_grad():
            block(z[:, :1], **step, state=state)
    assert out.dtype == torch.bfloat16
    assert state.ssm is None or state.ssm.dtype == torch.float32
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
    size = exact.square().mean().sqrt()
    assert (out - exact).square().mean().sqrt() < 0.05 * size
    half = copy.deepcopy(block).bfloat16()
    out, state = half(z.bfloat16(), **call, return_state=True)
    assert out.dtype == torch.bfloat16
    assert (out - exact).square().mean().sqrt() < 0.1 * size
    with torch.no_grad():
        half(z[:, :1].bfloat16(), **step, state=half.init_state(2))


@pytest.mark.parametrize("name", [*COMPILED, "literal", "exact_wide", "exact_delta"])
def test_float64_under_autocast(name):
    """Which leaves it as it is."""
    block = build(OPTIONS[name])
    z, rotary, blocks = prompt()
    call = dict(layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    want = block(z, **call)
    with torch.autocast("cpu", torch.bfloat16):
        got = block(z, **call)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name):
    """One graph, whatever the layout."""
    block, z, call = float_call(name)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    others = [TokenLayout([(0, 1, 2, n), (1, 1, n, 3)], [*range(3, 3 + 2 * n), *range(3 * n)], 2, 24) for n in (4, 3)]
    with torch.no_grad():
        for i, layout in enumerate((call["layout"], *others)):
            call["layout"] = layout
            block.prepare_layout(layout, z.device)
            # The second layout makes the number of visual tokens symbolic; from then on nothing is recompiled.
            with torch._dynamo.config.patch(error_on_recompile=i == 2):
                torch.testing.assert_close(compiled(z, **call), block(z, **call))


@pytest.mark.sweep
@torch.no_grad()
def test_generated_code():
    """Through PyTorch's own backend: of a window with sinks its C++ does not compile as long as masks are joined."""
    block = build(dataclasses.replace(OPTIONS["exact"], text_window=16), dtype=torch.float32)
    z, (cos, sin), _ = prompt(1, dtype=torch.float32)
    z, cos, sin = (torch.cat([t] * 5, dim=1) for t in (z, cos, sin))
    torch.compiler.reset()
    call = dict(position_embeddings=(cos, sin))
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(z, **call), block(z, **call))


@pytest.mark.parametrize("name", ["text_window", "exact"])
def test_compiled_gradients(name):
    block, z, call = float_call(name)
    block.prepare_layout(call["layout"], z.device)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(run(z, **call).square().sum(), list(block.parameters())) for run in (block, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_compiled_steps(name):
    """Decoding compiles once, and updates the state where it lies."""
    block, z, call = float_call(name)
    rotary = call["position_embeddings"]
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    state, expected = block.init_state(2), block.init_state(2)
    addresses = [t.data_ptr() for t in state if t is not None]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(4):
            at = slice(i, i + 1)
            step = dict(position_embeddings=tuple(t[:, at] for t in rotary))
            got = compiled(z[:, at], **step, state=state)
            torch.testing.assert_close(got, block(z[:, at], **step, state=expected))
    assert [t.data_ptr() for t in state if t is not None] == addresses
    for a, b in zip(state, expected, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b)


def test_compiled_grid():
    """A grid needs no preparation: the layout is built while tracing."""
    block = build(OPTIONS["default"], dtype=torch.float32)
    vision = GridAttention(block, (1, 4, 5), prefix_tokens=2)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    compiled_vision = torch.compile(vision, fullgraph=True, backend="eager")
    for batch, grid in ((1, (2, 3, 4)), (3, (2, 3, 4)), (3, (4, 2, 3))):
        z = torch.randn(batch, 24, block.dim)
        torch.testing.assert_close(compiled(z, grid=grid), block(z, grid=grid))
        torch.testing.assert_close(compiled_vision(z[:, :22]), vision(z[:, :22]))


@pytest.mark.slow
@pytest.mark.sweep
def test_inductor():
    block, z, call = float_call("all")
    block.prepare_layout(call["layout"], z.device)
    out = torch.compile(block, fullgraph=True)(z, **call)
    torch.testing.assert_close(out, block(z, **call), rtol=1e-4, atol=1e-5)


def test_checkpointing():
    block, z, call = float_call("all")
    z.requires_grad_()
    wrt = [z, *block.parameters()]
    plain = torch.autograd.grad(block(z, **call).square().sum(), wrt)
    for reentrant in (False, True):
        out = checkpoint(lambda x: block(x, **call), z, use_reentrant=reentrant)
        if reentrant:
            out.square().sum().backward()
            again = [t.grad for t in wrt]
        else:
            again = torch.autograd.grad(out.square().sum(), wrt)
        for a, b in zip(plain, again, strict=True):
            assert torch.equal(a, b)


def test_copies():
    block, z, call = float_call("all")
    out = block(z, **call)
    assert torch.equal(copy.deepcopy(block)(z, **call), out)
    other, _, _ = float_call("all")
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(z, **call), out)


def test_meta_device():
    """Built without memory, then given memory and its start, as transformers loads models."""
    config = OPTIONS["all"]
    torch.manual_seed(0)
    expected = MMATE(12, 4, config=config)
    with torch.device("meta"):
        block = MMATE(12, 4, config=config)
    block.to_empty(device="cpu")
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    block.reset_new_parameters()
    for name in ("mix", "scan.dt_bias", "scan.A_log", "scan.head_norm", "scan.z_proj.bias", "norm.weight"):
        assert torch.equal(block.get_parameter(name), expected.get_parameter(name))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_call_without_memory(name):
    """Shapes of a text, an image and a step come out, as an estimate of a model's memory asks for them."""
    with torch.device("meta"):
        block = build(OPTIONS[name], dtype=torch.float32)
        z = torch.randn(2, 12, DIM)
        out, state = block(z, return_state=True)
        assert out.shape == block(z, grid=(1, 3, 4)).shape == z.shape
        assert block(z[:, :1], state=state).shape == (2, 1, DIM)
        assert all(t is None or t.is_meta for t in (out, *state))


def as_is(state, bucket):
    """A communication hook for a process that is alone."""
    reduced = torch.futures.Future()
    reduced.set_result(bucket.buffer())
    return reduced


@pytest.mark.parametrize("name", ["default", "no_swin", "no_flex", "causal"])
def test_distributed(name):
    """DDP without find_unused_parameters: every parameter gets a gradient in every step that has visual tokens."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        block, z, call = float_call(name)
        parallel = nn.parallel.DistributedDataParallel(block)
        parallel.register_comm_hook(None, as_is)
        for _ in range(2):  # the second step is the one that fails where a gradient was missing
            parallel(z, **call).square().sum().backward()
    finally:
        dist.destroy_process_group()


def test_no_quadratic_tensor():
    """The largest tensor of a long text with a text window grows with L, not with its square."""
    block = build(OPTIONS["all"], dtype=torch.float32)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes[-1] = max(sizes[-1], out.numel())
            return out

    for L in (64, 128):
        sizes.append(0)
        with Watch(), torch.no_grad():
            block(torch.randn(1, L, block.dim))
    assert sizes[1] <= 2.1 * sizes[0]
