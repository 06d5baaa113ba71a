"""What a run reads back of its own: a damaged file is one line and made anew or refused, and nothing in one is run."""

import ast
import json
import os
import pickle
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import run_values, save_teacher
from typer.testing import CliRunner

from bench import report as ops_report
from bench.models import report as models_report
from bench.runs.table import Results
from linmu_distill import handoff
from linmu_distill.checkpoint import CheckpointError, CheckpointStore, random_states, set_random_states
from linmu_distill.config import parse_config
from linmu_distill.evaluate import EvaluationError, evaluate_folder
from linmu_distill.files import read_json, read_lines
from linmu_distill.handoff import HandoffError
from linmu_distill.report import read_metrics
from linmu_distill.run import Run, distill
from linmu_distill.teacher import AnswerCache
from linmu_models.cli import app
from tools import make_teacher

ROOT = Path(__file__).parents[2]
DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another kind": lambda content: b'"text"',
    "not text": lambda content: b"\xff\xfe" + content[2:],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    teacher = save_teacher(tmp_path_factory.mktemp("teacher"))
    measured = {"samples": {"where": 2}, "speed_lengths": [32]}
    config = parse_config(run_values(tmp_path_factory.mktemp("runs"), teacher, evaluation=measured))
    assert distill(config) == config.folder / "report.md"
    return config


@pytest.fixture
def again(finished, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(finished.folder, tmp_path / finished.folder.name)
    return parse_config(
        {**json.loads(finished.model_dump_json(exclude_none=True)), "output": str(tmp_path / finished.folder.name)}
    )


def _damage(path, how):
    path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_measurements_are_made_anew(again, how, capsys):
    names = ("evaluation.json", "speed.json", "transfer.json")
    before = {name: json.loads((again.folder / name).read_text()) for name in names}
    for name in names:
        _damage(again.folder / name, how)
    capsys.readouterr()
    assert distill(again, resume=True) == again.folder / "report.md"
    told = capsys.readouterr().err.splitlines()
    for name in names:
        assert sum(f"{name} is damaged and made anew" in line for line in told) == 1
        assert type(json.loads((again.folder / name).read_text())) is type(before[name])
    found = json.loads((again.folder / "evaluation.json").read_text())
    assert {k: {g: r["right"] for g, r in v.items()} for k, v in found.items()} == {
        k: {g: r["right"] for g, r in v.items()} for k, v in before["evaluation.json"].items()
    }
    assert json.loads((again.folder / "transfer.json").read_text()) == before["transfer.json"]


@pytest.mark.parametrize("how", [*DAMAGES, "no hashes"])
def test_a_damaged_manifest_is_one_line_and_that_of_the_start_made_anew(again, how):
    for number in (0, 2, 3):
        path = handoff.stage_folder(again.folder, number) / "manifest.json"
        content = path.read_bytes()
        if how == "no hashes":
            path.write_text(json.dumps({**json.loads(content), "weights": {}}))
        else:
            _damage(path, how)
        with pytest.raises(HandoffError, match=r"manifest\.json is damaged \([^\n]*\); delete [^\n]*$"):
            handoff.load_result(again.folder, number, "", again)
        if number:
            with pytest.raises(HandoffError, match="is damaged"):
                distill(again, resume=True)
        if number == 3:
            with pytest.raises(EvaluationError, match=r"--teacher must be given: .*manifest\.json is damaged"):
                evaluate_folder(again.folder, None, 1, ["where"], "val", 0, "cpu")
        path.write_bytes(content)
    path = handoff.stage_folder(again.folder, 0) / "manifest.json"
    for number in (1, 2, 3):
        shutil.rmtree(handoff.stage_folder(again.folder, number))
    content = json.loads(path.read_bytes())
    path.write_bytes(b'{"finished": tr')
    Run(again).prepare()
    assert json.loads(path.read_text())["weights"] == content["weights"]


def test_metrics_that_were_cut_are_shown_as_far_as_they_go(again, capsys):
    path = handoff.stage_folder(again.folder, 1) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    os.truncate(path, path.stat().st_size - 20)
    assert [r["step"] for r in read_metrics(path.parent)] == list(range(1, len(lines)))
    assert "1 of 2 lines are damaged and left out" in capsys.readouterr().err
    assert distill(again, resume=True) == again.folder / "report.md"


# A format of its own each; what is done about them is the same.
@pytest.mark.parametrize(
    "how",
    [pytest.param("empty", marks=pytest.mark.sweep), pytest.param("text", marks=pytest.mark.sweep), "cut", "a pickle"],
)
def test_damaged_answers_are_decoded_anew(tmp_path, how, capsys):
    path = tmp_path / "answers.sqlite"
    cache = AnswerCache(path, "t")
    for i in range(2000):
        cache.put(f"key {i}", ["an answer"])
    del cache
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no database, " * 100, "cut": content[: len(content) // 2],
                      "a pickle": pickle.dumps(Runs(tmp_path))}[how])  # fmt: skip
    cache = AnswerCache(path, "t")
    assert len(cache) == 0 and cache.get("key 7") is None
    cache.put("key 7", ["another"])
    assert AnswerCache(path, "t").get("key 7") == ["another"]
    told = capsys.readouterr().err
    assert how == "empty" or told.count("answers.sqlite is damaged and made anew") == 1


def test_a_table_goes_on_after_a_line_that_was_cut(tmp_path, capsys):
    results = Results(tmp_path / "t.jsonl")
    for i in range(3):
        results.append({"row": f"row {i}", "key": f"{i}"})
    os.truncate(results.path, results.path.stat().st_size - 5)
    assert list(results.read()) == [("row 0", "0"), ("row 1", "1")]
    assert "t.jsonl: 1 of 3 lines are damaged and left out" in capsys.readouterr().err
    results.append({"row": "row 2", "key": "2"})
    capsys.readouterr()
    assert list(results.read()) == [("row 0", "0"), ("row 1", "1"), ("row 2", "2")]
    assert not capsys.readouterr().err


def test_rows_of_benches_that_were_cut_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops_report, "HERE", tmp_path)
    row = dict(op="o", case="c", dtype="float32", backward=False, impl="i", status="ok")
    file = ops_report.results_file("cpu", "o")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(row) + "\n" + json.dumps(row)[:30])
    assert ops_report.read("cpu") == {"o": [row]}
    row = dict.fromkeys(models_report.TASK, 1) | dict(status="ok")
    file.write_text(json.dumps(row) + "\n[1]\n" + json.dumps(row)[:30])
    assert models_report.read_rows(file) == [row]
    assert "2 of 3 lines are damaged and left out" in capsys.readouterr().err


def test_no_file_is_no_damage(tmp_path, capsys):
    path = tmp_path / "a"
    assert read_json(path) == {} and read_json(path, list) == [] and read_lines(path) == []
    assert not capsys.readouterr().err


class Runs:
    """Its pickle makes a file when it is read."""

    def __init__(self, folder):
        self.mark = str(folder / "was run")

    def __reduce__(self):
        return subprocess.call, (["touch", self.mark],)


def _was_run(folder):
    return (folder / "was run").exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Runs(tmp_path)))
    assert _was_run(tmp_path)


@pytest.mark.parametrize("form", ["zip", "bare", "old"])
def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, form):
    store, name = CheckpointStore(tmp_path / "c"), "progress.pt"
    store.save(1, {name: {"step": 1}}, {"w": torch.ones(3)})
    store.wait()
    path = store.folder / "step-000000001" / name
    evil = {"w": Runs(tmp_path)}
    if form == "bare":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    manifest = json.loads((path.parent / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    assert store.check(1) is None
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{name} [^\n]*: only tensors, numbers and text are read[^\n]*$"):
        store.load()
    assert not _was_run(tmp_path)


def test_a_whole_run_refuses_a_checkpoint_with_code_in_one_line(tmp_path, finished):
    values = run_values(tmp_path, finished.teacher, evaluation={"samples": 0}, stage1={"steps": 9})
    config = parse_config(values)
    Run(config).prepare()
    store = CheckpointStore(handoff.stage_folder(config.folder, 1) / "checkpoints")
    store.save(3, {"progress.pt": {}}, {"w": torch.ones(3)})
    store.wait()
    path = store.folder / "step-000000003/progress.pt"
    torch.save(Runs(tmp_path), path)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"]["progress.pt"] = {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    toml = tmp_path / "c.toml"
    toml.write_text(
        f'output = "{config.output}"\npreset = "paper"\ncheckpoint_every = 1\n'
        f'teacher = "{config.teacher}"\nmax_new_tokens = 3\n'
        "[data]\nbatch_size = 2\nmixture = {where = 1, video = 1}\n"
        "[evaluation]\nsamples = 0\n"
        "[stage1]\nsteps = 9\n[stage2]\nsteps = 2\n[stage3]\nsteps = 2\n"
    )
    done = CliRunner().invoke(app, ["distill", str(toml), "--resume"])
    assert done.exit_code == 1 and "call: only tensors, numbers and text are read, nothing is run\n" in done.output, (
        done.output
    )
    assert not _was_run(tmp_path)


def test_results_and_teachers_in_the_making_are_no_pickles(tmp_path, again):
    folder = handoff.stage_folder(again.folder, 1)
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Runs(tmp_path)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights"]["sha256"] = sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(HandoffError, match=r"weights\.safetensors is damaged"):
        handoff.load_result(again.folder, 1, manifest["teacher"]["sha256"], again)
    torch.save(Runs(tmp_path), tmp_path / "eyes.pt")
    with pytest.raises(CheckpointError, match=r"eyes\.pt holds \S*call: only tensors"):
        make_teacher.Trainer(tmp_path, "eyes", 0)
    assert not _was_run(tmp_path)


@pytest.mark.parametrize("command", ["generate", "convert", "evaluate", "distill"])
def test_weights_with_code_in_them_are_one_line(tmp_path, finished, command):
    """Of a teacher, or of a student, that somebody else has made."""
    folder = tmp_path / "model"
    shutil.copytree(finished.teacher, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"w": Runs(tmp_path)}, folder / "pytorch_model.bin")
    toml = tmp_path / "c.toml"
    toml.write_text(f'output = "{tmp_path}/r"\nteacher = "{folder}"\n')
    given = {"generate": [folder, "--prompt", "a"], "convert": [folder, tmp_path / "o"], "evaluate": [folder],
             "distill": [toml]}[command]  # fmt: skip
    done = CliRunner().invoke(app, [command, *map(str, given)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output
    assert done.output.splitlines()[-1].endswith("are more than tensors, and no code of theirs is run")
    assert not _was_run(tmp_path)


def test_random_states_are_data(tmp_path):
    import random

    states = random_states()
    wanted = random.random(), np.random.rand(2).tolist(), np.random.randn(), torch.rand(2).tolist()
    torch.save(states, tmp_path / "new.pt")
    set_random_states(torch.load(tmp_path / "new.pt", weights_only=True))
    assert wanted == (random.random(), np.random.rand(2).tolist(), np.random.randn(), torch.rand(2).tolist())


def test_no_code_reads_a_pickle():
    """`torch.load` is called with `weights_only=True`, `np.load` without `allow_pickle`, and `pickle` never reads."""
    told = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    seen = 0
    for name in told.splitlines():
        if name.startswith("tests/"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            call, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{name}:{node.lineno}"
            if call == "torch.load":
                seen += 1
                assert given.get("weights_only") == "True", where
            assert call not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"), where
            assert given.get("allow_pickle", "False") == "False", where
    assert seen
