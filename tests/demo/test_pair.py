"""What is told while the two models answer: how memory grew, and that an answer can be stopped anywhere."""

from __future__ import annotations

import threading

import pytest
import torch
from served import EXAMPLES

import linmu_models
from linmu_distill.data.tasks import generate
from linmu_models.cache import cache_bytes
from linmu_models.demo import pair as pairs
from tests.models import tiny


def cache(model, ids):
    out = model.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    return out.past_key_values


@pytest.mark.parametrize("keep", [None, (), (1,)], ids=["teacher", "student", "hybrid"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "qwen3_5_text"])
def test_growth_is_what_shorter_prompts_take(family, keep):
    model = tiny.teacher(family)
    if keep is not None:
        if keep and family == "qwen3_5_text":
            pytest.skip("has both kinds of layers already")
        model = linmu_models.convert(model, tiny.NARROW, keep_attention=keep)
    ids = torch.randint(3, 90, (1, 24))
    points = pairs.growth(cache(model, ids))
    assert [n for n, _ in points] == sorted({n for n, _ in points}) and points[-1][0] == 24
    for n, size in points:
        if n > 4:  # a convolution's last inputs are fewer before
            assert size == cache_bytes(cache(model, ids[:, :n])), n


def test_the_teachers_memory_grows_and_the_students_does_not(pair):
    points = {"teacher": [], "student": []}
    for frames in (2, 8):
        clip = EXAMPLES[2].clip
        shorter = type(clip)(clip.frames[:frames], clip.fps)
        pair.answer("digit", shorter, threading.Event(), lambda e: e["what"] == "end" and points[e["side"]].append(e))
    short, long = (e["bytes"] for e in points["teacher"])
    assert long > 3 * short
    assert len({e["bytes"] for e in points["student"]}) == 1


def hooks(pair):
    models = (pair.teacher.model, pair.student.model)
    return [sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) for model in models]


@pytest.mark.parametrize(("what", "side"), [("start", "teacher"), ("read", "teacher"), ("step", "student")])
def test_an_answer_is_stopped_anywhere(pair, what, side):
    stop, events, before = threading.Event(), [], hooks(pair)

    def tell(event):
        events.append(event)
        if (event["what"], event["side"]) == (what, side):
            stop.set()

    with pytest.raises(pairs.StoppedError):
        pair.answer("read", EXAMPLES[0].clip, stop, tell)
    assert [event["what"] for event in events if event["what"] != "text"][-1] == what
    assert hooks(pair) == before


def test_the_page_is_stopped_between_two_layers(pair):
    """Not only between two tokens: a long prompt is read in one call."""
    stop, layers = threading.Event(), pair.teacher.model.get_decoder().layers
    reached = []
    handles = [layers[1].register_forward_hook(lambda *_: stop.set())]
    handles += [layer.register_forward_hook(lambda *_, i=i: reached.append(i)) for i, layer in enumerate(layers)]
    try:
        with pytest.raises(pairs.StoppedError):
            pair.answer("read", EXAMPLES[0].clip, stop, lambda event: None)
    finally:
        for handle in handles:
            handle.remove()
    assert reached == [0, 1]


def test_the_first_answer_is_none_of_a_persons(pair, monkeypatch):
    asked = []
    ask = pairs.generate_text
    monkeypatch.setattr(pairs, "generate_text", lambda *args, **options: asked.append(args) or ask(*args, **options))
    pair.warm_up()
    assert [model for model, *_ in asked] == [pair.teacher.model, pair.student.model]
    assert all(len(images) == 1 for _, _, _, images, _ in asked)


def test_a_label_is_the_end_of_a_path():
    assert pairs._label("/home/me/runs/demo/student") == "demo/student" and pairs._label("a/b") == "a/b"


def test_the_student_must_be_linear(tmp_path):
    from served import TEACHER

    with pytest.raises(ValueError, match="demo: the student must be a LinMU model, got a qwen2_5_vl"):
        pairs.Pair.load(str(TEACHER), str(TEACHER), device="cpu")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.title)
def test_examples_are_of_the_tasks(example):
    group = "line" if not example.clip.is_video else "video" if len(example.clip.frames) < 9 else "needle"
    assert example.clip.frames.shape[3] == 3 and example.title and example.question
    kinds = {turn[0].split()[0] for seed in range(4) for turn in generate(group, 1, seed, "test", turns=2)[0].turns}
    assert example.question.split()[0] in kinds
