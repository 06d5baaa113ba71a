"""Where nothing is far a call runs neither maps nor scan, and what comes later is as if it had."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from blocks import OPTIONS, build, layout_of, prompt
from torch import nn

from linmu_ops import ExactConfig, ExactMMATE
from linmu_ops.nn.far import FarAttention


@pytest.fixture
def ran(monkeypatch):
    """Counts of what far attention did."""
    counts = Counter()

    def counted(name):
        before = getattr(FarAttention, name)

        def run(self, *args, **kwargs):
            counts[name] += 1
            return before(self, *args, **kwargs)

        monkeypatch.setattr(FarAttention, name, run)

    for name in ("read", "gate", "enter", "_queries", "_features"):
        counted(name)
    return counts


def test_a_short_prompt_is_the_attention_that_it_replaces(ran):
    torch.manual_seed(0)
    dim, heads = 24, 3
    block = ExactMMATE(dim, heads, config=ExactConfig(text_window=8, sink_tokens=1, kept_tokens=8)).double().eval()
    nn.init.normal_(block.share.weight)
    block.share.bias.data.fill_(9.0)  # what is far would weigh much
    z = torch.randn(2, 18, dim, dtype=torch.float64)
    q, k, v = (p(z).unflatten(2, (heads, -1)).transpose(1, 2) for p in _projections(block))
    attention = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    wanted = block.o_proj(attention.transpose(1, 2).flatten(2))
    with torch.no_grad():
        torch.testing.assert_close(block(z[:, :16]), wanted[:, :16])
        y, state = block(z[:, :5], return_state=True)
        parts = [y, *(block(z[:, i : i + 1], state=state) for i in range(5, 18))]
        torch.testing.assert_close(torch.cat(parts, dim=1), wanted)
    assert not ran


def _projections(block):
    return block.windows.q_proj, block.windows.k_proj, block.windows.v_proj


@pytest.mark.parametrize("name", ["exact", "exact_plain", "exact_wide", "exact_delta"])
@pytest.mark.parametrize("first", [0, 1, 2, 6, 20])
def test_prompts_grow_until_something_is_far(name, first, ran):
    """With gradients nothing is left out: that is what calls without them are judged by."""
    torch.manual_seed(1)
    block = build(OPTIONS[name])
    z, rotary, _ = prompt()
    wanted, left = block(z, position_embeddings=rotary, return_state=True)
    ran.clear()
    with torch.no_grad():
        y, state = block(z[:, :first], position_embeddings=_cut(rotary, 0, first), return_state=True)
        parts = [y]
        for i in range(first, z.shape[1]):
            parts.append(block(z[:, i : i + 1], position_embeddings=_cut(rotary, i, i + 1), state=state))
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted)
    for mine, other in zip(state, left, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, other)
    assert ran["gate"]
    if first < OPTIONS[name].text_window:
        assert ran["gate"] < z.shape[1] - first and not ran["read"]


def _cut(rotary, start, stop):
    return tuple(t[:, start:stop] for t in rotary)


@pytest.mark.parametrize("cuts", [[19], [19, 21], [12, 19, 23]])
def test_visual_tokens_and_padding_in_pieces(cuts):
    torch.manual_seed(2)
    block = build(OPTIONS["exact_wide"])
    z, rotary, blocks = prompt(batch=1)
    mask = torch.ones(z.shape[:2], dtype=torch.bool)
    mask[:, :1] = mask[:, 11:12] = False
    inputs = dict(layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary, attention_mask=mask)
    wanted, left = block(z, return_state=True, **inputs)
    with torch.no_grad():
        whole, state = block(z, return_state=True, **inputs)
    torch.testing.assert_close(whole, wanted)
    torch.testing.assert_close(state.ssm, left.ssm)
    with torch.no_grad():
        parts, state = [], None
        for start, stop in zip([0, *cuts], [*cuts, z.shape[1]], strict=True):
            within = [[(size, [p - start for p in at]) for size, at in blocks[0] if start <= at[0] and at[-1] < stop]]
            y, state = block(
                z[:, start:stop], layout=layout_of(within, stop - start) if within[0] else None, return_state=True,
                position_embeddings=_cut(rotary, start, stop), attention_mask=mask[:, start:stop], state=state,
            )  # fmt: skip
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], wanted[mask])


def test_gradients_are_zeros_and_not_missing():
    block = build(OPTIONS["exact"])
    z, rotary, _ = prompt()
    block(z[:, :2], position_embeddings=_cut(rotary, 0, 2)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert not block.scan.b_map.grad.any() and not block.share.weight.grad.any()
