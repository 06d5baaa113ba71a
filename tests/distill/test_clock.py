"""Where the time of a step goes. Time stands still here but for what is made slow, so that no machine's load shows."""

import json
import time
from types import SimpleNamespace

import pytest
import stand_ins
import torch

from linmu_distill import clock
from linmu_distill.clock import PARTS, REST, Clock, as_record, of_record, shares, spent


class Time:
    """A clock that goes on when told to."""

    def __init__(self):
        self.now = 0.0

    def pass_by(self, *_):
        self.now += 1.0


@pytest.fixture
def still(monkeypatch):
    """Of the clock of a training; all others go on."""
    made = Time()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def slow(function, still):
    def slowed(*args, **kwargs):
        still.pass_by()
        return function(*args, **kwargs)

    return slowed


def slow_samples(trainer, still):
    trainer.source.samples = slow(trainer.source.samples, still)


def slow_tensors(trainer, still):
    trainer.source.processor = slow(trainer.source.processor, still)


def slow_teacher(trainer, still):
    """Also where it decodes, in the midst of reading."""
    trainer.teacher.model.model.register_forward_pre_hook(still.pass_by)


def slow_forward(trainer, still):
    trainer.student.get_decoder().layers[0].register_forward_pre_hook(still.pass_by)


def slow_backward(trainer, still):
    next(iter(trainer.trainable.values())).register_hook(still.pass_by)


def slow_optimiser(trainer, still):
    trainer._clip = slow(trainer._clip, still)


def slow_saving(trainer, still):
    trainer.store.save = slow(trainer.store.save, still)


def slow_rest(trainer, still):
    trainer.on_step = still.pass_by


SLOW = [
    ("loader", slow_samples), ("loader", slow_tensors), ("teacher", slow_teacher), ("student", slow_forward),
    ("student", slow_backward), ("optimiser", slow_optimiser), ("saving", slow_saving), (REST, slow_rest),
]  # fmt: skip


# Where the teacher decodes, as in stage 3, tensors of what it is asked are its own time.
CASES = [(number, *case) for number in (1, 3) for case in SLOW if (number, case[1]) != (3, slow_tensors)]


@pytest.mark.parametrize("number, part, slowed", CASES, ids=[f"{slowed.__name__}-{n}" for n, _, slowed in CASES])
def test_what_is_slow_shows_as_itself(tmp_path, still, number, part, slowed):
    config = stand_ins.config_of(tmp_path, checkpoint_every=1, **{f"stage{number}": {"steps": 3}})
    trainer = stand_ins.stage_trainer(config, number)
    slowed(trainer, still)
    trainer.run()
    assert trainer.throughput()["shares"] == {**dict.fromkeys(PARTS, 0.0), part: 1.0}
    lines = [json.loads(line) for line in trainer.metrics_path.read_text().splitlines()]
    # What happens behind a line is told by the next.
    first, rest = (lines[:1], lines[1:]) if part in ("saving", REST) else ([], lines)
    assert all(line["step_seconds"] == 0 for line in first)
    assert all(line[f"share/{part}"] == 1 and line["step_seconds"] > 0 for line in rest)


@pytest.mark.parametrize("block_input", ["student", "teacher"])
def test_shares_add_up(tmp_path, block_input):
    losses = {"losses": {"block": 1.0}} if block_input == "teacher" else {}
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path, stage1={"steps": 5, **losses}), 1)
    assert trainer.stage.block_input == block_input
    began = time.perf_counter()
    trainer.run()
    whole = time.perf_counter() - began
    lines = [json.loads(line) for line in trainer.metrics_path.read_text().splitlines()]
    for line in [*lines, {f"share/{part}": share for part, share in trainer.throughput()["shares"].items()}]:
        told = {name: share for name, share in line.items() if name.startswith("share/")}
        assert list(told) == [f"share/{part}" for part in PARTS]
        assert sum(told.values()) == pytest.approx(1) and min(told.values()) >= 0
    for part in ("loader", "teacher", "student", "optimiser"):
        assert all(line[f"share/{part}"] > 0 for line in lines), part
    # All time is told once: nothing twice, and no more than there was.
    assert trainer.seconds <= sum(line["step_seconds"] for line in lines) <= whole


def test_a_stage_weighs_its_steps_by_their_time(tmp_path, still):
    """Over all attempts: it was killed behind a slow step, and a line of an older release tells nothing."""
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path, stage1={"steps": 2}), 1)
    slow_samples(trainer, still)
    trainer.run()
    for more in ({"teacher": 6.0}, {"loader": 2.0, "student": 4.0}):
        with trainer.metrics_path.open("a") as file:
            file.write(json.dumps({"tokens": 1, **as_record({**dict.fromkeys(PARTS, 0.0), **more})}) + "\n")
    with trainer.metrics_path.open("a") as file:
        file.write('{"tokens": 1}\n')
    found = trainer.throughput()["shares"]
    assert {part: share for part, share in found.items() if share} == pytest.approx(
        {"loader": 4 / 14, "teacher": 6 / 14, "student": 4 / 14}
    )
    assert shares(of_record({"tokens": 1})) == {}


@spent("saving")
def broken(still):
    still.pass_by()
    return 1 / 0


def test_the_inner_part_counts(still):
    with Clock(torch.device("cpu")) as running:
        still.pass_by()
        with spent("loader"):
            still.pass_by()
            with spent("teacher"):
                still.pass_by()
            still.pass_by()
        with pytest.raises(ZeroDivisionError):
            broken(still)
        still.pass_by()
        assert running.lap() == {**dict.fromkeys(PARTS, 0.0), REST: 2.0, "loader": 2.0, "teacher": 1.0, "saving": 1.0}
        assert sum(running.lap().values()) == 0
    with spent("loader"):  # no clock runs
        still.pass_by()


def test_a_profiler_sees_the_parts(tmp_path):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path, stage1={"steps": 1}), 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.run()
    seen = {event.key for event in profile.key_averages()}
    assert {f"linmu.{part}" for part in PARTS if part != REST} <= seen


class Stream:
    """A GPU's: a second for each thing that is queued. It is done when the host waits for it, or says so."""

    def __init__(self):
        self.queued, self.done, self.waits = 0, 0, 0

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream = stream

    def record(self):
        self.at = self.stream.queued

    def query(self):
        return self.at <= self.stream.done

    def synchronize(self):
        self.stream.waits += 1
        self.stream.done = max(self.stream.done, self.at)

    def elapsed_time(self, end):
        assert self.query() and end.query()
        return 1e3 * (end.at - self.at)


def test_on_cuda_no_step_waits(monkeypatch):
    """What the stream has not done yet is told by a later lap, and nothing is lost."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    with Clock(torch.device("cuda")) as running:
        with spent("student"):
            stream.queued += 3
        stream.done = 3  # as the loss is read
        with spent("optimiser"):
            stream.queued += 2
        assert {part: s for part, s in running.lap().items() if s} == {"student": 3}
        with spent("teacher"):
            stream.queued += 4
        stream.done = 7
        assert {part: s for part, s in running.lap().items() if s} == {"optimiser": 2}
        assert stream.waits == 0
        assert {part: s for part, s in running.lap(wait=True).items() if s} == {"teacher": 4}
        assert stream.waits == 1
