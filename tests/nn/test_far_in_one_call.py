"""What is far is the same by `far_attention`, where a kernel serves it, and by the scan."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops import ExactConfig, ExactMMATE, TokenLayout, _registry

L = 100
PLACES = torch.arange(L)
ANGLES = torch.linspace(0, 90, 6 * L, dtype=torch.float64).view(1, L, 6)
FRAMES = [i + i // 12 for i in range(36)]  # text between frames
LAYOUTS = {
    "text": None,
    "frames apart": TokenLayout(
        [(0, 3, 3, 4), (1, 3, 3, 4)], [*(10 + i for i in FRAMES), *(50 + i for i in FRAMES)], 2, L
    ),
    "frames together": TokenLayout([(0, 3, 3, 4), (1, 3, 3, 4)], [*range(20, 56), *range(60, 96)], 2, L),
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "padded on the left": dict(attention_mask=torch.stack((PLACES >= 0, PLACES >= 9))),
    "padded on the right": dict(attention_mask=torch.stack((PLACES >= 0, PLACES < 97))),
    "packed": dict(seq_idx=(torch.tensor([[57], [97]]) <= PLACES).int()),
    "rotated": dict(position_embeddings=(ANGLES.cos(), ANGLES.sin())),
}  # fmt: skip
PAIRS = [(a, b) for a in LAYOUTS for b in OPTIONS if (a, b) != ("frames apart", "packed")]


@pytest.fixture(autouse=True)
def needs_a_kernel():
    if (why := _registry.why_not("far_attention", "cpu", "cpu")) is not None:
        pytest.skip(why)


def make(layer, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = ExactConfig(window=(2, 2, 2), text_window=12, **(dict(sink_tokens=3, kept_tokens=5) | options))
    block = ExactMMATE(32, 4, 2, 8, layer_idx=layer, config=config).to(dtype)
    with torch.no_grad():
        for p in block.parameters():
            p += 0.1 * torch.randn_like(p)
        block.share.bias += 7  # what is far counts
        block.far_limit.fill_(8)
    return block


def both(run):
    """By the op, and by the scan."""
    with torch.no_grad():
        ours = run()
        with linmu_ops.use_impl("far_attention:reference"):
            pairs = list(zip(ours, run(), strict=True))
    assert pairs
    return pairs


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "linmu":
            self.names.add(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


def calls(run):
    with Calls() as seen:
        run()
    return seen.names


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("layout", "options"), PAIRS)
def test_values(layout, options, layer):
    block, given = make(layer), OPTIONS[options] | dict(layout=LAYOUTS[layout])
    z = torch.randn(2, L, 32, dtype=torch.float64)
    real = given.get("attention_mask", torch.ones(2, L, dtype=torch.bool))

    def run():
        y, state = block(z, return_state=True, **given)
        return block(z, **given)[real], y[real], *(t for t in state if t is not None)

    for a, b in both(run):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [dict(sink_tokens=0), dict(kept_tokens=0), dict(z_gate=False), dict(feature_dim=11), dict(initial_decay=0.5)],
    ids=str,
)
def test_options(options):
    block, z = make(0, **options), torch.randn(2, L, 32, dtype=torch.float64)
    for a, b in both(lambda: (block(z), block(z, layout=LAYOUTS["frames apart"]))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_in_pieces_it_is_one_call():
    block, z = make(1), torch.randn(2, L, 32, dtype=torch.float64)

    def run():
        state, outputs = None, []
        for first, last in ((0, 30), (30, 41), (41, 70), (70, L)):
            y, state = block(z[:, first:last], state=state, return_state=True)
            outputs.append(y)
        return torch.cat(outputs, dim=1), *(t for t in state if t is not None)

    for a, b in both(run):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(run()[0], block(z), rtol=1e-9, atol=1e-9)


def test_a_video_that_is_cut():
    """Its state is that before the slab, though text reads after more steps than that."""
    block, z = make(0), torch.randn(1, L, 32, dtype=torch.float64)
    layout = TokenLayout([(0, 4, 3, 4)], list(range(40, 88)), 1, L)

    def run():
        state, outputs = None, []
        for first, last in ((0, 60), (60, 80), (80, L)):
            part = layout.part(first, last)
            y, state = block(z[:, first:last], layout=part, state=state, return_state=True)
            outputs.append(y)
        return torch.cat(outputs, dim=1), *(t for t in state if t is not None)

    for a, b in both(run):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    """No further from float64 than the scan is, but for a little."""
    block, z = make(0, dtype), torch.randn(2, L, 32).to(dtype)
    exact = make(0, dtype).double()
    with torch.no_grad():
        want = exact(z.double())
    (ours, scan), *_ = both(lambda: [block(z)])
    error, other = ((t.double() - want).abs().max() for t in (ours, scan))
    assert ours.dtype == dtype and error <= 1.5 * other + 1e-6


def test_what_is_not_finite_reaches_who_sees_it():
    """A token of NaN that stays near for a while, and is far then."""
    block, z = make(0), torch.randn(2, L, 32, dtype=torch.float64)
    z[0, 40] = torch.nan
    for a, b in both(lambda: [block(z)]):
        assert torch.equal(a.isnan(), b.isnan()) and not a[1].isnan().any() and not a[0, :40].isnan().any()


def test_when_it_serves():
    """Without gradients, where something is far, in rows of one sequence."""
    block, z = make(0), torch.randn(2, L, 32, dtype=torch.float64)
    with torch.no_grad():
        assert calls(lambda: block(z)) == {"near_attention", "far_attention"}
        assert "far_attention" not in calls(lambda: block(z[:, :12]))
        assert "ssd_scan" in calls(lambda: block(z, **OPTIONS["packed"]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "far_attention" not in calls(lambda: make(0, torch.float32)(z.float()))
    assert "far_attention" not in calls(lambda: block(z))
