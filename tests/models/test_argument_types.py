"""An argument of another type is refused in one line that names it, before anything is made."""

from __future__ import annotations

import copy
import functools
import math
import re

import pytest
import torch

import linmu_models
from linmu_models import media
from linmu_models.generate import check_model_name, convert_folder, find_device, generate_text, load

from . import tiny

ODD = [5, 1.5, b"x", [5], {"a": 1}, object(), None, True]


@functools.cache
def models():
    teacher = tiny.teacher("qwen2")
    return linmu_models.convert(teacher), teacher


def refused(error, line, call):
    with pytest.raises(error, match=line) as found:
        call()
    assert "\n" not in str(found.value)


BATCHES = [
    (5, TypeError, "must be a list of dicts, the teacher's inputs, got int"),
    (None, TypeError, "must be a list of dicts, the teacher's inputs, got NoneType"),
    ("ids", TypeError, "must be a list of dicts, the teacher's inputs, got str"),
    ({"input_ids": torch.ones(1, 3)}, TypeError, "must be a list of dicts, the teacher's inputs, got dict"),
    ([5], TypeError, "must be a list of dicts, the teacher's inputs, got int among them"),
    (torch.ones(1, 3), TypeError, "must be a list of dicts, the teacher's inputs, got Tensor among them"),
    ([{}], ValueError, r"must have input_ids \(B, L\) in each batch, got NoneType"),
    ([{"input_ids": [1, 2]}], ValueError, r"must have input_ids \(B, L\) in each batch, got list"),
    ([{"input_ids": torch.ones(3)}], ValueError, r"must have input_ids \(B, L\) in each batch, got shape \(3,\)"),
]


@pytest.mark.parametrize("batches, error, line", BATCHES)
def test_batches(batches, error, line):
    student, teacher = models()
    refused(error, "^convert: calibration " + line, lambda: linmu_models.convert(teacher, calibration=batches))
    refused(error, "^calibrate: batches " + line, lambda: linmu_models.calibrate(student, teacher, batches))


@pytest.mark.parametrize("odd", ODD)
def test_models_and_switches(odd):
    student, teacher = models()
    kind = re.escape(type(odd).__name__)
    for name, call in {
        "convert: teacher": lambda: linmu_models.convert(odd),
        "calibrate: student": lambda: linmu_models.calibrate(odd, teacher, []),
        "calibrate: teacher": lambda: linmu_models.calibrate(student, odd, []),
        "convert_nvila: model": lambda: linmu_models.convert_nvila(odd),
        "attach_nvila: model": lambda: linmu_models.attach_nvila(odd),
    }.items():
        refused(TypeError, f"^{name} must .*, got {kind}$", call)
    if odd is True:
        return
    refused(TypeError, "^convert: share_frozen must be a bool", lambda: linmu_models.convert(teacher, share_frozen=odd))
    refused(
        TypeError,
        "^calibrate: step_sizes must be a bool",
        lambda: linmu_models.calibrate(student, teacher, [], step_sizes=odd),
    )


def test_a_teacher_of_other_layers():
    student, teacher = models()
    short = copy.deepcopy(teacher)
    short.model.layers = short.model.layers[:-1]
    refused(ValueError, "^calibrate: teacher must have the student's 3 layers, got 2$",
            lambda: linmu_models.calibrate(student, short, []))  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_paths_and_numbers(odd, tmp_path):
    refused(TypeError, "^a model must be a path, got ", lambda: load(odd))
    refused(TypeError, "^a model must be a path, got ", lambda: check_model_name(odd))
    refused(TypeError, "^convert: out must be a path, got ", lambda: convert_folder(str(tmp_path), odd))
    refused(TypeError, "^generate: prompt must be text, got ", lambda: generate_text(None, None, odd))
    if not isinstance(odd, list):
        refused(TypeError, "^generate: images must be a list of paths", lambda: generate_text(None, None, "a", odd))
    if odd is not None and not isinstance(odd, bool):
        refused(ValueError, "^device must be one that is there, got ", lambda: find_device(odd))
    if not isinstance(odd, bytes):
        refused(TypeError, "^image must be bytes or a path, got ", lambda: media.read_image(odd))
        refused(TypeError, "^video must be bytes or a path, got ", lambda: media.read_video(odd, 4, 1.0))
    if odd != 5 and odd is not None:
        refused(TypeError, "^max_pixels must be a whole number, got ", lambda: media.read_image("x", odd))
        refused(TypeError, "^frames must be a whole number, got ", lambda: media.read_video("x", odd, 1.0))
    if not isinstance(odd, float) and odd != 5:
        refused(TypeError, "^fps must be a number, got ", lambda: media.read_video("x", 4, odd))


@pytest.mark.parametrize(
    "frames, fps, line",
    [
        (0, 1.0, "frames"),
        (-1, 1.0, "frames"),
        (4, 0, "fps"),
        (4, -2.0, "fps"),
        (4, math.nan, "fps"),
        (4, math.inf, "fps"),
    ],
)
def test_numbers_are_over_zero(frames, fps, line):
    refused(ValueError, f"^{line} must be over 0( and finite)?, got ", lambda: media.read_video("x", frames, fps))


def test_options_that_torch_compile_has_not():
    refused(TypeError, "^fast_decode: options must be of fullgraph, .*, got wibble$",
            lambda: linmu_models.fast_decode(wibble=1))  # fmt: skip
