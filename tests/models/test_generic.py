"""Families without an adapter: what is found of them, what a small model of them says, and what is refused."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import linmu_models
from linmu_models import self_check
from linmu_models.adapters import generic
from linmu_models.adapters.checked import CHECKED
from linmu_models.conversion import check_generic, family_of
from linmu_models.tiny_config import tiny_config
from tools.docs.families import verdict

from . import tiny

QUICK = ("aya_vision", "fuyu", "idefics3", "mllama", "shieldgemma2")
WIDE = dict(text_window=64, sink_tokens=8, window=(4, 8, 8), image_window=None)
SWEEP = [pytest.param(name, marks=pytest.mark.sweep) for name in sorted(CHECKED) if name not in QUICK]
of_the_table = pytest.mark.skipif(not hf.__version__.startswith("5.24"), reason="the table is of another transformers")


@of_the_table
@pytest.mark.parametrize("model_type", [*QUICK, *SWEEP])
def test_the_table_says_what_the_self_check_says(model_type):
    if "not installed" in CHECKED[model_type]:
        pytest.skip(CHECKED[model_type])
    said = verdict(model_type)
    assert said == CHECKED[model_type], "python -m tools.docs.families --check"
    assert len(said.splitlines()) <= 1


@of_the_table
def test_every_type_is_an_adapters_or_in_the_table():
    assert set(CHECKED) == set(generic.types())
    assert not set(CHECKED) & set(linmu_models.families())


def test_the_self_check_leaves_no_trace():
    config = CONFIG_MAPPING["idefics3"]()
    self_check._checked.clear()
    torch.manual_seed(3)
    before, threads, values = torch.random.get_rng_state(), torch.get_num_threads(), config.to_dict()
    assert check_generic(config) == "nowhere"
    assert torch.equal(torch.random.get_rng_state(), before) and torch.get_num_threads() == threads
    assert config.to_dict() == values
    assert len(self_check._checked) == 1
    check_generic(config)
    assert len(self_check._checked) == 1


@pytest.mark.parametrize("change", ["a logit", "a cached step", "padding"])
def test_the_self_check_finds_a_student_that_is_not_its_teacher(change, monkeypatch):
    kind, theirs = generic.family("idefics3"), hf.Idefics3ForConditionalGeneration

    def wrong(self, *args, **kwargs):
        out = theirs.forward(self, *args, **kwargs)
        one, padded = kwargs["input_ids"].shape[1] == 1, kwargs["input_ids"].shape[0] == 2
        if change == "a logit" or (change == "a cached step" and one) or (change == "padding" and padded):
            out.logits[:, -1, 0] += 10
        return out

    wrong.__signature__ = inspect.signature(theirs.forward)
    self_check._checked.clear()
    monkeypatch.setattr(kind, "forward", wrong, raising=False)
    found = {"a logit": r"a prompt \(one call\)", "a cached step": r"a prompt \(steps\)", "padding": "padded rows"}
    says = f"idefics3, and the generic one refuses it: the student's logits of {found[change]}.* differ from"
    with pytest.raises(ValueError, match=f"^convert: no adapter knows {says}"):
        check_generic(CONFIG_MAPPING["idefics3"]())
    self_check._checked.clear()


def vipllava():
    clip = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, image_size=56, patch_size=14, projection_dim=32,
    )  # fmt: skip
    config = hf.VipLlavaConfig(
        vision_config=clip, text_config=dict(model_type="llama", **tiny.SIZES), image_token_index=tiny.IMAGE,
        vision_feature_layers=[-1, -2], image_seq_length=16,
    )  # fmt: skip
    return hf.VipLlavaForConditionalGeneration(config), tiny.square_batch(1, 16, 56)


def aya_vision():
    """Pairs of channels turn, and some layers turn none."""
    text = tiny.SIZES | dict(
        model_type="cohere2", num_hidden_layers=4, layer_types=["sliding_attention"] * 3 + ["full_attention"],
        sliding_window=512,
    )  # fmt: skip
    config = hf.AyaVisionConfig(
        vision_config=tiny.SIGLIP, text_config=text, image_token_index=tiny.IMAGE, downsample_factor=2,
        alignment_intermediate_size=64,
    )  # fmt: skip
    return hf.AyaVisionForConditionalGeneration(config), tiny.square_batch(1, 4, 56)


@pytest.fixture(scope="module", params=[vipllava, aya_vision], ids=lambda build: build.__name__)
def pair(request):
    torch.manual_seed(0)
    teacher, inputs = request.param()
    with torch.no_grad():
        for p in teacher.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.15)
    teacher.generation_config.eos_token_id, teacher.generation_config.pad_token_id = None, 0
    return teacher.eval(), inputs


def test_a_student_is_its_teacher(pair):
    teacher, inputs = pair
    student = linmu_models.convert(teacher, WIDE)
    assert isinstance(student, type(teacher)) and student.is_linear
    side = 4 if len(student.build_layout(inputs).positions) == 16 else 2
    assert student.build_layout(inputs).blocks.tolist() == [[0, 1, side, side]]
    how = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        for rows in (inputs, tiny.left_padded([inputs, tiny.batch(tiny.text_ids(5))])):
            theirs, ours = (model.generate(**rows, **how) for model in (teacher, student))
            assert torch.equal(ours.sequences, theirs.sequences)
            torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-3, atol=1e-3)
    kept = linmu_models.convert(teacher, WIDE, [-1])
    with torch.no_grad():
        torch.testing.assert_close(kept(**inputs).logits, teacher(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_facts_are_saved_with_a_student(pair, tmp_path):
    teacher, inputs = pair
    student = linmu_models.convert(teacher)
    cohere = "AyaVision" in type(teacher).__name__
    assert student.config.linmu["facts"] == ({"interleaved_rotary": True, "unrotated": [3]} if cohere else {})
    student.save_pretrained(tmp_path)
    loaded = tiny.aligned(hf.AutoModelForImageTextToText.from_pretrained(tmp_path))
    assert type(loaded) is type(student)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, student(**inputs).logits)
    head = hf.AutoModel.from_pretrained(tmp_path)
    assert any(isinstance(m, linmu_models.LinmuAttention) for m in head.modules())


def test_a_new_process_loads_a_student(tmp_path):
    torch.manual_seed(0)
    linmu_models.convert(vipllava()[0]).save_pretrained(tmp_path)
    code = (
        "import sys, linmu_models; from transformers import AutoModelForImageTextToText as Auto, AutoConfig\n"
        "assert 'transformers.models.vipllava.modeling_vipllava' not in sys.modules\n"
        "print(type(Auto.from_pretrained(sys.argv[1])).__name__, AutoConfig.from_pretrained(sys.argv[1]).model_type)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["LinmuVipLlavaForConditionalGeneration", "linmu_vipllava"]


def test_one_line_says_what_is_refused():
    with torch.device("meta"):
        teacher = hf.MllamaForConditionalGeneration(tiny_config(hf.MllamaConfig()))
    with pytest.raises(ValueError, match="teacher must have values, as no adapter knows mllama"):
        linmu_models.convert(teacher)
    with pytest.raises(ValueError, match=r"^convert: teacher's model type must be one of .*, got 'gpt2'$"):
        family_of("gpt2")
    with pytest.raises(AttributeError, match="has no attribute 'LinmuNone'"):
        generic.LinmuNone  # noqa: B018


def test_squares_and_rows_where_no_grid_is_given():
    student = linmu_models.convert(vipllava()[0])
    ids = torch.tensor([[5, *[tiny.IMAGE] * 9, 6, *[tiny.IMAGE] * 6, 7]])
    assert student.build_layout({"input_ids": ids}).blocks[:, 1:].tolist() == [[1, 3, 3], [1, 1, 6]]
