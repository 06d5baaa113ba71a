"""Exact match can fail: who knows everything is always right, who sees nothing is right by chance."""

import pytest
import torch
from small_run import save_teacher

import linmu_models
from linmu_distill import evaluation
from linmu_distill.data import TASKS, Processor, build_tokenizer, generate
from linmu_distill.evaluation import Result, answer, evaluate
from linmu_distill.teacher import load_teacher
from tools.make_teacher import build_model

SMALL = {
    "needle": {"frames": (3, 5)}, "needles": {"frames": (3, 5), "keys": 4}, "page": {"sizes": [(6, 8)]},
    "tracking": {"frames": (3, 5), "chains": 3},
}  # fmt: skip


class Says:
    """A model that answers what `answers` makes of a sample."""

    def __init__(self, samples, answers):
        self.config = build_model(build_tokenizer()).config
        self.device, self.training, self.tokenizer = torch.device("cpu"), False, build_tokenizer()
        self.left = [answers(sample) for sample in samples]

    def eval(self):
        return self

    def train(self, mode=True):
        return self

    def generate(self, input_ids, **options):
        rows = [[*self.tokenizer.encode(self.left.pop(0)), self.tokenizer.eos_token_id] for _ in input_ids]
        longest = max(map(len, rows))
        said = [row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(said)], 1)


@pytest.mark.parametrize("group", TASKS)
def test_who_knows_is_always_right_and_who_is_blind_is_not(group):
    options = SMALL.get(group, {})
    samples = generate(group, 200, 1, "val", **options)
    knows = evaluate(Says(samples, lambda s: s.turns[0][1]), build_tokenizer(), group, 200, 1, **options)
    assert knows.correct == knows.n == 200 and knows.split == "val"
    # One that knows the form of answers and has not looked: the answers of another draw to the same questions.
    others = {}
    for sample in generate(group, 400, 2, "val", **options):
        others.setdefault(sample.turns[0][0], sample.turns[0][1])
    blind = evaluate(
        Says(samples, lambda s: others.get(s.turns[0][0], "0")), build_tokenizer(), group, 200, 1, **options
    )
    # How many there are of a symbol can be guessed best.
    assert blind.interval[0] < {"where": 0.25}.get(group, 0.12)
    assert len(blind.hits) == len(blind.depths) == 200


def test_samples_are_drawn_as_they_are_asked(monkeypatch):
    """However many they are, and each batch is told of."""
    samples = generate("needle", 12, 1, "val", frames=(3, 5))
    monkeypatch.setattr(evaluation, "_VISUAL_TOKENS_A_BATCH", 320)
    whole = evaluate(Says(samples, lambda s: s.turns[0][1]), build_tokenizer(), "needle", 12, 1, frames=(3, 5))
    monkeypatch.setattr(evaluation, "_DRAWN_AT_ONCE", 4 * 160)
    told = []
    parts = evaluate(
        Says(samples, lambda s: s.turns[0][1]), build_tokenizer(), "needle", 12, 1, told=told.append, frames=(3, 5)
    )
    assert (parts.hits, parts.depths, parts.by_question) == (whole.hits, whole.depths, whole.by_question)
    assert told[0].startswith("0 of 12 answered, 0 right; up to ") and len(told) >= 4
    knows_twelve = Says(samples, lambda s: s.turns[0][1])
    with pytest.raises(IndexError):  # the thirteenth
        evaluate(knows_twelve, build_tokenizer(), "needle", 10**9, 1, frames=(3, 5))
    with pytest.raises(ValueError, match=r"^evaluate: n must be at least 1, got 0$"):
        evaluate(knows_twelve, build_tokenizer(), "needle", 0, 1)


def test_depths_are_counted_where_the_answer_lies():
    result = Result("needles", "val", 5, 3, 0.0, (True, False, True, True, False), {}, (0.0, 0.1, 0.5, 1.0, None))
    assert result.by_depth(2) == [(1, 2), (2, 2)]
    assert result.by_depth(4) == [(1, 2), (0, 0), (1, 1), (1, 1)]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_is_asked_only_when_named(split):
    samples = generate("line", 8, 3, split)
    right = evaluate(Says(samples, lambda s: s.turns[0][1]), build_tokenizer(), "line", 8, 3, split=split)
    assert right.correct == 8 and right.split == split
    wrong = {"val": "test", "test": "val"}[split]
    assert evaluate(Says(samples, lambda s: s.turns[0][1]), build_tokenizer(), "line", 8, 3, split=wrong).correct < 3


@pytest.mark.parametrize("group", ["needles", "page"])
def test_a_student_reads_a_long_prompt_in_parts_to_the_same_answer(tmp_path, monkeypatch, group):
    teacher, tokenizer = load_teacher(save_teacher(tmp_path / "teacher"), "float32")
    config = {"window": [2, 4, 8], "image_window": [1, 8, 8], "text_window": 8, "sink_tokens": 1, "kept_tokens": 8}
    student = linmu_models.convert(teacher, config).eval()
    samples = generate(group, 3, 0, "val", **({"frames": (6, 8)} if group == "needles" else {"sizes": [(16, 8)]}))
    processor, sizes = Processor.from_config(teacher.config, tokenizer), []
    student.get_decoder().layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    whole = answer(student, processor, samples, 4)
    assert max(sizes) > 100
    monkeypatch.setattr(evaluation, "_PROMPT_TOKENS", 64)
    sizes.clear()
    assert answer(student, processor, samples, 4) == whole
    assert max(sizes) == 64 and sum(sizes) > 100
