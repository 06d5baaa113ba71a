"""The TOML file: unknown keys are errors, overrides reach the stage table."""

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from linmu_distill.config import Config, ConfigError, StageConfig, load_config, parse_config
from linmu_distill.stages import STAGES
from linmu_distill.train import learning_rate
from linmu_ops.nn import EXACT, PAPER

MINIMAL = {"output": "x", "teacher": "t"}
CONFIGS = sorted((Path(__file__).parents[2] / "distill/configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    assert config.name == path.stem.replace("_scan", "-scan")
    assert config.block
    assert [config.stage(i).number for i in (1, 2, 3)] == [1, 2, 3]


def test_the_7b_config_trains_as_long_as_the_paper():
    config = load_config(next(path for path in CONFIGS if path.stem == "qwen2_5_vl_7b"))
    for row in STAGES:
        stage = config.stage(row.number)
        assert (stage.steps, stage.learning_rate, stage.trainable) == (row.steps, row.learning_rate, row.trainable)
    assert [sorted(config.stage_data(i).sets) for i in (1, 3)] == [
        ["llava_video", "onevision"],
        ["activitynet_qa", "llava_video", "onevision"],
    ]
    assert (config.lora_rank, config.parallel, config.precision) == (8, "ddp", "bfloat16")


@pytest.mark.parametrize(
    "change, line",
    [
        ({"steps": 3}, "f: steps: unknown key"),
        ({"stage1": {"stepz": 3}}, "f: stage1.stepz: unknown key"),
        ({"stage1": {"temperature": 2.0}}, "f: stage1.temperature: unknown key"),
        ({"teacher": {"path": "t"}}, "f: teacher: must be a folder or a name, as in teacher = "),
        ({"stage2": {"learning_rate": -1.0}}, "f: stage2.learning_rate: Input should be greater than 0"),
        ({"stage2": {"losses": {"hiden": 1.0}}}, "f: stage2.losses.hiden"),
        ({"output": ".."}, "f: output: must be the run's own folder, as in runs/demo, got '..'"),
        ({"output": ""}, "f: output: must be the run's own folder"),
        ({"seed": -1}, "f: seed: "),
        ({"stage1": {"steps": True}}, "f: stage1.steps: "),
        ({"lora_rank": 0}, "f: lora_rank: "),
        ({"data": {"mixture": {}}}, "f: data.mixture: "),
        ({"data": {"needle_frames": 8}}, "f: data.needle_frames: "),
        ({"data": {"needle_frames": [8, 4]}}, "f: data: needle_frames must be [least, most] with 2 <= least"),
        ({"data": {"needle_frames": [1, 4]}}, "f: data: needle_frames must be [least, most] with 2 <= least"),
        (
            {"stage1": {"losses": {"block": 1.0, "token": 0.5}}},
            "f: stage1: losses must have none beside `block`, got ['block', 'token']",
        ),
        ({"precision": "float8"}, "f: precision: "),
        ({"preset": "none"}, "f: preset: "),
        ({"student": {"wibble": 1}}, "f: student"),
        ({"student": {"z_gate": "no"}}, "f: student: ExactConfig: z_gate must be of type bool, got 'no'"),
        (
            {"student": {"preset": "paper"}},
            "f: student: preset must stand above all tables, got it in [student]: 'paper'",
        ),
        ({"student": {"keep_attention": 3}}, "f: student: keep_attention must be a list of layers, got 3"),
        ({"data": {"mixture": {"reed": 1}}}, "f: data: mixture must be of the groups read, line, "),
        (
            {"data": {"mixture": {"read": 1, "line": 1}, "batch_size": {"line": 2}}},
            "f: data: batch_size must be given for every group of mixture, got none for read",
        ),
        ({"evaluation": {"samples": {"reed": 2}}}, "f: evaluation: samples must be of the groups"),
        (
            {"evaluation": {"held_out": {"sets": {"a": {"format": "text", "files": ["x"], "weight": [0, 0, 1]}}}}},
            "f: evaluation: held_out.sets.a.weight must be one number, as no stage sees it, got (0.0, 0.0, 1.0)",
        ),
        ({"stage2": {"losses": {"hidden": 0}}}, "f: stage2.losses must have a weight over 0, got none"),
        (
            {"data": {"sets": {"a": {"format": "text", "files": ["x"]}}}},
            "f: stage3.losses must not have `sequence` where all data is plain text",
        ),
        ({"student": {"branches": "flex"}}, "f: student"),
        ({"data": {"sets": {"a": {"format": "csv", "files": ["x"]}}}}, "f: data.sets.a.format: "),
        (
            {"data": {"sets": {"a": {"format": "text", "files": ["x"], "weight": [0, 0, 1]}}}},
            "f: data.sets: none of them is for stage 1",
        ),
    ],
)
def test_mistakes_are_named(change, line):
    with pytest.raises(ConfigError) as error:
        parse_config({**MINIMAL, **change}, "f")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match=r"bad\.toml: "):
        load_config(tmp_path / "bad.toml")


def test_the_table_is_the_papers():
    rows = [(s.trainable, s.windows, dict(s.losses), s.learning_rate) for s in STAGES]
    half = dict.fromkeys(("hidden", "token"), 0.5)
    assert rows == [
        (("scan",), False, half, 5e-4),
        (("scan", "windows"), True, half, 5e-4),
        (("scan", "windows", "lora"), True, dict.fromkeys(("token", "sequence", "supervised"), 0.5), 2e-5),
    ]
    assert [s.number for s in STAGES] == [1, 2, 3]


def test_overrides():
    config = parse_config(
        {**MINIMAL, "stage2": {"steps": 7, "learning_rate": 1e-3, "losses": {"token": 1, "hidden": 0}}}
    )
    stage = config.stage(2)
    assert (stage.steps, stage.learning_rate, stage.losses) == (7, 1e-3, {"token": 1.0})
    assert (stage.block_input, stage.average) == ("student", "tokens")
    assert stage.freeze == (r"self_attn\.((gated_)?o_proj|gate_proj)", r"windows\.[qkv]_", r"scan\.dt_")
    assert parse_config({**MINIMAL, "preset": "paper"}).stage(1) == STAGES[0]


def test_presets():
    exact, paper = parse_config(MINIMAL), parse_config({**MINIMAL, "preset": "paper"})
    assert [c.block for c in (exact, paper)] == [EXACT, PAPER]
    assert tuple(paper.stage(i) for i in (1, 2, 3)) == STAGES
    assert ([s.average for s in map(exact.stage, (1, 2))], exact.averages, paper.averages) == (
        ["read"] * 2, ["read"], ["tokens"]
    )  # fmt: skip
    assert exact.is_calibrated and paper.is_calibrated
    assert not parse_config({**MINIMAL, "preset": "literal"}).is_calibrated
    assert [(s.block_input, dict(s.losses)) for s in map(exact.stage, (1, 2))] == [("teacher", {"hidden": 1.0})] * 2
    assert exact.stage(3).losses == STAGES[2].losses and exact.stage(3).block_input == "student"
    changed = parse_config({**MINIMAL, "seed": 5, "stage1": {"steps": 3}})
    assert (changed.stage(1).steps, changed.stage(1).freeze, changed.stage(1).block_input) == (
        3, (r"self_attn\.((gated_)?o_proj|gate_proj)", r"scan\.dt_"), "teacher"
    )  # fmt: skip
    assert parse_config(changed.model_dump()) == changed
    # Tables as objects are as those of a file.
    assert Config(output="x", teacher="t", seed=5, stage1=StageConfig(steps=3)) == changed


def test_the_start_has_a_fingerprint_of_its_own():
    plain = parse_config(MINIMAL)
    for change in ({"seed": 1}, {"stage1": {"data": {"batch_size": 3}}}, {"stage2": {"losses": {"hidden": 1.0}}},
                   {"preset": "paper"}, {"preset": "literal"}):  # fmt: skip
        assert parse_config({**MINIMAL, **change}).fingerprint(0) != plain.fingerprint(0)
    for change in ({"stage1": {"steps": 3}}, {"output": "/y"}, {"evaluation": {"samples": 1}}):
        assert parse_config({**MINIMAL, **change}).fingerprint(0) == plain.fingerprint(0)


def test_samples_of_each_group():
    """All of them for the teacher and the finished student, in between about a quarter, in whole eights."""
    tables = [{"samples": 5}, {"samples": {"needle": 40, "read": 100, "line": 0}}, {"samples": 0}]
    one, two, none = (parse_config({**MINIMAL, "evaluation": table}).evaluation for table in tables)
    every = {"read": 5, "line": 5, "where": 5, "video": 5, "needle": 5}
    assert one.counts(final=True) == one.counts(final=False) == every
    assert two.groups == list(two.counts(final=False)) == ["read", "needle"]
    assert two.counts(final=False) == {"read": 24, "needle": 8}
    assert two.counts(final=True) == {"read": 100, "needle": 40}
    assert none.counts(final=True) == none.counts(final=False) == {}


def test_fingerprints_follow_what_a_stage_depends_on():
    first = parse_config(MINIMAL)
    longer = parse_config({**MINIMAL, "stage2": {"steps": 7}})
    assert first.fingerprint(1) == longer.fingerprint(1)
    assert first.fingerprint(2) != longer.fingerprint(2)
    other = parse_config({**MINIMAL, "checkpoint_every": 3, "evaluation": {"samples": 1}, "output": "/y"})
    assert [first.fingerprint(i) for i in (1, 2, 3)] == [other.fingerprint(i) for i in (1, 2, 3)]
    assert first.fingerprint(1) != parse_config({**MINIMAL, "student": {"z_gate": False}}).fingerprint(1)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"name": "x"}, "name: no key any more: `output` is the run's folder"),
        ({"data": {"turns": 2}}, "data.turns: no key any more: chosen by the program"),
        ({"data": {"options": {"needle": {"frames": [4, 8]}}}}, "data.options: no key any more: `needle_frames = ["),
        (
            {"data": {"sets": {"a": {"format": "onevision", "files": ["x"]}}, "window": 3}},
            "data.window: no key any more: chosen by the program",
        ),
        (
            {"data": {"sets": {"a": {"format": "onevision", "files": ["x"]}}, "text_length": 3}},
            "data.text_length: no key any more: a piece of plain text has `max_tokens`",
        ),
        (
            {"data": {"sets": {"a": {"format": "onevision", "files": ["x"], "stages": [3]}}}},
            "data.sets.a.stages: no key any more: `weight` may be a list",
        ),
        ({"losses": {"temperature": 2.0}}, "losses: no key any more: L_hid of `block` weighs tokens by what"),
        ({"hidden_average": "read"}, "hidden_average: no key any more: L_hid of `block` weighs tokens by what"),
        ({"optimizer": {"warmup": 0.1}}, "optimizer: no key any more: the learning rate rises for the first"),
        ({"warmup": 0.1}, "warmup: no key any more: the learning rate rises for the first twentieth"),
        ({"lora": {"rank": 4}}, "lora: no key any more: `lora_rank` stands above all tables"),
        ({"checkpoints": {"every": 1}}, "checkpoints: no key any more: `checkpoint_every`"),
        ({"calibrate": False}, "calibrate: no key any more: the preset decides"),
        ({"calibration_batches": 2}, "calibration_batches: no key any more: the preset decides"),
        ({"evaluation": {"final_samples": 9}}, "evaluation.final_samples: no key any more: `samples` are those of"),
        ({"evaluation": {"held_out_batches": 9}}, "evaluation.held_out_batches: no key any more: fixed"),
        ({"evaluation": {"options": {}}}, "evaluation.options: no key any more: a needle's video has 64 frames"),
        ({"stage1": {"train": ["scan"]}}, "stage1.train: no key any more: the preset says"),
        ({"stage1": {"freeze": ["x"]}}, "stage1.freeze: no key any more: the preset says"),
        ({"stage2": {"block_input": "teacher"}}, "stage2.block_input: no key any more: `losses = {block = 1.0}`"),
    ],
)
def test_a_key_that_once_was_says_what_became_of_it(change, told):
    with pytest.raises(ConfigError) as error:
        parse_config({**MINIMAL, **change}, "f")
    assert str(error.value).startswith(f"f: {told}") and "\n" not in str(error.value)


def test_a_sets_weight_may_differ_by_stage():
    sets = {
        "a": {"format": "onevision", "files": ["x"], "weight": [1, 0, 0.5]},
        "b": {"format": "text", "files": ["y"]},
    }
    config = parse_config({**MINIMAL, "data": {"sets": sets}})
    weights = [{name: chosen.weight for name, chosen in config.stage_data(i).sets.items()} for i in (1, 2, 3)]
    assert weights == [{"a": 1.0, "b": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 1.0}]


def test_a_loss_of_blocks_alone_is_the_hidden_loss_on_the_teachers_inputs():
    stage = parse_config({**MINIMAL, "preset": "paper", "stage2": {"losses": {"block": 0.7, "hidden": 0}}}).stage(2)
    assert (dict(stage.losses), stage.block_input) == ({"hidden": 0.7}, "teacher")


def test_plain_text_counts_all_tokens_alike():
    """Every token of it is an answer."""
    text = {"sets": {"t": {"format": "text", "files": ["x"]}}}
    config = parse_config({**MINIMAL, "data": text, "stage3": {"losses": {"token": 1.0}}})
    assert config.stage(1).block_input == "teacher" and config.averages == ["tokens"]


def test_options_stay_few():
    """An option that a constant serves, or another option implies, is none. Tables count as well as what is in them."""
    fields: dict[type, dict[str, bool]] = {}

    def tables(annotation):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [table for part in get_args(annotation) for table in tables(part)]

    def walk(table):
        inner = {name: tables(field.annotation) for name, field in table.model_fields.items()}
        fields[table] = {name: bool(found) for name, found in inner.items()}
        for found in inner.values():
            for other in found:
                if other not in fields:
                    walk(other)

    walk(Config)
    every = [is_table for found in fields.values() for is_table in found.values()]
    assert every.count(False) <= 30 and len(every) <= 38


def test_the_demo_is_what_its_results_are_of():
    """Its steps, rates, data, losses and questions as they were when `distill/results/demo` was made."""
    config = load_config(next(path for path in CONFIGS if path.stem == "demo"))
    assert [(s.steps, s.learning_rate) for s in map(config.stage, (1, 2, 3))] == [(20, 4e-3), (200, 4e-3), (10, 3e-4)]
    assert [(s.block_input, s.average) for s in map(config.stage, (1, 2, 3))] == [
        ("teacher", "read"), ("teacher", "read"), ("student", "tokens")
    ]  # fmt: skip
    rate = learning_rate(config.stage(2), 3)
    assert rate == pytest.approx(4e-3 * 4 / 11)  # of ten steps in which it rises
    results = json.loads((CONFIGS[0].parents[1] / "results/demo/evaluation.json").read_text())
    asked = {label: {group: row["n"] for group, row in rows.items()} for label, rows in results.items()}
    options = config.evaluation
    alone = asked["windows alone"], asked["near + kept"]
    assert asked["teacher"] == asked["stage 3"] == alone[0] == alone[1] == options.counts(final=True)
    assert asked["stage 1"] == asked["stage 2"] == options.counts(final=False)
    assert asked["initial"] in (options.counts(final=False), options.counts(final=True))
    assert config.max_new_tokens == 46 and config.lora_rank == 8 and config.precision == "float32"
