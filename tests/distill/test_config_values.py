"""Values of a configuration: numbers and switches are written as TOML writes them, and a mistake has one line."""

import typing

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from linmu_distill.config import Config, ConfigError, load_config, parse_config

SETS = {"a": {"format": "onevision", "files": ["x"]}}


def records(**more):
    return {"data": {"sets": SETS, **more}}


def first_set(**more):
    return {"data": {"sets": {"a": {**SETS["a"], **more}}}}


FLOATS = {
    "stage1.learning_rate": lambda v: {"stage1": {"learning_rate": v}},
    "stage2.losses.hidden": lambda v: {"stage2": {"losses": {"hidden": v}}},
    "data.mixture.read": lambda v: {"data": {"mixture": {"read": v}}},
    "data.fps": lambda v: records(fps=v),
    "data.sets.a.weight": lambda v: first_set(weight=v),
    "data.sets.a.weight.1": lambda v: first_set(weight=[1, v, 1]),
}
INTEGERS = {
    **{
        name: lambda v, name=name: {name: v}
        for name in ("seed", "gradient_accumulation", "max_new_tokens", "lora_rank", "checkpoint_every")
    },
    **{f"data.{n}": lambda v, n=n: records(**{n: v}) for n in ("max_tokens", "frames", "image_pixels", "frame_pixels")},
    "stage3.steps": lambda v: {"stage3": {"steps": v}},
    "parallel.1": lambda v: {"parallel": ["fsdp", v]},
    "data.batch_size": lambda v: {"data": {"batch_size": v}},
    "data.batch_size.read": lambda v: {"data": {"batch_size": {"read": v}}},
    "data.needle_frames.1": lambda v: {"data": {"needle_frames": [2, v]}},
    "evaluation.samples": lambda v: {"evaluation": {"samples": v}},
    "evaluation.samples.read": lambda v: {"evaluation": {"samples": {"read": v}}},
    "evaluation.speed_lengths.0": lambda v: {"evaluation": {"speed_lengths": [v]}},
}
SWITCHES = {
    "gradient_checkpointing": lambda v: {"gradient_checkpointing": v},
    "data.packing": lambda v: records(packing=v),
}
WRONG = [
    *((key, make(v)) for key, make in FLOATS.items() for v in (True, "0.5", -1.0, float("inf"), float("nan"), 10**400)),
    *((key, make(v)) for key, make in INTEGERS.items() for v in (True, "3", 2.0, -1, 10**30)),
    *((key, make(v)) for key, make in SWITCHES.items() for v in ("no", "true", 0, 1, 1.0, [])),
    *((key, INTEGERS[key](2**25)) for key in (
        "gradient_accumulation", "max_new_tokens", "lora_rank", "data.batch_size", "data.batch_size.read",
        "data.needle_frames.1", "data.max_tokens", "evaluation.speed_lengths.0")),
    ("parallel", {"parallel": "fsdp2"}), ("parallel.1", {"parallel": ["fsdp"]}),
    ("parallel.0", {"parallel": ["dp", 2]}),
    ("parallel", {"parallel": ["fsdp", 2, 3]}), ("parallel", {"parallel": {"fsdp": 2}}),
    ("output", {"output": "a\0b"}), ("output", {"output": " "}),
    ("data.sets.tasks.format", {"data": {"sets": {"tasks": {**SETS["a"], "format": "csv"}}}}),
]  # fmt: skip


@pytest.mark.parametrize("key, change", WRONG, ids=lambda v: v if isinstance(v, str) else ascii(v)[:60])
def test_one_line_names_the_key(key, change):
    with pytest.raises(ConfigError) as error:
        parse_config({"output": "x", "teacher": "t", **change}, "f")
    assert str(error.value).startswith(f"f: {key}: ") and "\n" not in str(error.value), str(error.value)


def test_whole_numbers_stand_for_floats():
    config = parse_config(
        {"output": "x", "teacher": "t", "stage1": {"learning_rate": 1}, **first_set(weight=[1, 2, 3])}
    )
    assert config.stage(1).learning_rate == 1.0
    assert [config.stage_data(i).sets["a"].weight for i in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert parse_config(config.model_dump()) == config


def tables(kind, seen):
    """A table of the file, and those that its values are of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if kind not in seen:
            seen.add(kind)
            for field in kind.model_fields.values():
                tables(field.annotation, seen)
                for rule in field.metadata:
                    tables(rule, seen)
    else:
        for part in typing.get_args(kind):
            tables(part, seen)
    return seen


def loose(kind, rules=()):
    """The numbers and switches within a type that take values of another type."""
    if typing.get_origin(kind) is typing.Annotated:
        inner, *more = typing.get_args(kind)
        return loose(inner, (*rules, *more))
    if kind in (int, float, bool):
        every = [part for rule in rules for part in (rule, *getattr(rule, "metadata", ()))]
        return [] if any(getattr(part, "strict", False) for part in every) else [kind]
    return [found for part in typing.get_args(kind) for found in loose(part)]


def test_every_number_and_switch_is_strict():
    every = tables(Config, set())
    assert {"Config", "StageConfig", "EvaluationConfig", "TaskData", "RecordData", "SetConfig"} <= {
        kind.__name__ for kind in every
    }
    for kind in every:
        for name, field in kind.model_fields.items():
            assert isinstance(field, FieldInfo)
            assert not loose(field.annotation, field.metadata), f"{kind.__name__}.{name}"


def test_a_file_is_utf8_with_or_without_a_mark(tmp_path):
    text = 'output = "läufe/一"\nteacher = "t"\n'
    for name, first in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(first + text.encode())
        assert load_config(tmp_path / name).output == "läufe/一"
