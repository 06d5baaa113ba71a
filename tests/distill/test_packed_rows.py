"""Rows of several samples in training: each trains as if it were alone, and a run of them can be gone on with."""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import record_sets
import torch
from record_sets import answers, packed_config, reader, stop_at, stream, train
from training import curve, in_processes

import linmu_models
from linmu_distill.config import ConfigError, parse_config
from linmu_distill.data.stream import Decoding
from linmu_distill.handoff import stage_folder
from linmu_distill.objective import Objective, Teacher, assemble, read_batch
from linmu_distill.run import Run, RunError, distill
from linmu_distill.student import mixers
from linmu_distill.teacher import load_teacher
from linmu_distill.train import Interrupted
from linmu_models.chat import ChatProcessor, Conversation

BLOCKS = {
    "exact": {"text_window": 4, "sink_tokens": 2, "kept_tokens": 2, "window": [2, 2, 2], "image_window": [1, 2, 2]},
    "paper": {"window": [2, 2, 2]},
}


@pytest.fixture(scope="module", autouse=True)
def _small_windows():
    """Little data, read in several windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linmu_distill.sources.WINDOW", 8)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return record_sets.write(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def processor(folder):
    return ChatProcessor.load(folder / "teacher")


@pytest.fixture(scope="module")
def models(folder):
    teacher = load_teacher(str(folder / "teacher"), "float32")[0]
    made = {}
    for preset, options in BLOCKS.items():
        torch.manual_seed(3)
        student = linmu_models.convert(teacher, {"preset": preset, **options}).double()
        blocks = [p for i in mixers(student, teacher) for p in student.linmu_layers()[i].self_attn.parameters()]
        with torch.no_grad():
            for parameter in blocks:
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
        made[preset] = student
    return teacher.double(), made


@pytest.fixture(scope="module")
def samples(folder, processor):
    """Pictures, a video, plain text, talk without pictures, an answer of two turns."""
    data = stream(folder, processor, "whole")
    seen = [sample for i in range(12) for sample in data.samples(i)]
    data.close()
    video = next(sample for sample in seen if sample.media[0].is_video)
    pictures = [sample for sample in seen if not sample.media[0].is_video][:2]
    text, talk = Conversation((("", "plain text"),)), Conversation((("one?", "1"), ("two?", "two")))
    return [pictures[0], text, video, talk, pictures[1]]


class Own:
    """What the teacher is said to answer."""

    def known(self, samples):
        return [None] * len(samples)

    def __call__(self, others):
        return [
            dataclasses.replace(s, turns=tuple((q, f"{i} is mine") for q, _ in s.turns)) for i, s in enumerate(others)
        ]


def values(**changes):
    return {"output": "x", "teacher": "none", **changes}


def part_of(models, preset, samples, processor, packing, average, stage):
    options = parse_config(values(preset=preset, student=BLOCKS[preset], stage3=stage))
    teacher, student = models[0], models[1][preset]
    frozen = Teacher(teacher, list(mixers(student, teacher)))
    source = SimpleNamespace(processor=processor, packing=packing)
    row = dataclasses.replace(options.stage(3), average=average)
    asks, cpu = Own() if "sequence" in row.losses else None, torch.device("cpu")
    part = assemble(read_batch(source, list(samples), frozen, student, row, asks, cpu), frozen, student, row, cpu)
    return part, Objective(student, frozen, row)


def losses_and_gradients(part, objective):
    student = objective.student.requires_grad_(True)
    student.zero_grad()
    losses = objective(part, part.counts)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


EVERY = {"losses": dict.fromkeys(("hidden", "token", "sequence", "supervised"), 1.0)}
BY_BLOCK = {"losses": {"block": 1.0}}


@pytest.mark.parametrize(
    ("preset", "average", "stage"),
    [
        ("exact", "read", EVERY),
        ("exact", "read", BY_BLOCK),
        ("exact", "tokens", {"losses": {"hidden": 1.0, "token": 1.0}}),
        ("paper", "tokens", EVERY),
        ("paper", "tokens", BY_BLOCK),
        ("paper", "read", {"losses": {"token": 1.0, "supervised": 1.0}}),
    ],
)
def test_loss_and_gradients_are_those_of_padded_rows(models, samples, processor, preset, average, stage):
    found, counts = [], []
    for packing in (False, True):
        part, objective = part_of(models, preset, samples, processor, packing, average, stage)
        found.append(losses_and_gradients(part, objective))
        counts.append(part.counts)
        assert (part.counts["padding"] == 0) == packing and part.counts["token"] > 20
        assert part.batch["input_ids"].shape[0] == 1 or not packing
    assert {**counts[0], "padding": 0} == counts[1]
    (losses, gradients), (ours, mine) = found
    assert set(losses) >= {"hidden" if name == "block" else name for name in stage["losses"]}
    assert set(losses) == set(ours) and set(gradients) == set(mine)
    for name, value in losses.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7, msg=name)
        assert value > 0
    for name, gradient in gradients.items():
        near = 2e-5 * float(gradient.abs().max()) + 1e-9
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=near, msg=name)


@pytest.mark.parametrize("preset", BLOCKS)
def test_a_neighbour_changes_no_bit(models, samples, processor, preset):
    """What it says, and what its picture shows, length kept."""
    others = list(samples)
    others[1] = Conversation((("", "words here"),))
    clip = samples[4].media[0]
    others[4] = dataclasses.replace(samples[4], media=(dataclasses.replace(clip, frames=255 - clip.frames),))

    def blind(talks):
        """Neighbours have no labels."""
        batch = processor(talks)
        batch["labels"][[1, 4]] = -100
        return batch

    found = []
    for which in (samples, others):
        stage = {"losses": {"hidden": 1.0, "token": 1.0, "supervised": 1.0}}
        part, objective = part_of(models, preset, which, blind, True, "tokens", stage)
        mine = torch.isin(part.batch["seq_idx"], torch.tensor([0, 2, 3]))
        part.kinds = {kind: weights & mine for kind, weights in part.kinds.items()}
        losses, gradients = losses_and_gradients(part, objective)
        found.append([part.states, *losses.values(), *gradients.values()])
        assert float(losses["hidden"]) > 0
    assert not torch.equal(processor(samples)["pixel_values"], processor(others)["pixel_values"])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_layers_that_keep_attention(models, samples, processor):
    teacher = models[0]
    student = linmu_models.convert(teacher, {"preset": "exact", **BLOCKS["exact"]}, keep_attention=[0]).double()
    both = [
        losses_and_gradients(*part_of((teacher, {"exact": student}), "exact", samples, processor, p, "tokens", EVERY))
        for p in (False, True)
    ]
    for name, value in both[0][0].items():
        torch.testing.assert_close(both[1][0][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_rows_are_full(folder, processor):
    """Each record once, in fewer batches than padded ones; always the same."""
    for most in (64, 3):
        found = reader(folder, processor, window=20, one_row=True, max_tokens=200, max_samples=most)
        batches, counts = found.plan(0)
        assert counts == {"read": 20} and len({a for batch in batches for a in answers(batch)}) == 20
        lengths = [sum(Decoding().tokens(record, processor) for record in batch) for batch in batches]
        assert max(lengths) <= 200 and max(map(len, batches)) <= most
        again = reader(folder, processor, window=20, one_row=True, max_tokens=200, max_samples=most).plan(0)[0]
        assert [answers(batch) for batch in batches] == [answers(batch) for batch in again]
        if most == 64:
            least = math.ceil(sum(lengths) / 200)
            alike = reader(folder, processor, window=20, max_tokens=200).plan(0)[0]
            assert least <= len(batches) <= least + 1 and len(batches) <= len(alike)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    done = packed_config(folder, tmp_path_factory.mktemp("packed"))
    distill(done)
    return done


def test_a_run_of_packed_rows(whole, folder, tmp_path):
    """It tells what it saves."""
    padded = packed_config(folder, tmp_path, packing=False)
    train(padded)
    for done in (whole, padded):
        for number in (1, 3):
            steps = curve(stage_folder(done.folder, number))
            facts = json.loads((stage_folder(done.folder, number) / "manifest.json").read_text())
            assert facts["tokens"] == sum(step["tokens"] for step in steps) > 0
            assert facts["tokens_per_second"] == pytest.approx(facts["tokens"] / facts["seconds"])
            assert all(step["padding"] == 0 for step in steps) == (done is whole)
            assert (facts["padding"] == 0) == (done is whole) and 0 <= facts["padding"] < 1
            assert all(facts["data"][name]["used"] > 0 for name in facts["data"])
    report = (whole.folder / "report.md").read_text()
    assert "| padding |" in report and "| 0.0% |" in report


def test_where_training_starts_is_the_same(whole, folder, tmp_path):
    """Calibration sees the same records in rows of one."""
    padded = packed_config(folder, tmp_path, packing=False)
    Run(padded).prepare()
    ours, theirs = (json.loads((stage_folder(c.folder, 0) / "manifest.json").read_text()) for c in (whole, padded))
    assert ours["mean_squares"] == theirs["mean_squares"] and ours["weights"]["sha256"] == theirs["weights"]["sha256"]


def test_a_stopped_run_has_the_same_curve(whole, folder, tmp_path, monkeypatch):
    broken = packed_config(folder, tmp_path)
    for stage, stop in ((1, 3), (3, 5)):
        stop_at(monkeypatch, stage, stop)
        with pytest.raises(Interrupted, match=f"step {stop} of stage {stage}"):
            train(broken)
    stop_at(monkeypatch, 0, 0)
    train(broken)
    for number in (1, 3):
        assert curve(stage_folder(broken.folder, number)) == curve(stage_folder(whole.folder, number))
        facts = [json.loads((stage_folder(c.folder, number) / "manifest.json").read_text()) for c in (broken, whole)]
        assert facts[0]["data"] == facts[1]["data"] and facts[0]["tokens"] == facts[1]["tokens"]


def test_two_processes_pack(folder, tmp_path):
    """Rows of other lengths in each, and text in one where the other has pictures."""
    two = packed_config(folder, tmp_path, parallel="ddp", stage1={"steps": 0}, stage3={"steps": 4})

    assert in_processes(2, lambda rank: train(two)) == [0, 0]
    steps = curve(stage_folder(two.folder, 3))
    assert len(steps) == 4 and all(step["padding"] == 0 for step in steps)


def test_what_is_not_packed_is_refused(folder, tmp_path):
    sets = {"t": {"format": "text", "files": ["t.txt"]}}
    for changes, words in (
        ({"data": {"packing": True}}, "data: packing is for data sets, the built-in tasks are not packed; got True"),
        ({"stage2": {"data": {"packing": True}}}, "stage2.data: packing is for data sets"),
        ({"evaluation": {"held_out": {"sets": sets, "packing": True}}}, "evaluation: held_out.packing must be false"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            parse_config(values(**changes))
        assert "\n" not in str(error.value)
    text = values(data={"sets": sets}, stage3={"losses": {"token": 1}})
    assert not parse_config(text).data.packing
    run = Run(packed_config(folder, tmp_path))
    run.teacher = SimpleNamespace(config=copy.copy(run.teacher.config))
    run.teacher.config.model_type = "other"
    with pytest.raises(RunError, match=r"data\.packing must be false for a other teacher"):
        run.check_stages()
