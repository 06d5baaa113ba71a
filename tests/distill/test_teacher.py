"""The shipped teacher: loads as any transformers model does, and answers the five task groups."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from distill.data import build_tokenizer
from distill.evaluation import evaluate

TEACHER = Path(__file__).parents[2] / "distill" / "teachers" / "tiny"

# Samples, and the least share of them to get right: four standard errors or so below what held_out.md reports.
BOUNDS = {"read": (48, 0.8), "line": (64, 0.8), "where": (96, 0.8), "video": (64, 0.8), "needle": (12, 0.6)}


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(TEACHER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


def test_is_an_unmodified_qwen_of_shippable_size(model):
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (TEACHER / "model.safetensors").stat().st_size < 10e6
    text = model.config.text_config
    assert text.num_attention_heads > text.num_key_value_heads


def test_tokenizer_is_the_one_the_data_is_made_for(model, tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    pieces = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    assert [getattr(model.config, name) for name in names] == tokenizer.convert_tokens_to_ids(list(pieces))


@pytest.mark.parametrize("group", BOUNDS)
def test_answers_held_out_questions(model, tokenizer, group):
    n, bound = BOUNDS[group]
    result = evaluate(model, tokenizer, group, n, seed=11)
    assert result.accuracy >= bound, str(result)


def test_answers_depend_on_the_pixels(model, tokenizer):
    from distill.data import Processor, generate
    from distill.evaluation import answer

    processor = Processor.from_config(model.config, tokenizer)
    first, second = generate("line", 2, 5, "test")
    swapped = type(first)(first.group, second.frames, first.turns, second.cells, first.is_video)
    assert answer(model, processor, [first], 9) != answer(model, processor, [swapped], 9)
