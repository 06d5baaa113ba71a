"""What is near or kept is the same by `near_attention`, where a kernel serves it, and by PyTorch's own calls."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops import ExactConfig, ExactMMATE, TokenLayout, _registry

L = 100
PLACES = torch.arange(L)
FRAMES = [i + i // 12 for i in range(36)]  # text between frames
LAYOUTS = {
    "text": None,
    "frames apart": TokenLayout(
        [(0, 3, 3, 4), (0, 3, 3, 4), (1, 3, 3, 4)],
        [*(10 + i for i in FRAMES), *range(60, 96), *(37 + i for i in FRAMES)], 2, L,
    ),
    "frames together": TokenLayout([(0, 3, 3, 4), (1, 3, 3, 4)], [*range(20, 56), *range(40, 76)], 2, L),
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "padded on the left": dict(attention_mask=torch.stack((PLACES >= 0, PLACES >= 9))),
    "padded on the right": dict(attention_mask=torch.stack((PLACES >= 0, PLACES < 97))),
    "packed": dict(seq_idx=(torch.tensor([[57], [80]]) <= PLACES).int()),
}

# Of frames apart, a sequence would end within a video.
PAIRS = [(a, b) for a in LAYOUTS for b in OPTIONS if (a, b) != ("frames apart", "packed")]


@pytest.fixture(autouse=True)
def needs_a_kernel():
    if (why := _registry.why_not("near_attention", "cpu", "cpu")) is not None:
        pytest.skip(why)


def make(layer, **options):
    torch.manual_seed(0)
    config = ExactConfig(window=(2, 2, 2), **(dict(text_window=12, sink_tokens=3, kept_tokens=5) | options))
    block = ExactMMATE(32, 4, 2, 8, layer_idx=layer, config=config).double()
    block.share.bias.data += 6  # what is far counts
    return block


def both(run):
    """By the op, and by calls."""
    ours = run()
    with linmu_ops.use_impl("near_attention:reference"):
        return zip(ours, run(), strict=True)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("layout", "options"), PAIRS)
def test_values_and_gradients(layout, options, layer):
    block, given = make(layer), OPTIONS[options] | dict(layout=LAYOUTS[layout])
    z = torch.randn(2, L, 32, dtype=torch.float64, requires_grad=True)
    real = given.get("attention_mask", torch.ones(2, L, dtype=torch.bool))

    def run():
        y = block(z, **given)[real]
        return y, *torch.autograd.grad(y.square().sum(), (z, *block.parameters()))

    for a, b in both(run):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [dict(sink_tokens=0), dict(kept_tokens=0), dict(sink_tokens=0, kept_tokens=0)], ids=str
)
def test_without_sinks_or_kept_ones(options):
    block, z = make(0, **options), torch.randn(2, L, 32, dtype=torch.float64)
    for a, b in both(lambda: (block(z), block(z, layout=LAYOUTS["frames apart"]))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_in_pieces():
    block, z = make(1), torch.randn(2, L, 32, dtype=torch.float64)

    def run():
        state, outputs = None, []
        for first, last in ((0, 30), (30, 41), (41, L)):
            y, state = block(z[:, first:last], state=state, return_state=True)
            outputs.append(y)
        return torch.cat(outputs, dim=1), *(t for t in state if t is not None)

    for a, b in both(run):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_is_not_finite_reaches_who_sees_it():
    """A token of NaN that stays near for a while, and is far then."""
    block, z = make(0), torch.randn(2, L, 32, dtype=torch.float64)
    z[0, 40] = torch.nan
    for a, b in both(lambda: [block(z)]):
        assert torch.equal(a.isnan(), b.isnan()) and not a[1].isnan().any() and not a[0, :40].isnan().any()


def test_visual_tokens_before_which_nothing_is_near():
    layout = TokenLayout([(0, 1, 1, 4)], torch.arange(4), 1, 4)
    block = make(0, text_window=1, sink_tokens=0, kept_tokens=0)
    z = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)

    def run():
        y = block(z, layout=layout)
        return y, *torch.autograd.grad(y.square().sum(), z)

    for ours, theirs in both(run):
        torch.testing.assert_close(ours, theirs)
