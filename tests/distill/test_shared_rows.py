"""Processes that share rows have, together, the losses and gradients of one."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
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
from linmu_models.chat import Conversation
from linmu_models.media import Clip
from linmu_ops.context_parallel import ContextParallel

NEAR = {"window": [1, 2, 2], "text_window": 8, "kept_tokens": 4}
ANSWERS = {"losses": {"hidden": 0.5, "token": 0.5, "supervised": 0.5}}


def derived(group, folder, preset, number, more, source=None):
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
    source = source or build_source(config.stage_data(number), config.teacher, teacher, tokenizer, 0)
    asked = Teacher(teacher, list(blocks))
    micro = read_batch(source, source.samples(0), asked, student, stage, None, where)
    if isinstance(source, Short):
        losses = StageTrainer._derive(step_of(group, asked, student, stage), Objective(student, asked, stage), micro,
                                      micro.counts)  # fmt: skip
        return {n: v.detach() for n, v in losses.items()} | {n: p.grad for n, p in trainable.items()}
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


def step_of(group, teacher, student, stage):
    """What a step knows of its processes, of which one averages nothing."""
    alone = SimpleNamespace(
        autocast=nullcontext, num_processes=1, device=torch.device("cpu"), backward=lambda loss: loss.backward()
    )
    shares = SimpleNamespace(group=group, size=1 if group is None else group.size())
    return SimpleNamespace(accelerator=alone, _sharing=shares, teacher=teacher, student=student, stage=stage)


class Short:
    """A row of three tokens."""

    def samples(self, step):
        return [None]

    def processor(self, samples):
        ids = torch.tensor([[8, 9, 10]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("number, more", [(1, {}), (3, ANSWERS)])
def test_rows_of_fewer_tokens_than_processes(gang, tmp_path, number, more):
    """Such a row is not split, and counts once."""
    save_teacher(tmp_path / "teacher")
    what = tmp_path, "exact", number, more, Short()
    want, found = derived(None, *what), gang(4, derived, *what)
    for name, value in want.items():
        total = sum(each[name] for each in found)
        torch.testing.assert_close(total, value, rtol=1e-3, atol=1e-5 * max(1, float(value.abs().max())), msg=name)


class Differs:
    """Answers that one process had to decode, and another found on the disk, decoded beside other samples."""

    def __init__(self, rank):
        self.rank, self.asked = rank, 0

    def known(self, samples):
        self.asked += 1
        return [[answer + " x" for _, answer in sample.turns] if self.rank else None for sample in samples]

    def __call__(self, samples):
        more = " x" if self.rank else " and more"
        return [replace(s, turns=tuple((q, answer + more) for q, answer in s.turns)) for s in samples]


def told(group, folder):
    rank, teacher = group.rank(), load_teacher(f"{folder}/teacher", "float32")
    config = parse_config(run_values(folder, f"{folder}/teacher"))
    student, blocks, _ = new_student(teacher[0], config)
    source = build_source(config.stage_data(3), config.teacher, *teacher, 0)
    trainer = SimpleNamespace(_sharing=SimpleNamespace(size=2, group=SimpleNamespace(get_group=lambda: group)))
    heard, asked = Differs(rank), Teacher(teacher[0], list(blocks))
    micro = read_batch(source, source.samples(0), asked, student, config.stage(3), heard, torch.device("cpu"),
                       lambda work: StageTrainer._agreed(trainer, work))  # fmt: skip
    return micro.batch, micro.same, heard.asked, len(micro.asked["input_ids"])


def test_all_who_share_rows_hear_one_answer(gang, tmp_path):
    """Else their rows are of other lengths, and they wait for ever. The first alone decodes."""
    save_teacher(tmp_path / "teacher")
    (batch, same, asked, rows), (others, as_same, never, _) = gang(2, told, tmp_path)
    assert (asked, never) == (1, 0) and len(batch["input_ids"]) == 2 * rows and same.equal(as_same)
    assert batch.keys() == others.keys() and all(value.equal(others[name]) for name, value in batch.items())


def read_apart(group, differs):
    """What a process says that reads a record which the other could not."""
    trainer = SimpleNamespace(_sharing=SimpleNamespace(size=2, group=SimpleNamespace(get_group=lambda: group)))
    trainer._agreed = lambda work: StageTrainer._agreed(trainer, work)
    trainer._where = lambda step, what: f"step {step}: {what}"
    read = [Conversation((("q", "a"),), (Clip(np.zeros((1, 4 + 2 * (differs and group.rank()), 4, 3))),))]
    try:
        StageTrainer._check_same(trainer, [read], 3)
    except TrainingError as error:
        return str(error)


def test_all_who_share_rows_have_read_the_same(gang):
    assert gang(2, read_apart, False) == [None, None]
    first, other = gang(2, read_apart, True)
    assert first is None and other.startswith("step 3: processes that share a row have read other records for it")


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
        student=None, stage=None, _agreed=None, _check_same=lambda samples, step: None,
    )  # fmt: skip
    trainer.teacher.model.get_decoder = lambda: SimpleNamespace(layers=())
    states = [micro.states for micro in StageTrainer._read(trainer, 0)]
    assert (states[0] is None) == (size > 1) and states[1] is None
