"""What a teacher's forward honours and a block cannot is refused in one line, never dropped."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

import linmu_models

from . import tiny

FAMILIES = ["qwen2", "qwen2_5_vl", "gemma3", "llava"]


@functools.cache
def student(family, keep):
    return linmu_models.convert(tiny.teacher(family), tiny.NARROW, keep)


def masks(length):
    causal = torch.ones(1, 1, length, length).tril()
    return {
        "additive": (1 - causal) * -1e9, "bool": causal.bool(), "heads": causal.bool().expand(1, 4, -1, -1),
        "three": causal[0], "one": torch.ones(length), "dict": {"full_attention": causal.bool()}, "empty": {},
    }  # fmt: skip


@pytest.mark.parametrize("keep", [(), (1,)], ids=["linear", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_other_kinds(family, keep):
    inputs = tiny.example(family, "image") or tiny.example(family, "text")
    for name, mask in masks(inputs["input_ids"].shape[1]).items():
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, L\)"):
            student(family, keep)(**{**inputs, "attention_mask": mask})
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, L\)"):
            student(family, keep).model(**{**inputs, "attention_mask": mask})
        assert name


@pytest.mark.parametrize("keep", [(), (1,)], ids=["linear", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_attention(family, keep):
    model, inputs = student(family, keep), tiny.example(family, "text")
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(**inputs, output_attentions=True)
    decoder = model.get_decoder()
    decoder.config.__dict__["_output_attentions"] = True  # as a configuration file may have it
    try:
        with pytest.raises(ValueError, match="output_attentions must be False"):
            model(**inputs)
    finally:
        decoder.config.__dict__["_output_attentions"] = False


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_other_kinds(family):
    inputs = tiny.example(family, "text")
    for cache in (((torch.zeros(1),) * 2,) * 3, [], {"a": 1}):
        with pytest.raises(TypeError, match="cache must be a transformers Cache"):
            student(family, ())(**inputs, past_key_values=cache)


def test_a_cache_that_another_model_filled():
    inputs, cache = tiny.example("qwen2", "text"), DynamicCache()
    with torch.no_grad():
        tiny.teacher("qwen2")(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="layer 0 of the cache must be new or linear"):
            student("qwen2", ())(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_in_the_place_of_ids(family):
    model, inputs = student(family, ()), tiny.example(family, "text")
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        expected = model(input_ids=ids, **inputs).logits
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids), **inputs).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, expected)  # no mask: all are tokens


@pytest.mark.parametrize("value", [-1, -1e9, 0.5, 2, float("nan")])
def test_a_mask_holds_zeros_and_ones(value):
    """Not what is added to scores, where 0 is a token that is seen."""
    student, ids = linmu_models.convert(tiny.teacher("qwen2")), torch.tensor([tiny.text_ids(5)])
    mask = torch.ones(1, 5)
    mask[0, 0] = value
    with pytest.raises(ValueError, match="attention_mask must be 0 or 1"):
        student(ids, attention_mask=mask)


@pytest.mark.parametrize("shape", [(1, 4), (2, 5), (1, 0)])
def test_a_mask_is_of_these_tokens(shape):
    student, ids = linmu_models.convert(tiny.teacher("qwen2")), torch.tensor([tiny.text_ids(5)])
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, L\) = \(1, 5\)"):
        student(ids, attention_mask=torch.ones(shape, dtype=torch.long))
