"""The TOML file: unknown keys are errors, overrides reach the stage table."""

from pathlib import Path

import pytest

from linmu_distill.config import Config, ConfigError, StageConfig, TeacherConfig, load_config, parse_config
from linmu_distill.stages import STAGES
from linmu_ops.nn import EXACT, PAPER

MINIMAL = {"name": "x", "teacher": {"path": "t"}}
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
    assert (config.lora.rank, config.parallel, config.precision) == (8, "ddp", "bfloat16")


@pytest.mark.parametrize(
    "change, line",
    [
        ({"steps": 3}, "f: steps: unknown key"),
        ({"stage1": {"stepz": 3}}, "f: stage1.stepz: unknown key"),
        ({"teacher": {"path": "t", "dtyp": "float32"}}, "f: teacher.dtyp: unknown key"),
        ({"stage2": {"learning_rate": -1.0}}, "f: stage2.learning_rate: Input should be greater than 0"),
        ({"stage2": {"losses": {"hiden": 1.0}}}, "f: stage2.losses.hiden"),
        ({"name": "a/b"}, "f: name: "),
        ({"name": ".."}, "f: name: "),
        ({"seed": -1}, "f: seed: "),
        ({"stage1": {"steps": True}}, "f: stage1.steps: "),
        ({"stage2": {"freeze": ["("]}}, "f: stage2.freeze.0: must be a regular expression, got '('"),
        ({"lora": {"target": "("}}, "f: lora.target: must be a regular expression"),
        ({"warmup": 1.0}, "f: warmup: "),
        ({"data": {"mixture": {}}}, "f: data.mixture: "),
        ({"data": {"options": {"needle": {"frames": 8}}}}, "f: data: options.needle do not serve, got {'frames': 8}"),
        (
            {"data": {"options": {"needle": {"frames": [8, 32], "batch_frames": -3}}}},
            "f: data: options.needle.batch_frames must be a number of frames, got -3",
        ),
        (
            {"stage1": {"losses": {"block": 1.0, "token": 0.5}}},
            "f: stage1: losses must have none beside `block`, got ['block', 'token']",
        ),
        ({"precision": "float8"}, "f: precision: "),
        ({"preset": "none"}, "f: preset: "),
        (
            {"data": {"options": {"needle": {"batch_frames": 9}}}},
            "f: data: options.needle.frames must be [least, most] beside batch_frames",
        ),
        ({"student": {"wibble": 1}}, "f: student"),
        ({"student": {"reverse": "no"}}, "f: student: ExactConfig: reverse must be of type bool, got 'no'"),
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
        ({"data": {"options": {"needle": {"frame": 4}}}}, "f: data: options.needle must be of frames, got frame"),
        ({"data": {"options": {"video": {"frames": 4}}}}, "f: data: options.video must be left out, got frames"),
        ({"evaluation": {"samples": {"reed": 2}}}, "f: evaluation: samples must be of the groups"),
        ({"evaluation": {"options": {"needle": {"frame": 4}}}}, "f: evaluation: options.needle must be of frames"),
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
    assert (stage.block_input, stage.freeze) == ("student", (r"self_attn\.o_proj", r"windows\.[qkv]_"))
    assert parse_config({**MINIMAL, "preset": "paper"}).stage(1) == STAGES[0]


def test_presets():
    exact, paper = parse_config(MINIMAL), parse_config({**MINIMAL, "preset": "paper"})
    assert [c.block for c in (exact, paper)] == [EXACT, PAPER]
    assert tuple(paper.stage(i) for i in (1, 2, 3)) == STAGES
    assert (exact.hidden_average, paper.hidden_average) == ("read", "tokens")
    assert exact.calibration_batches == paper.calibration_batches == 4
    assert parse_config({**MINIMAL, "preset": "literal"}).calibration_batches == 0
    assert [(s.block_input, dict(s.losses)) for s in map(exact.stage, (1, 2))] == [("teacher", {"hidden": 1.0})] * 2
    assert exact.stage(3).losses == STAGES[2].losses and exact.stage(3).block_input == "student"
    changed = parse_config({**MINIMAL, "warmup": 0.5, "stage1": {"steps": 3, "freeze": []}})
    assert (changed.warmup, changed.hidden_average) == (0.5, "read")
    assert (changed.stage(1).steps, changed.stage(1).freeze, changed.stage(1).block_input) == (3, (), "teacher")
    assert parse_config(changed.model_dump()) == changed
    # Tables as objects are as those of a file.
    tables = {"teacher": TeacherConfig(path="t"), "stage1": StageConfig(steps=3, freeze=[])}
    assert Config(name="x", warmup=0.5, **tables) == changed


def test_the_start_has_a_fingerprint_of_its_own():
    plain = parse_config(MINIMAL)
    for change in ({"calibration_batches": 2}, {"seed": 1}, {"hidden_average": "tokens"},
                   {"stage1": {"data": {"batch_size": 3}}}, {"calibration_batches": 0}):  # fmt: skip
        assert parse_config({**MINIMAL, **change}).fingerprint(0) != plain.fingerprint(0)
    for change in ({"stage1": {"steps": 3}}, {"warmup": 0.5}, {"evaluation": {"samples": 1}}):
        assert parse_config({**MINIMAL, **change}).fingerprint(0) == plain.fingerprint(0)


def test_samples_of_each_group():
    tables = [{"samples": 5}, {"samples": {"needle": 2, "read": 5}, "final_samples": {"needle": 9}}]
    one, two = (parse_config({**MINIMAL, "evaluation": table}).evaluation for table in tables)
    every = {"read": 5, "line": 5, "where": 5, "video": 5, "needle": 5}
    assert one.counts(final=True) == one.counts(final=False) == every
    assert two.groups == list(two.counts(final=False)) == ["read", "needle"]
    assert two.counts(final=False) == {"read": 5, "needle": 2}
    assert two.counts(final=True) == {"needle": 9}


def test_fingerprints_follow_what_a_stage_depends_on():
    first = parse_config(MINIMAL)
    longer = parse_config({**MINIMAL, "stage2": {"steps": 7}})
    assert first.fingerprint(1) == longer.fingerprint(1)
    assert first.fingerprint(2) != longer.fingerprint(2)
    other = parse_config({**MINIMAL, "checkpoint_every": 3, "evaluation": {"samples": 1}, "output": "/x"})
    assert [first.fingerprint(i) for i in (1, 2, 3)] == [other.fingerprint(i) for i in (1, 2, 3)]
    assert first.fingerprint(1) != parse_config({**MINIMAL, "student": {"z_gate": False}}).fingerprint(1)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"teacher": {"path": "t", "dtype": "bfloat16"}}, "teacher.dtype: no key any more: `precision` above"),
        ({"data": {"turns": 2}}, "data.turns: no key any more: up to four"),
        (
            {"data": {"sets": {"a": {"format": "text", "files": ["x"], "stages": [3]}}}},
            "data.sets.a.stages: no key any more: `weight` may be a list",
        ),
        ({"losses": {"temperature": 2.0}}, "losses: no key any more: `hidden_average` stands above"),
        ({"optimizer": {"warmup": 0.1}}, "optimizer: no key any more: `warmup` stands above"),
        ({"checkpoints": {"every": 1}}, "checkpoints: no key any more: `checkpoint_every`"),
        ({"calibrate": False}, "calibrate: no key any more: `calibration_batches = 0`"),
        ({"stage1": {"train": ["scan"]}}, "stage1.train: no key any more: `freeze`"),
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
