"""What a block has no place for in some layers of a teacher: they are named, and stay as they are."""

from __future__ import annotations

import pytest
import torch

import linmu_models
from linmu_models.adapters.llama4 import with_image_outputs

from . import tiny

OPTIONS = dict(text_window=64, sink_tokens=8, window=(4, 8, 8), image_window=None)


def like_the_teacher(teacher, student, inputs):
    """A prompt, and a cached step after it."""
    step = tiny.batch(tiny.text_ids(1, 3))["input_ids"]
    with torch.no_grad():
        outs = [model(**inputs, use_cache=True) for model in (teacher, student)]
        torch.testing.assert_close(outs[1].logits, outs[0].logits, rtol=1e-4, atol=1e-4)
        calls = zip((teacher, student), outs, strict=True)
        steps = [model(input_ids=step, past_key_values=out.past_key_values).logits for model, out in calls]
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-4)


def random(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.15)
    return model.eval()


@pytest.fixture(scope="module")
def sharing():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 3
    return random(tiny.gemma4(num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2, attention_k_eq_v=False))


def test_layers_that_share_keys_stay(sharing):
    says = r"keep_attention must hold the layers that share keys and values, \[2, 3, 4, 5\], got none of "
    with pytest.raises(ValueError, match=rf"^convert: {says}\[2, 3, 4, 5\]$"):
        linmu_models.convert(sharing, OPTIONS)
    with pytest.raises(ValueError, match=rf"{says}\[2\]$"):
        linmu_models.convert(sharing, OPTIONS, [3, 4, 5])
    student = linmu_models.convert(sharing, OPTIONS, [2, 3, 4, 5])
    like_the_teacher(sharing, student, tiny.example("gemma4"))


def test_queries_that_grow_with_their_position_stay():
    torch.manual_seed(0)
    teacher = tiny.EVERY["llama4"]()
    text = teacher.config.text_config
    text.attn_temperature_tuning, text.floor_scale = True, 4
    teacher = random(tiny.hf.Llama4ForConditionalGeneration(teacher.config))
    with_image_outputs(teacher)
    with pytest.raises(ValueError, match=r"in layer 1, .*; keep_attention=\[1\] keeps the layers that have it$"):
        linmu_models.convert(teacher, OPTIONS)
    like_the_teacher(teacher, linmu_models.convert(teacher, OPTIONS, [1]), tiny.example("llama4"))


def test_windows_lie_in_one_chunk_of_attention():
    teacher = tiny.teacher("llama4")
    with pytest.raises(ValueError, match=r"as many tokens as the teacher's attention_chunk_size, 4096, got 8192$"):
        linmu_models.convert(teacher, {**OPTIONS, "text_window": 8192})


def test_tokens_of_an_image_see_each_other_where_they_do_in_the_teacher():
    """In Gemma 4's layers with sliding windows, not in the others; frames of a video are apart."""
    torch.manual_seed(0)
    teacher = random(tiny.gemma4(use_bidirectional_attention="vision"))
    student = linmu_models.convert(teacher, OPTIONS)
    assert [layer.self_attn.shape.causal_windows for layer in student.linmu_layers()] == [False, True] * 2
    layout = student.build_layout(tiny.example("gemma4", "video"))
    assert [tuple(b[1:]) for b in layout.blocks.tolist()] == [(1, 2, 2), *[(1, 2, 3)] * 3]
    inputs = tiny.example("gemma4")
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs).logits, teacher(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_the_papers_block_has_no_norms_of_values():
    with pytest.raises(ValueError, match="of the preset exact for a teacher with norms of values"):
        linmu_models.convert(tiny.teacher("gemma4"), linmu_models.PAPER)
