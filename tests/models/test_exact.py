"""Where nothing lies beyond a token's window, a student is its teacher, before any training."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import linmu_models

from . import tiny

WIDE = dict(text_window=64, sink_tokens=64, window=(4, 8, 8), image_window=None)

# An image is several blocks, which do not see each other; the teacher has narrow windows of its own.
OTHERWISE = {"llava_next", "llava_onevision", "gemma3"}


@pytest.mark.parametrize("family", [family for family in tiny.EVERY if family not in OTHERWISE])
def test_logits_are_the_teachers(family):
    teacher = tiny.teacher(family)
    kinds = ("text",) if tiny.example(family) is None else ("image", "text")
    examples = [tiny.example(family, kind) for kind in kinds]
    student = linmu_models.convert(teacher, WIDE)
    if student.prompt_sees_itself:
        examples[-1]["token_type_ids"] = torch.tensor([[0] * 5 + [1] * 4])
    with torch.no_grad():
        for batch in (*examples, tiny.left_padded([examples[0], tiny.example(family, kinds[0])])):
            real = batch["attention_mask"].bool()
            ours, theirs = (model(**batch).logits[real] for model in (student, teacher))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_an_image_whose_tokens_see_each_other_has_no_causal_windows(family):
    teacher, batch = tiny.teacher(family), tiny.example(family, "image")
    student = linmu_models.convert(teacher)
    assert not student.linmu_layers()[0].self_attn.shape.causal_windows

    def distance():
        with torch.no_grad():
            return (student(**batch).logits - teacher(**batch).logits).square().mean()

    nearer = distance()
    for layer in student.linmu_layers():
        windows = layer.self_attn.windows
        windows.shape = dataclasses.replace(windows.shape, causal_windows=True)
    assert nearer < 0.5 * distance()
