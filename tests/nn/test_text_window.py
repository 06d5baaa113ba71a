"""Windows longer than a chunk, against one dense mask."""

from __future__ import annotations

import pytest
import torch

from linmu_ops import ExactConfig, ExactMMATE
from linmu_ops.nn.text_window import attend, attend_with_lse, causal_window_attention, chunk_size


@pytest.mark.parametrize("length, window, batch", [(300, 100, 2), (130, 64, 1), (50, 128, 2), (257, 65, 3), (65, 1, 1)])
def test_against_a_dense_mask(length, window, batch):
    torch.manual_seed(0)
    before = window + 7
    q, k, v = (torch.randn(batch, before + length, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    valid = torch.ones(batch, length, dtype=torch.bool)
    at = torch.arange(before + length)
    behind = at[:, None] - at
    mask = ((behind >= 0) & (behind < window)).expand(batch, -1, -1)[:, before:]
    expected = attend(q[:, before:], k, v, mask, 0.3)
    state = (k[:, before - window : before], v[:, before - window : before], valid.new_ones(batch, window))
    size = chunk_size(window)
    chosen = torch.arange(0, batch * -(-length // size), 2)
    for some in (None, chosen):
        y = causal_window_attention(q[:, before:], k[:, before:], v[:, before:], valid, window, 0.3, *state, some)
        chunks = torch.arange(batch * -(-length // size)) if some is None else some
        made = torch.zeros(batch * -(-length // size), dtype=torch.bool).index_fill(0, chunks, True)
        made = made.repeat_interleave(size).view(batch, -1)[:, :length]
        torch.testing.assert_close(y[made], expected[made])
        assert not y[~made].any()


def test_attention_and_its_lse():
    q, k, v, mask = _example(torch.float64)
    y, lse = attend_with_lse(q, k, v, mask, 0.3)
    torch.testing.assert_close(y, attend(q, k, v, mask, 0.3))
    scores = torch.einsum("bihp,bjhp->bhij", q, k.repeat_interleave(3, dim=2)) * 0.3
    torch.testing.assert_close(lse, scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1).mT)


def _example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, rows, heads, 8, dtype=dtype) for rows, heads in ((3, 6), (7, 2), (7, 2)))
    return q, k, v, (torch.rand(2, 3, 7) < 0.6) | (torch.arange(7) == 2)


def test_gradients_of_attention_and_its_lse():
    q, k, v, mask = _example(torch.float64)
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: attend_with_lse(*t, mask, 0.3), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_good_as_pytorchs(dtype):
    """Twice the error that the same expression makes in the same dtype, against float64."""
    *exact, mask = _example(torch.float64)
    dy, dlse = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6)

    def gradients(rule, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in exact]
        y, lse = rule(*inputs, mask, 0.3)
        return torch.autograd.grad((y, lse), inputs, (dy.to(y.dtype), dlse.to(lse.dtype)))

    def plain(q, k, v, mask, scale):
        k, v = (t.repeat_interleave(3, dim=2) for t in (k, v))
        scores = torch.einsum("bihp,bjhp->bihj", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
        return torch.einsum("bihj,bjhp->bihp", scores.softmax(-1).to(v.dtype), v), scores.logsumexp(-1)

    for ours, theirs, true in zip(
        gradients(attend_with_lse, dtype), gradients(plain, dtype), gradients(plain, torch.float64), strict=True
    ):
        bound = 2 * (theirs - true).abs().max() + torch.finfo(dtype).eps * true.abs().max()
        assert (ours - true).abs().max() <= bound


def test_no_scores_are_kept():
    window, length = 128, 512
    block = ExactMMATE(64, 8, 2, config=ExactConfig(text_window=window, kept_tokens=16))
    z = torch.randn(1, length, 64, requires_grad=True)
    sizes = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(z)
    assert sizes and max(sizes) < length * window * 8


def test_under_autocast_it_computes_in_half_precision():
    q, k, v, mask = _example(torch.float32)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        y, lse = attend_with_lse(q, k, v, mask, 0.3)
    assert y.dtype == torch.bfloat16 and lse.dtype == torch.float32
    for t, gradient in zip(inputs, torch.autograd.grad(y.float().sum() + lse.sum(), inputs), strict=True):
        assert gradient.dtype == t.dtype and gradient.isfinite().all()
