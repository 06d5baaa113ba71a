"""Teacher and student encode a batch's pixels once between them, and keep nothing of it."""

import weakref

import pytest
import stand_ins
import torch
from small_run import run_values, save_teacher

from linmu_distill.config import parse_config
from linmu_distill.run import Run
from linmu_distill.speed import measure_speed
from linmu_distill.teacher import shared_vision_features


def _features(model, pixels, grid):
    return model.model.get_image_features(pixels, grid).pooler_output[0]


def test_pixels_are_encoded_once_and_let_go():
    teacher = stand_ins.teacher_model()
    student = stand_ins.student_model(teacher)
    calls = []
    for model in (teacher, student):
        model.model.visual.register_forward_hook(lambda *given: calls.append(1))
    grid, kept = torch.tensor([[1, 4, 4]]), []
    for batch in range(3):
        with shared_vision_features(teacher, student):
            pixels = torch.randn(16, 3 * 2 * 4 * 4)
            assert _features(teacher, pixels, grid) is _features(student, pixels, grid)
            assert len(calls) == batch + 1
            kept += [weakref.ref(pixels), weakref.ref(_features(student, pixels, grid))]
            del pixels
            assert all(tensor() is not None for tensor in kept[-2:])
        assert not any(tensor() for tensor in kept)
        assert not any("features" in name for model in (teacher, student) for name in vars(model.model))


def test_it_ends_with_an_error_too_and_leaves_what_was_there():
    teacher = stand_ins.teacher_model()

    def own(pixels, grid):
        return "own"

    teacher.model.get_image_features = own

    def ask():
        with shared_vision_features(teacher):
            assert teacher.model.get_image_features is not own
            assert teacher.model.get_image_features(torch.zeros(1), 0) == "own"
            raise KeyError

    with pytest.raises(KeyError):
        ask()
    assert teacher.model.get_image_features is own


def test_a_run_leaves_its_teacher_as_it_was(tmp_path):
    config = parse_config(run_values(tmp_path, save_teacher(tmp_path / "teacher"), evaluation={"samples": 0}))
    run = Run(config)
    run.prepare()
    for number in (1, 2):
        run.train(number)
        assert not any("features" in name for name in vars(run.teacher.model))
    measure_speed({"teacher": run.teacher}, run.tokenizer, config.evaluation.model_copy(update={"speed_lengths": [32]}))
    assert not any("features" in name for name in vars(run.teacher.model))
