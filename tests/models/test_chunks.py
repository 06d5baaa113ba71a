"""A prompt in chunks, `prefill_chunk_size` of transformers: what the whole prompt gives, with the memory of a chunk."""

from __future__ import annotations

import functools

import pytest
import torch

import linmu_models
from linmu_models import chunks

from . import tiny

FAMILIES = [
    "qwen2_5_vl", "qwen3_vl", "glm4v", "video_llama_3", "llava_onevision", "internvl", "smolvlm", "gemma3", "paligemma",
    "mistral3", "qwen3_5", "lfm2_vl",
]  # fmt: skip


@functools.cache
def student(family, keep=(), preset="exact"):
    options = tiny.NARROW if preset == "exact" else {"preset": preset, "window": (2, 2, 2)}
    return linmu_models.convert(tiny.teacher(family), options, keep_attention=keep)


def logits(model, inputs, **how):
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True, **how
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("example", ["images", "video"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_is_the_prompt(family, example):
    inputs = tiny.example(family, example)
    if inputs is None:
        pytest.skip("takes no video")
    model = student(family)
    whole = logits(model, inputs)
    for size in (1, 5):
        torch.testing.assert_close(logits(model, inputs, prefill_chunk_size=size), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [(), (1,)], ids=["linear", "hybrid"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_rows_of_different_lengths(keep, how):
    model = student("qwen2_5_vl", keep)
    inputs = tiny.left_padded([tiny.example("qwen2_5_vl", kind) for kind in ("images", "video")])
    if keep and "cache_implementation" in how:
        with pytest.raises(
            ValueError, match="must be None where attention is kept and its mask is made before, as with"
        ):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=4, **how)
        return
    out = [model.generate(**inputs, max_new_tokens=4, do_sample=False, prefill_chunk_size=n, **how) for n in (None, 4)]
    assert torch.equal(*out)


def lengths(model, inputs, **how):
    """Tokens of each call of the decoder before the first step, and pixels of each call of the tower."""
    decoder, tower, seen = model.get_decoder(), chunks.vision_tower(model), ([], [])
    hooks = [
        decoder.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen[0].append((*args, kwargs.get("hidden_states"))[0].shape[1]), with_kwargs=True
        ),
        tower.register_forward_hook(lambda *_: None),
        next(iter(tower.children())).register_forward_pre_hook(lambda _, args: seen[1].append(len(args[0]))),
    ]
    model.generate(**inputs, max_new_tokens=1, do_sample=False, **how)
    for hook in hooks:
        hook.remove()
    return seen


def test_no_part_of_a_model_sees_more_than_a_chunk():
    """Nor does the vision tower see more than a frame, where a chunk is shorter."""
    model, inputs = student("qwen2_5_vl"), tiny.thw_batch([(2, 2)], [(7, 2, 3)], 14, False)
    length = inputs["input_ids"].shape[1]
    assert lengths(model, inputs) == ([length], [16, 168])
    tokens, patches = lengths(model, inputs, prefill_chunk_size=13)
    assert tokens == [13] * (length // 13) + [length % 13] and patches == [16, 48, 48, 48, 24]
    assert lengths(model, inputs, prefill_chunk_size=1)[1] == [16] + [24] * 7


def test_an_image_is_cut_only_where_a_block_goes_on():
    """Chunks are longer where tokens of an image see later ones; those of the paper's block take it whole."""
    inputs = tiny.example("gemma3", "images")
    first, second = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0].split(4)
    for size, ends in ((3, None), (6, None)):
        tokens = lengths(student("gemma3"), inputs, prefill_chunk_size=size)[0]
        ends = {sum(tokens[: i + 1]) for i in range(len(tokens))}
        assert not ends & {
            *range(int(first[0]) + 1, int(first[-1]) + 1),
            *range(int(second[0]) + 1, int(second[-1]) + 1),
        }
        assert sum(tokens) == inputs["input_ids"].shape[1]
    model, video = student("qwen2_5_vl", preset="paper"), tiny.example("qwen2_5_vl", "video")
    whole = logits(model, video)
    assert max(lengths(model, video, prefill_chunk_size=2)[0]) >= 18
    torch.testing.assert_close(logits(model, video, prefill_chunk_size=2), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0, -1, 2.5, "4", True])
def test_a_chunk_has_tokens(size):
    with pytest.raises((ValueError, TypeError), match="prefill_chunk_size"):
        student("qwen2_5_vl").generate(**tiny.example("qwen2_5_vl"), max_new_tokens=1, prefill_chunk_size=size)


def test_chunks_need_a_cache():
    with pytest.raises(ValueError, match="prefill_chunk_size must be None without a cache"):
        student("qwen2_5_vl").generate(
            **tiny.example("qwen2_5_vl"), max_new_tokens=1, prefill_chunk_size=4, use_cache=False
        )
