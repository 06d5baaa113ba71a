"""Where nothing lies beyond a token's window, a student made with softmax's mix is its teacher, before any training."""

from __future__ import annotations

import pytest
import torch

import linmu_models

from . import tiny

WIDE = dict(
    mix="softmax", causal_windows=True, text_window=64, sink_tokens=64, window=(64, 64, 64), image_window=None,
    head_norm=True, z_gate=True,
)  # fmt: skip

# An image is several blocks, which do not see each other; a prompt's text sees what is later in it; the teacher has
# narrow windows of its own.
OTHERWISE = {"llava_next", "llava_onevision", "paligemma", "gemma3"}


@pytest.mark.parametrize("family", [family for family in tiny.BUILDERS if family not in OTHERWISE])
def test_logits_are_the_teachers(family):
    teacher = tiny.teacher(family)
    kinds = ("text",) if tiny.example(family) is None else ("image", "text")
    examples = [tiny.example(family, kind) for kind in kinds]
    student = linmu_models.convert(teacher, WIDE)
    with torch.no_grad():
        for batch in (*examples, tiny.left_padded([examples[0], tiny.example(family, kinds[0])])):
            real = batch["attention_mask"].bool()
            ours, theirs = (model(**batch).logits[real] for model in (student, teacher))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
