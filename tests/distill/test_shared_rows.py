"""Processes that share rows have, together, the losses and gradients of one."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_run import run_values, save_teacher

from linmu_distill.config import parse_config
from linmu_distill.losses import kept_positions
from linmu_distill.objective import MicroBatch, Objective, Teacher, TrainingError, assemble, read_batch
from linmu_distill.parallel import sharing
from linmu_distill.run import Run, RunError
from linmu_distill.sources import build_source
from linmu_distill.student import new_student, set_windows, store_parameters, trainable_parameters
from linmu_distill.teacher import load_teacher
from linmu_distill.train import StageTrainer
from linmu_ops.context_parallel import ContextParallel

NEAR = {"window": [1, 2, 2], "text_window": 8, "kept_tokens": 4}
ANSWERS = {"losses": {"hidden": 0.5, "token": 0.5, "supervised": 0.5}}


def derived(group, folder, preset, number, more):
    """Each loss, and each gradient, of the tokens that a process of the group works on."""
    student_options = NEAR if preset == "exact" else {"window": [1, 2, 2]}
    values = run_values(folder, f"{folder}/teacher", preset=preset, student=student_options)
    config = parse_config({**values, f"stage{number}": {"steps": 2, **more}})
    teacher, tokenizer = load_teacher(config.teacher, "float32")
    stage, where = config.stage(number), torch.device("cpu")
    student, blocks, _ = new_student(teacher, config)
    trainable = trainable_parameters(student, blocks, stage)
    store_parameters(blocks.values(), trainable, torch.float32)
    set_windows(blocks.values(), stage.windows)
    chosen = {id(p) for p in trainable.values()}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    source = build_source(config.stage_data(number), config.teacher, teacher, tokenizer, 0)
    asked = Teacher(teacher, list(blocks))
    micro = read_batch(source, source.samples(0), asked, student, stage, None, where)
    part = assemble(micro, asked, student, stage, where, group)
    if group is not None:
        context = ContextParallel(group, micro.batch["input_ids"].shape[1])
        assert all(t.shape[1] == context.stop - context.start for t in part.hidden)
    objective = Objective(student, asked, stage)
    losses = objective(part, micro.counts)
    sum(stage.losses.get(name, 0) * value for name, value in losses.items()).backward()
    gradients = {n: p.grad for n, p in trainable.items() if p.grad is not None}
    return {n: v.detach() for n, v in losses.items()} | gradients


@pytest.mark.parametrize(
    "preset, number, more, n",
    [
        ("exact", 1, {}, 2),
        ("exact", 3, ANSWERS, 3),
        pytest.param("exact", 2, {}, 4, marks=pytest.mark.sweep),
        pytest.param("paper", 2, {}, 2, marks=pytest.mark.sweep),
    ],
)
def test_shares_of_rows_add_up(gang, tmp_path, preset, number, more, n):
    save_teacher(tmp_path / "teacher")
    want = derived(None, tmp_path, preset, number, more)
    found = gang(n, derived, tmp_path, preset, number, more)
    for name, value in want.items():
        total = sum(each[name] for each in found)
        torch.testing.assert_close(total, value, rtol=1e-3, atol=1e-5 * max(1, float(value.abs().max())), msg=name)


def test_kept_positions_of_slabs_are_those_of_rows():
    labels = torch.tensor([[-100, -100, 3, 4, -100, 5], [-100, 7, -100, -100, 8, 9]])
    kept = kept_positions(labels)
    parts = [kept.slab(start, stop) for start, stop in ((0, 2), (2, 2), (2, 6))]
    assert sum(map(len, parts)) == len(kept)
    states = torch.arange(12.0).view(2, 6, 1)
    rows = [part.select(states[:, start:]) for part, start in zip(parts, (0, 2, 2), strict=True)]
    assert sorted(torch.cat(rows).flatten().tolist()) == sorted(kept.select(states).flatten().tolist())


def test_what_cannot_be_shared_says_so(tmp_path):
    save_teacher(tmp_path / "teacher")
    values = run_values(tmp_path, f"{tmp_path}/teacher", parallel=["ddp", 2])
    with pytest.raises(
        RunError, match=r"^parallel must share rows among a number that divides that of processes, 1, got 2$"
    ):
        Run(parse_config(values)).check_stages()
    values["student"] = {"keep_attention": [0]}
    run = Run(parse_config(values))
    run.accelerator = type("Two", (), {"num_processes": 2})()
    with pytest.raises(RunError, match=r"^parallel must not share rows .* must have a block .*, got layer 0 without"):
        run.check_stages()


def short(group):
    context = type("Rows", (), {"size": 2})
    micro = type("Micro", (), {})()
    micro.asked = micro.batch = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    micro.same = torch.zeros(1, dtype=torch.bool)
    with pytest.raises(TrainingError) as caught:
        assemble(micro, None, None, type("Stage", (), {"losses": {}}), torch.device("cpu"), group)
    return context.size, str(caught.value)


def test_rows_of_fewer_tokens_than_processes_say_so(gang):
    for size, text in gang(2, short):
        assert text == f"parallel must share rows among at most as many processes as they have tokens, 1, got {size}"


@pytest.mark.parametrize("size", [1, 2])
def test_all_who_share_rows_run_the_teacher_alike(size, monkeypatch):
    """One may find an answer that the other has just decoded, and has no states of. Then both wait for ever, if one of
    them goes by its states and the other asks the teacher, which they share."""
    known = MicroBatch({}, {}, torch.zeros(1, dtype=torch.bool), {}, states=torch.zeros(3, 4))
    found = iter([known, replace(known, states=None)])
    monkeypatch.setattr("linmu_distill.train.read_batch", lambda *given: next(found))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(autocast=nullcontext, device=torch.device("cpu")), _batches=2,
        _sharing=sharing(SimpleNamespace(num_processes=1, process_index=0), 1)._replace(size=size), transcripts=None,
        teacher=SimpleNamespace(model=torch.nn.Linear(2, 2)), source=SimpleNamespace(samples=lambda number: [number]),
        student=None, stage=None,
    )  # fmt: skip
    trainer.teacher.model.get_decoder = lambda: SimpleNamespace(layers=())
    states = [micro.states for micro in StageTrainer._read(trainer, 0)]
    assert (states[0] is None) == (size > 1) and states[1] is None
