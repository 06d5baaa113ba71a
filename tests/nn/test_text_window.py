"""Windows longer than a chunk, against one dense mask."""

from __future__ import annotations

import pytest
import torch

from linmu_ops.nn.text_window import Sinks, attend, attend_with_mass, causal_window_attention, chunk_size


@pytest.mark.parametrize("length, window, batch", [(300, 100, 2), (130, 64, 1), (50, 128, 2), (257, 65, 3), (65, 1, 1)])
def test_against_a_dense_mask(length, window, batch):
    torch.manual_seed(0)
    before = window + 7
    q, k, v = (torch.randn(batch, before + length, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    sink = torch.randn(2, batch, 3, 2, 8, dtype=torch.float64)
    valid = torch.ones(batch, length, dtype=torch.bool)
    seen = torch.rand(batch, length, 3) < 0.5
    at = torch.arange(before + length)
    behind = at[:, None] - at
    mask = ((behind >= 0) & (behind < window)).expand(batch, -1, -1)[:, before:]
    mask = torch.cat((mask, seen), dim=2)
    dense = [torch.cat((t, s), dim=1) for t, s in zip((k, v), sink, strict=True)]
    scores = torch.einsum("bihp,bjhp->bhij", q[:, before:], dense[0].repeat_interleave(2, dim=2)) * 0.3
    mass = scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1).transpose(1, 2)
    expected, _ = attend(q[:, before:], *dense, mask, 0.3)
    state = (k[:, before - window : before], v[:, before - window : before], valid.new_ones(batch, window))
    sinks = Sinks(*sink, valid.new_ones(batch, 3))
    size = chunk_size(window)
    chosen = torch.arange(0, batch * -(-length // size), 2)
    for rule in (attend, attend_with_mass):
        for some in (None, chosen):
            y, found = causal_window_attention(
                rule, q[:, before:], k[:, before:], v[:, before:], valid, window, 0.3, *state, sinks, seen, some
            )
            chunks = torch.arange(batch * -(-length // size)) if some is None else some
            made = torch.zeros(batch * -(-length // size), dtype=torch.bool).index_fill(0, chunks, True)
            made = made.repeat_interleave(size).view(batch, -1)[:, :length]
            torch.testing.assert_close(y[made], expected[made])
            assert not y[~made].any()
            if rule is attend_with_mass:
                torch.testing.assert_close(found[made], mass[made])
