"""Text that stands for attention with a sliding window sees that window alone; visual tokens see more."""

from __future__ import annotations

import pytest
import torch
from blocks import OPTIONS, build, layout_of, prompt


def changed(block, **inputs):
    """Which tokens' outputs a change of the first text tokens changes; in row 0 tokens 0 and 1."""
    z = inputs.pop("z")
    other = z.clone()
    other[:, :2] += 1
    return (block(z, **inputs) != block(other, **inputs)).any(-1)


@pytest.mark.parametrize("config", ["exact", "exact_wide", "exact_delta"])
def test_text_sees_its_window_alone(config):
    torch.manual_seed(0)
    block = build(OPTIONS[config])
    block.windows.nothing_beyond = True
    window = block.windows.text_window
    z, rotary, blocks = prompt()
    layout = layout_of(blocks, z.shape[1])
    text = ~layout.visual_mask()
    late = torch.arange(z.shape[1]) > window
    mask = torch.ones(z.shape[:2], dtype=torch.bool)
    mask[1, -2:] = False
    with torch.no_grad():
        for more in ({}, {"attention_mask": mask}, {"seq_idx": torch.zeros(z.shape[:2], dtype=torch.int32)}):
            seen = changed(block, z=z, layout=layout, position_embeddings=rotary, **more)
            assert not (seen & text & late).any()
            assert (seen & ~text)[0, window + 2 :].any()
            assert seen[:, :2].all()


def test_steps_are_the_whole():
    torch.manual_seed(0)
    block = build(OPTIONS["exact_wide"])
    block.windows.nothing_beyond = True
    z, rotary, blocks = prompt()
    n = 19  # the last visual token lies before
    layout = layout_of(blocks, n)
    with torch.no_grad():
        whole = block(z, layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
        y, state = block(
            z[:, :n], layout=layout, position_embeddings=tuple(t[:, :n] for t in rotary), return_state=True
        )
        parts = [y]
        for t in range(n, z.shape[1]):
            at = slice(t, t + 1)
            parts.append(block(z[:, at], position_embeddings=tuple(r[:, at] for r in rotary), state=state))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
