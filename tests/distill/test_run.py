"""A whole run on a random teacher of two layers: hand-off between stages, what is refused, report, saved student."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_run import run_values, save_teacher
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

from linmu_distill import handoff
from linmu_distill.clock import PARTS
from linmu_distill.config import EVALUATION_SEED, parse_config
from linmu_distill.handoff import HandoffError
from linmu_distill.limited import EQUAL_MEMORY
from linmu_distill.losses import kept_positions
from linmu_distill.objective import Objective, Teacher, TrainingError, assemble, read_batch
from linmu_distill.report import read_metrics, write_report
from linmu_distill.run import Run, RunError, distill
from linmu_distill.sources import build_source
from linmu_distill.student import what_is_read
from linmu_distill.teacher import model_inputs
from linmu_models.attention import IN_FLOAT32
from linmu_models.cli import app
from linmu_models.hooks import attention_modules, record_outputs
from linmu_models.saving import locked


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    values = run_values(tmp_path_factory.mktemp("runs"), teacher)
    config = parse_config(values)
    assert distill(config) == config.folder / "report.md"
    return config


def test_report_tells_the_whole_story(finished):
    text = (finished.folder / "report.md").read_text()
    heads = re.findall("^## (.*)", text, re.MULTILINE)
    assert heads == ["What was converted", "How it was trained", "How well it answers",
                     "How fast it is, and what it must remember", "Three questions", "Use it"]  # fmt: skip
    pictures = re.findall(r"!\[\w+\]\((figures/[\w.]+)\)", text)
    assert len(pictures) == 5
    assert all((finished.folder / picture).stat().st_size > 500 for picture in pictures)
    assert (
        "| task | teacher | teacher, equal memory | initial | stage 1 | stage 2 | stage 3 | student / teacher |" in text
    )
    assert "2 of 2 attention layers" in text
    assert re.findall(r"^\| (\d \| [^|]*) \|", text, re.MULTILINE) == [
        "1 | Flex-MA", "2 | Flex-MA + Local-Swin", "3 | Flex-MA + Local-Swin + LoRA"
    ]  # fmt: skip
    times = re.findall(r"^\| stage (\d) \| (.*) \|$", text, re.MULTILINE)
    assert [number for number, _ in times] == ["1", "2", "3"]
    for number, row in times:
        told = json.loads((finished.folder / f"stage{number}" / "manifest.json").read_text())["shares"]
        assert row == " | ".join(f"{told[part]:.1%}" for part in PARTS) and sum(told.values()) == pytest.approx(1)
    results = json.loads((finished.folder / "evaluation.json").read_text())
    assert list(results) == ["teacher", EQUAL_MEMORY, "initial", "stage 1", "stage 2", "stage 3"]
    speed = json.loads((finished.folder / "speed.json").read_text())
    sizes = {m: [r["cache_bytes"] for r in speed if r["model"] == m] for m in ("teacher", "student")}
    assert sizes["student"][0] == sizes["student"][1] < sizes["teacher"][1]


def test_saved_student_is_the_trained_one(finished):
    run = Run(finished)
    student = run.student_after(3).model
    loaded = AutoModelForImageTextToText.from_pretrained(finished.folder / "student").eval()
    assert not any("lora" in name for name in loaded.state_dict())
    for name in ("preprocessor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (finished.folder / "student" / name).read_text() == (Path(finished.teacher) / name).read_text()
    from linmu_distill.data import Processor, generate

    processor = Processor.from_config(loaded.config, run.tokenizer)
    batch = {k: v for k, v in processor(generate("video", 2, 0)).items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, student(**batch).logits, rtol=1e-4, atol=1e-4)


def test_each_stage_starts_from_the_one_before(finished):
    states = [handoff.load_result(finished.folder, i, Run(finished).teacher_hash, finished)[0] for i in range(4)]

    def moved(a, b):
        return {n for n in states[a] if not torch.equal(states[a][n], states[b][n])}

    assert moved(0, 1) and not any(".windows" in name or ".mix" in name for name in moved(0, 1))
    assert any(".windows" in name for name in moved(1, 2))
    # What acts on visual tokens only in the last layer is out of reach of the answers' losses.
    assert not any("layers.1." in name and (".windows" in name or ".reverse_" in name) for name in moved(2, 3))
    assert {name for name in states[3] if ".lora_" in name} == set(states[3]) - set(states[2])


def test_the_teacher_inside_saves_its_weights_twice_over(finished):
    run = Run(finished)
    student = run.fresh_student().model
    shared = {p.data_ptr() for p in run.teacher.parameters()}
    both = [name for name, p in student.named_parameters() if p.data_ptr() in shared]
    assert len(both) == len([n for n, _ in student.named_parameters() if ".self_attn." not in n or "visual" in n])


def test_a_finished_run_is_not_run_again(finished):
    with pytest.raises(RunError, match="already has stage 1: go on with --resume"):
        distill(finished)
    before = (finished.folder / "stage3/manifest.json").read_text()
    assert distill(finished, resume=True) == finished.folder / "report.md"
    assert (finished.folder / "stage3/manifest.json").read_text() == before


def test_a_run_is_one_process_at_a_time(teacher, tmp_path):
    config = parse_config(run_values(tmp_path, teacher))
    with locked(config.folder), pytest.raises(RunError, match="another process is at work in "):
        distill(config)


def test_a_stage_refuses_a_missing_or_unfinished_one_before_it(teacher, tmp_path):
    config = parse_config(run_values(tmp_path, teacher, evaluation={"samples": 0}))
    with pytest.raises(HandoffError, match=r"stage 1 is missing in .*; run `linmu distill CONFIG --stage 1` first"):
        distill(config, stage=2)
    run = Run(config)
    run.prepare()
    (config.folder / "stage1/checkpoints").mkdir(parents=True)
    with pytest.raises(HandoffError, match="stage 1 is not finished"):
        run.train(2)


def test_a_stage_refuses_another_teacher_student_or_configuration(finished, tmp_path):
    other = save_teacher(tmp_path / "other", seed=5)
    values = json.loads(finished.model_dump_json(exclude_none=True))
    with pytest.raises(HandoffError, match="distilled from another teacher"):
        Run(parse_config({**values, "teacher": other})).student_after(1)
    with pytest.raises(HandoffError, match="a student with other options"):
        Run(parse_config({**values, "student": {"initial_scale": 0.7}})).student_after(1)
    with pytest.raises(HandoffError, match=r"stage 1 in .* was run with another configuration"):
        distill(parse_config({**values, "stage1": {"steps": 3}}), resume=True)


def test_a_start_from_other_settings_is_made_anew_or_refused(teacher, tmp_path):
    values = run_values(tmp_path, teacher)
    made = []
    for change in ({}, {"seed": 2}, {"seed": 2, "stage1": {"steps": 3}}):
        run = Run(parse_config({**values, **change}))
        run.prepare()
        made.append((run.folder / "stage0/manifest.json").read_text())
    assert made[0] != made[1] == made[2]
    run.train(1)
    changed = parse_config({**values, "stage1": {"steps": 3}})
    with pytest.raises(HandoffError, match=r"stage 0 in .* was run with another configuration"):
        Run(changed).prepare()
    with pytest.raises(HandoffError, match=r"stage 1 in .* was run with another configuration"):
        distill(changed, stage=2)


def test_a_damaged_start_is_made_anew(teacher, tmp_path):
    run = Run(parse_config(run_values(tmp_path, teacher)))
    run.prepare()
    path = run.folder / "stage0/weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    run.prepare()
    assert path.read_bytes() == whole


def test_a_stage_refuses_one_before_it_of_another_configuration(teacher, tmp_path):
    values = run_values(tmp_path, teacher, evaluation={"samples": 0, "speed_lengths": []})
    distill(parse_config(values), stage=1)
    with pytest.raises(HandoffError, match=r"stage 1 in .* was run with another configuration"):
        distill(parse_config({**values, "stage1": {"steps": 7}}), stage=2)


def test_a_stage_is_refused_where_the_one_before_it_is_another_now(teacher, tmp_path, monkeypatch):
    """It was deleted, and run again; the settings of the later one are as they were."""
    values = run_values(tmp_path, teacher, evaluation={"samples": 0, "speed_lengths": []})
    before, changed = parse_config(values), parse_config({**values, "stage1": {"steps": 3}})
    distill(before, stage=1)
    save = handoff.save_result

    def killed(*args, **facts):
        raise OSError("killed before the result is written")

    monkeypatch.setattr(handoff, "save_result", killed)
    with pytest.raises(OSError, match="killed"):
        distill(before, stage=2)
    monkeypatch.setattr(handoff, "save_result", save)
    shutil.copytree(before.folder / "stage2", tmp_path / "unfinished")
    distill(before, stage=2, resume=True)
    shutil.rmtree(before.folder / "stage1")
    distill(changed, stage=1)
    with pytest.raises(HandoffError, match=r"stage 2 in .* began from another stage 1 .*; delete .*stage2"):
        distill(changed, stage=2, resume=True)
    with pytest.raises(HandoffError, match=r"stage 2 in .* began from another stage 1"):
        distill(changed, stage=3)
    shutil.rmtree(before.folder / "stage2")
    shutil.copytree(tmp_path / "unfinished", before.folder / "stage2")
    with pytest.raises(TrainingError, match=r"stage 2 has a checkpoint that began from another stage 1 .*; delete"):
        distill(changed, stage=2, resume=True)
    shutil.rmtree(before.folder / "stage2")
    distill(changed, stage=2)


def test_the_report_is_of_the_finished_student(finished, tmp_path):
    """In whatever order things were measured; and only of what the configuration asks for."""
    folder = tmp_path / "r"
    shutil.copytree(finished.folder, folder)
    row = {"n": 4, "correct": 4, "accuracy": 1.0, "interval": [0.5, 1.0]}
    table = {
        "teacher": {"where": row},
        "stage 3": {"where": {**row, "accuracy": 0.0, "interval": [0.0, 0.5]}},
        "initial": {"where": row},
    }
    (folder / "evaluation.json").write_text(json.dumps(table))
    (folder / "held_out.json").write_text("{}")
    run = Run(finished)
    text = write_report(folder, finished, run.teacher, run.student_after(3).model, run.tokenizer).read_text()
    assert "| **0.0%** |" in text and "How well it predicts" not in text
    run.evaluate_stage(3)
    assert list(json.loads((finished.folder / "evaluation.json").read_text())) == [
        "teacher", EQUAL_MEMORY, "initial", "stage 1", "stage 2", "stage 3"
    ]  # fmt: skip


def test_a_full_disk_is_one_line(finished, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: File too large")

    monkeypatch.setattr(handoff, "save_file", full)
    with pytest.raises(OSError, match="stage1 could not be written: I/O error"):
        handoff.save_result(finished.folder, 1, {}, "t", finished)


def test_measurements_are_of_what_they_say(teacher, tmp_path, monkeypatch):
    """What is known of other questions, or of a stage as it was before, is measured again; what is known is not."""
    values = run_values(tmp_path, teacher, evaluation={"samples": {"where": 2}, "speed_lengths": []})

    def measure(stage=0, seed=EVALUATION_SEED):
        monkeypatch.setattr("linmu_distill.run.EVALUATION_SEED", seed)
        run = Run(parse_config(values))
        run.prepare()
        run.evaluate_stage(stage)
        return json.loads((run.folder / "evaluation.json").read_text())

    first = measure()
    assert measure() == first
    other = measure(seed=7)
    assert all(other[label]["where"]["of"] != first[label]["where"]["of"] for label in ("teacher", "initial"))
    values["seed"] = 2
    third = measure(seed=7)
    assert third["teacher"] == other["teacher"] and third["initial"]["where"]["of"] != other["initial"]["where"]["of"]


def test_a_damaged_result_is_refused(teacher, tmp_path):
    config = parse_config(run_values(tmp_path, teacher))
    run = Run(config)
    run.prepare()
    path = config.folder / "stage0/weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(HandoffError, match="does not match its hash"):
        run.student_after(0)


def test_calibration_gives_blocks_the_size_of_attention(teacher, tmp_path, monkeypatch):
    from linmu_distill.student import hidden_kinds, mean_squares

    monkeypatch.setattr("linmu_distill.run.CALIBRATION_BATCHES", 1)
    config = parse_config(run_values(tmp_path, teacher, student={"branches": "flex"}))
    run = Run(config)
    run.prepare()
    _, facts = handoff.load_result(config.folder, 0, run.teacher_hash, config)
    assert facts["layers"] == [0, 1] and all(value > 0 for value in facts["mean_squares"]["tokens"])
    student = run.student_after(0).model
    from linmu_distill.sources import build_source

    source = build_source(config.data, config.teacher, run.teacher, run.tokenizer, 0)
    batch = source.processor(source.samples(0))
    # The first block sees what the first attention sees; later ones see other streams.
    kinds = [hidden_kinds(student, batch)]
    ours, theirs = (mean_squares(model, [0], [batch], kinds)["tokens"][0] for model in (student, run.teacher))
    assert ours == pytest.approx(theirs, rel=0.05)


def test_reading_is_what_later_layers_and_the_loss_look_at(teacher, tmp_path, monkeypatch):
    """L_hid of `block`, against the teacher's own attention weights."""
    imitate = {"losses": {"block": 1.0}}
    values = run_values(tmp_path, teacher, stage1=imitate)
    monkeypatch.setattr("linmu_distill.run.CALIBRATION_BATCHES", 1)
    run = Run(parse_config(values))
    run.prepare()
    _, facts = handoff.load_result(run.folder, 0, run.teacher_hash, run.config)
    data, path = run.config.stage_data(1), run.config.teacher
    source = build_source(data, path, run.teacher, run.tokenizer, 0)  # as for calibration
    batch = source.processor(source.samples(0))
    kept = kept_positions(batch["labels"])
    answers = torch.zeros(batch["labels"].shape)
    answers[kept.rows, kept.positions] = 1
    eager = AutoModelForImageTextToText.from_pretrained(teacher, attn_implementation="eager").eval()
    modules = list(attention_modules(eager).values())
    with torch.no_grad(), record_outputs(modules) as outputs:
        told = eager.model(**model_inputs(batch), use_cache=False, output_attentions=True)
    # (B, H, L, L), of which each row sums to 1: the first layer's outputs are read by the second and by the loss.
    looked = (told.attentions[1].mean(1) * answers[..., None]).sum(1)
    weights = [(looked + answers) / 2, answers]
    found = what_is_read(run.teacher, [0, 1], batch)
    for ours, expected in zip(found, weights, strict=True):
        torch.testing.assert_close(ours, expected)
        assert float(ours.sum()) == pytest.approx(len(kept), rel=1e-5)
    assert what_is_read(run.teacher, [1], batch)[0].equal(found[1])
    means = [float((w * o.square().sum(-1)).sum()) / len(kept) for w, o in zip(weights, outputs, strict=True)]
    assert facts["mean_squares"]["read"] == pytest.approx(means, rel=1e-4)

    student = run.student_after(0).model
    what = Teacher(run.teacher, [0, 1], facts["mean_squares"]), student, run.config.stage(1)
    cpu = torch.device("cpu")
    part = assemble(read_batch(source, source.samples(0), *what, None, cpu), *what, cpu)
    stage = Objective(student, what[0], what[2])
    with torch.no_grad(), record_outputs(list(attention_modules(student).values())) as ours:
        loss = stage(part, part.counts)["hidden"]
    visual = student.build_layout(model_inputs(batch)).visual_mask()
    real = batch["attention_mask"].bool()
    terms = []
    for kind, each in {"visual": [visual] * 2, "text": [real & ~visual] * 2, "read": weights}.items():
        errors = [(a - b).square().sum(-1) for a, b in zip(ours, outputs, strict=True)]
        sums = [float((e * w).sum() / w.sum()) for e, w in zip(errors, each, strict=True)]
        terms += [value / scale for value, scale in zip(sums, facts["mean_squares"][kind], strict=True)]
    assert float(loss) == pytest.approx(sum(terms) / 6, rel=1e-4)


def test_blocks_alone_learn_as_within_the_student(teacher, tmp_path, monkeypatch):
    """Given the teacher's inputs and L_hid only, leaving out all between the blocks changes no number."""
    imitate = {"losses": {"block": 1.0}, "steps": 3}
    curves = []
    for name, whole in (("alone", False), ("within", True)):
        monkeypatch.setattr("linmu_distill.objective.learns_by_block", lambda stage, whole=whole: not whole)
        stages = {"stage1": imitate, "stage2": imitate}
        config = parse_config({**run_values(tmp_path, teacher, **stages), "output": str(tmp_path / name)})
        run = Run(config)
        run.prepare()
        for number in (1, 2):
            run.train(number)
        curves.append([r for number in (1, 2) for r in read_metrics(config.folder / f"stage{number}")])
    for alone, within in zip(*curves, strict=True):
        assert "supervised" in within and "supervised" not in alone
        assert alone["hidden"] == within["hidden"] and alone["gradient_norm"] == within["gradient_norm"]


def test_command_line(finished, teacher, tmp_path):
    runner = CliRunner()
    path = tmp_path / "c.toml"
    path.write_text('output = "x"\nteacher = "t"\nstepz = 3\n')
    done = runner.invoke(app, ["distill", str(path)])
    assert done.exit_code == 1 and "c.toml: stepz: unknown key" in done.output
    path.write_text(f'output = "{finished.output}"\nteacher = "{teacher}"\n')
    done = runner.invoke(app, ["distill", str(path)])
    assert done.exit_code == 1 and "go on with --resume" in done.output
    done = runner.invoke(
        app, ["evaluate", str(finished.folder), "--samples", "2", "--group", "where", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert "| where | " in done.output and "model / teacher" in done.output
    long = ["--group", "needles", "--frames", "2", "--frames", "3", "--keys", "4", "--depths", "2"]
    done = runner.invoke(app, ["evaluate", str(finished.folder), "--samples", "2", "--rows", *long, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    columns = r"teacher \| teacher, equal memory \(\d+ tokens\) \| zero steps \| model \| model / teacher"
    assert re.search(rf"\| task \(val, n=2\) \| {columns} \|", done.output)
    assert all(f"| needles, {count} frames, 4 keys | " in done.output for count in (2, 3))
    assert "% to 100% | " in done.output
    done = runner.invoke(app, ["evaluate", str(finished.folder), "--group", "line", "--keys", "4"])
    assert done.exit_code == 1 and "--keys must be left out but for needles, got line" in done.output
    done = runner.invoke(app, ["evaluate", str(finished.folder / "student"), "--rows"])
    assert done.exit_code == 1 and "--teacher must be given with --rows" in done.output
    done = runner.invoke(app, ["evaluate", str(tmp_path)])
    assert done.exit_code == 1 and "holds no model" in done.output
    for wrong, line in (
        (["--device", "nothing"], "device must be one that is there"),
        (["--teacher", "none"], "linmu: "),
    ):
        done = runner.invoke(app, ["evaluate", str(finished.folder), "--samples", "1", *wrong])
        assert done.exit_code == 1 and line in done.output and isinstance(done.exception, SystemExit)
    for command, line in (
        (["convert", teacher, teacher], "out must be another folder than the teacher's"),
        (["convert", teacher, str(tmp_path / "o"), "--dtype", "float33"], "dtype must be auto, float32"),
        (["generate", teacher, "--prompt", ""], "prompt must not be empty"),
    ):
        done = runner.invoke(app, command)
        assert done.exit_code == 1 and line in done.output and isinstance(done.exception, SystemExit)
    assert AutoConfig.from_pretrained(teacher).model_type == "qwen2_5_vl"


def test_low_precision_teachers_train_in_float32(teacher, tmp_path):
    values = run_values(tmp_path, teacher, precision="bfloat16", evaluation={"samples": 0, "speed_lengths": []})
    config = parse_config(values)
    distill(config)
    run = Run(config)
    state, _ = handoff.load_result(config.folder, 3, run.teacher_hash, config)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    student = AutoModelForImageTextToText.from_pretrained(config.folder / "student", dtype="auto")
    assert student.get_decoder().layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    # What decays and step sizes need of precision is not lost on the way to disk.
    for name, tensor in load_file(config.folder / "student/model.safetensors").items():
        assert tensor.dtype == (torch.float32 if IN_FLOAT32.search(name) else torch.bfloat16), name
        if name.endswith(("A_log", "dt_bias")):
            assert torch.equal(tensor, state[name])


_SECOND_PROCESS_LATE = """
import time
from linmu_distill import run
from linmu_models.cli import main

prepare = run.Run.prepare

def prepare_late(self):
    time.sleep(4 * self.accelerator.process_index)
    prepare(self)

run.Run.prepare = prepare_late
main()
"""


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_accelerate_launch(teacher, tmp_path, parallel):
    """Two processes, one of them late, give the curves of one process with twice the micro-batches."""
    changes = dict(evaluation={"samples": 0, "speed_lengths": []})
    one = parse_config(run_values(tmp_path / "one", teacher, gradient_accumulation=2, **changes))
    distill(one)
    values = run_values(tmp_path / "two", teacher, parallel=parallel, **changes)
    path = tmp_path / "c.json.toml"
    path.write_text(_toml(values))
    program = tmp_path / "late.py"
    program.write_text(_SECOND_PROCESS_LATE)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    root = Path(__file__).parents[2]
    # `--cpu` would start one process, or ask for MPI.
    found = os.pathsep.join([str(root), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONPATH": found, "ACCELERATE_USE_CPU": "true"}
    command += [str(program), "distill", str(path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout and "stage 3  time: " in done.stdout
    two = parse_config(values)
    for number in (1, 2, 3):
        curves = [read_metrics(config.folder / f"stage{number}") for config in (one, two)]
        for ours, theirs in zip(*curves, strict=True):
            for name in ("loss", "token", "supervised", "gradient_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def _toml(values, prefix=""):
    plain = {k: v for k, v in values.items() if not isinstance(v, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{prefix}{name}]", _toml(table, f"{prefix}{name}.")]
    return "\n".join(lines)
