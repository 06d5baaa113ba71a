"""`linmu answers` leaves stage 3 nothing to decode, whoever decodes, and however often it is killed."""

import os
import signal
import sqlite3
import time

import pytest
import record_sets
import torch
from small_run import run_values, save_teacher
from training import in_processes
from typer.testing import CliRunner

from linmu_distill import answers as ahead
from linmu_distill import cli, teacher
from linmu_distill.answers import Decoder, decode_ahead, shares
from linmu_distill.config import parse_config
from linmu_distill.data.stream import RecordStream
from linmu_distill.run import Run, RunError
from linmu_models.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return record_sets.write(tmp_path_factory.mktemp("sets"))


def tasks(folder, output, **changes):
    """A run on built-in tasks, of stage 3 alone."""
    steps = {f"stage{i}": {"steps": 0} for i in (1, 2)} | {"stage3": {"steps": 3}}
    values = run_values(output, folder, evaluation={"samples": 0, "speed_lengths": []}, **steps)
    return parse_config({**values, "gradient_accumulation": 2, **changes})


def records(sets, output, **changes):
    return record_sets.config(sets, output, stage1={"steps": 0}, stage2={"steps": 0}, stage3={"steps": 8}, **changes)


def table(config):
    with sqlite3.connect(config.folder / "answers.sqlite") as db:
        return dict(db.execute("SELECT key, answers FROM answers"))


def decode(config, worker=0, workers=1, processes=1, batch=5):
    decoder = Decoder(Run(config), processes, batch, worker, workers)
    decoder()
    return decoder


def in_child(work):
    """The status of a process in which `work()` runs."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kind", ["tasks", "records"])
def test_stage_3_decodes_nothing(folder, sets, tmp_path, monkeypatch, kind):
    config = tasks(folder, tmp_path) if kind == "tasks" else records(sets, tmp_path)
    batches = 3 * 2 if kind == "tasks" else 8
    line = decode_ahead(config)
    assert line.startswith(f"{batches} of {batches} batches of stage 3 in 1 processes have their answers; there are ")
    before = table(config)
    assert len(before) > 5

    def refuse(*args):
        raise AssertionError("stage 3 decodes")

    monkeypatch.setattr(teacher, "own_answers", refuse)
    run = Run(config)
    run.prepare()
    for number in (1, 2, 3):
        run.train(number)
    assert table(config) == before
    monkeypatch.setattr(ahead, "own_answers", refuse)
    assert decode_ahead(config) == line  # and a second time there is nothing to do


@pytest.mark.parametrize("kind", ["tasks", "records"])
def test_a_killed_process_loses_nothing(folder, sets, tmp_path, monkeypatch, kind):
    """Killed after the first answer, in the middle of a batch, between answers and the note on them, and so on."""
    whole, cut = (
        tasks(folder, tmp_path / name) if kind == "tasks" else records(sets, tmp_path / name)
        for name in ("whole", "cut")
    )
    decode(whole)
    kept, noted = ahead.Ledger.put, ahead.Ledger.note

    def kill(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_after(answers):
        def put(self, *entry):
            kept(self, *entry)
            put.left -= 1
            if not put.left:
                kill()

        put.left = answers
        return put

    for answers in (1, 3):
        monkeypatch.setattr(ahead.Ledger, "put", killed_after(answers))
        before = len(table(cut)) if (cut.folder / "answers.sqlite").exists() else 0
        assert in_child(lambda: decode(cut)) == -signal.SIGKILL
        assert len(table(cut)) == before + answers  # none is decoded twice, none is lost
    monkeypatch.setattr(ahead.Ledger, "put", kept)
    monkeypatch.setattr(ahead.Ledger, "note", kill)
    assert in_child(lambda: decode(cut)) == -signal.SIGKILL
    monkeypatch.setattr(ahead.Ledger, "note", noted)
    decode(cut)
    assert table(cut) == table(whole)


def test_a_stream_goes_on_where_it_was(sets, tmp_path, monkeypatch):
    """Media of batches that are done are not read again."""
    monkeypatch.setattr(ahead, "BATCHES", 1)
    config = records(sets, tmp_path)
    read, asked = RecordStream.samples, []

    def samples(self, index):
        asked.append(index)
        if stop_before == index:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(RecordStream, "samples", samples)
    stop_before = 5
    with pytest.raises(KeyboardInterrupt):
        decode(config)
    stop_before, asked[:] = None, []
    decode(config)
    assert asked == [5, 6, 7]


@pytest.mark.parametrize("kind, workers, processes", [("tasks", 2, 3), ("tasks", 3, 1), ("records", 3, 2)])
def test_workers_share_what_training_needs(folder, sets, tmp_path, monkeypatch, kind, workers, processes):
    """Each answer is decoded by one of them, and all are those of one worker."""
    # A set of as many pieces as processes.
    pictures = {"pictures": {"format": "onevision", "files": [str(sets / "flawed.parquet")]}}
    one, many = (
        tasks(folder, tmp_path / name)
        if kind == "tasks"
        else records(sets, tmp_path / name, data={"sets": pictures, "max_tokens": 200})
        for name in ("one", "many")
    )
    decode(one, processes=processes)
    decoded = [decode(many, worker, workers, processes).decoded for worker in range(workers)]
    assert sum(decoded) == len(table(many)) and sum(n > 0 for n in decoded) > 1
    assert table(many) == table(one)


def test_shares_cover_each_batch_once():
    for workers in range(1, 7):
        for processes in range(1, 5):
            every = [share for worker in range(workers) for share in shares(worker, workers, processes)]
            read = [(process, number) for process, first, step in every for number in range(first, 12, step)]
            assert sorted(read) == [(process, number) for process in range(processes) for number in range(12)]


def test_processes_that_decode_are_those_that_train(folder, tmp_path, monkeypatch):
    two, one = tasks(folder, tmp_path / "two"), tasks(folder, tmp_path / "one")
    assert in_processes(2, lambda rank: decode_ahead(two)) == [0, 0]
    decode(one, processes=2)
    assert table(two) == table(one)


def test_processes_that_share_rows_read_as_one(sets, tmp_path):
    """Two that share each row need the answers of one that does not."""
    pictures = {"pictures": {"format": "onevision", "files": [str(sets / "flawed.parquet")]}}
    data = {"sets": pictures, "max_tokens": 200}
    two = records(sets, tmp_path / "two", data=data, parallel=["ddp", 2])
    one = records(sets, tmp_path / "one", data=data)
    assert in_processes(2, lambda rank: decode_ahead(two)) == [0, 0]
    decode(one)
    assert table(two) == table(one)
    with pytest.raises(RunError, match=r"that of processes, 1, got 2; say by --processes how many will train$"):
        decode_ahead(two)
    line = decode_ahead(two, processes=2)
    assert line.startswith("8 of 8 batches of stage 3 in 2 processes have their answers")


def test_one_of_several_processes_makes_damaged_answers_anew(tmp_path, monkeypatch):
    """And none deletes what another has made."""
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"no database, " * 100)

    def work(rank):
        # All have found it damaged before the first deletes it, and the last long after.
        monkeypatch.setattr(teacher, "say", lambda line: time.sleep(0.2 + rank))
        torch.distributed.init_process_group("gloo")
        cache = teacher.AnswerCache(path, "t")
        cache.put(f"key {rank}", ["an answer"])
        torch.distributed.barrier()
        assert len(cache) == len(teacher.AnswerCache(path, "t")) == 2

    assert in_processes(2, work) == [0, 0]


def test_another_configuration_is_read_anew(folder, tmp_path):
    """What was noted of one is not taken for another's; answers stay by content."""
    first = decode(tasks(folder, tmp_path))
    again = decode(tasks(folder, tmp_path, seed=1))
    longer = decode(tasks(folder, tmp_path, stage3={"steps": 4}))
    assert first.decoded and again.decoded and again.read == first.read == 6 and longer.read == 2


@pytest.mark.parametrize("what", ["a full disk", "a folder"])
def test_a_file_of_answers_that_cannot_be_written_is_one_line(folder, tmp_path, monkeypatch, what):
    config = tasks(folder, tmp_path)
    monkeypatch.setattr(cli, "_settings", lambda _: config)
    if what == "a folder":
        (config.folder / "answers.sqlite").mkdir(parents=True)
    opened = teacher.AnswerCache._opened

    def full(path):
        db = opened(path)
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
        return db

    monkeypatch.setattr(teacher.AnswerCache, "_opened", staticmethod(full))
    done = CliRunner().invoke(app, ["answers", "run.toml"])
    lines = [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert done.exit_code == 1 and len(lines) == 1, (lines, done.exception)
    assert lines[0].startswith(f"linmu: {config.folder / 'answers.sqlite'} cannot be used: ")


def test_errors_are_one_line(folder, tmp_path):
    config = tasks(folder, tmp_path, stage3={"steps": 6, "losses": {"token": 1.0}})
    with pytest.raises(
        RunError, match=r"^stage3 must have steps and a weight of `sequence`, else it needs no answers$"
    ):
        decode_ahead(config)
    result = CliRunner().invoke(app, ["answers", str(tmp_path / "none.toml")])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
