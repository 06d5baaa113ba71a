"""A converted model whose layers hold what is far by the gated delta rule: as any other student."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

import linmu_models

from . import tiny

OPTIONS = {**tiny.NARROW, "far": "delta"}


@functools.cache
def student(family):
    """One whose far parts count, and differ from layer to layer."""
    torch.manual_seed(0)
    model = linmu_models.convert(tiny.teacher(family), OPTIONS)
    with torch.no_grad():
        for layer in model.linmu_layers():
            layer.self_attn.share.bias.zero_()
            for p in layer.self_attn.scan.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


def padded(family):
    return tiny.left_padded([tiny.example(family, "images"), tiny.example(family, "image")])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_cached_is_uncached(family):
    model, rows = student(family), padded(family)
    greedy = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(*(model.generate(**rows, **greedy, use_cache=cached) for cached in (True, False)))


def test_a_prompt_in_chunks_and_padded_rows_are_each_alone():
    model = student("qwen2")
    ids = torch.tensor([tiny.text_ids(40)])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = DynamicCache(config=model.config)
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([17, 1, 13, 9], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        mask = torch.ones(1, 45, dtype=torch.int64)
        mask[:, :5] = 0
        given = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        shifted = model(input_ids=torch.nn.functional.pad(ids, (5, 0)), **given).logits
    torch.testing.assert_close(shifted[:, 5:], whole, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_with_the_state_of_a_chat(tmp_path):
    model, rows = student("qwen2_5_vl"), padded("qwen2_5_vl")
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    assert again.linmu_layers()[0].self_attn.config.far == "delta"
    with torch.no_grad():
        cache = model(**rows, use_cache=True).past_key_values
        assert torch.equal(again(**rows).logits, model(**rows).logits)
    cache.save(tmp_path / "state", model)
    other = linmu_models.load_cache(tmp_path / "state", again)
    ids = torch.tensor([tiny.text_ids(1, 3), tiny.text_ids(1, 4)])
    at = (int(cache.get_seq_length()) + torch.arange(1)).expand(3, 2, -1)
    with torch.no_grad():
        said = [
            m(input_ids=ids, past_key_values=c, position_ids=at).logits for m, c in ((model, cache), (again, other))
        ]
    assert torch.equal(*said)


def test_a_students_parameters_all_learn():
    model = student("qwen2_5_vl")
    inputs = tiny.example("qwen2_5_vl", "video")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if ".scan." in name or ".share." in name}
    assert any(name.endswith("beta_bias") for name in found)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found.values())
    model.zero_grad(set_to_none=True)


def test_calibrated_it_starts_with_a_share_near_0():
    teacher = tiny.teacher("qwen2_5_vl")
    inputs = tiny.example("qwen2_5_vl", "video")
    made = linmu_models.convert(teacher, OPTIONS, calibration=[inputs])
    closed = linmu_models.convert(teacher, OPTIONS, calibration=[inputs])
    for layer in closed.linmu_layers():
        layer.self_attn.share.bias.data.fill_(-1e4)
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs).logits, closed(**inputs).logits, rtol=0.02, atol=0.02)
