"""`linmu answers`: the teacher's own answers (L_seq), decoded before stage 3, in batches, by many processes.

Stage 3 then finds all of them in `answers.sqlite`. What is decoded is kept at once, and which of the training's batches
have all their answers is kept beside it, so a process may end at any instant: the next one goes on from there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from .config import Config, TaskData, hash_of
from .files import say
from .parallel import check_sharing
from .run import Run, RunError
from .sources import UNFIT, build_source, fits_tasks
from .stages import STAGES
from .teacher import AnswerCache, Stream, own_answers

STAGE = len(STAGES)  # the one that uses L_seq
BATCHES = 64  # batches of the training after which at the latest it is noted where reading is
EVERY = 60  # seconds between two lines on how far a process is


class Ledger(AnswerCache):
    """Answers, and which batches of a training have all of theirs.

    A batch is known by the training's process and by its number there. `data` tells trainings apart.
    """

    def __init__(self, path: Path, teacher: str, data: str) -> None:
        super().__init__(path, teacher)
        self._data = data
        columns = "data TEXT, process INTEGER, number INTEGER"
        with self._usable():
            self._db.execute(f"CREATE TABLE IF NOT EXISTS done ({columns}, PRIMARY KEY (data, process, number))")
            self._db.execute(
                f"CREATE TABLE IF NOT EXISTS places ({columns}, state TEXT, PRIMARY KEY (data, process, number))"
            )

    def done(self, process: int) -> set[int]:
        """The numbers of a process's batches that have all their answers."""
        with self._usable():
            rows = self._db.execute("SELECT number FROM done WHERE data = ? AND process = ?", (self._data, process))
            return {number for (number,) in rows}

    def place(self, process: int) -> tuple[int, dict[str, Any] | None]:
        """The number of the first batch to read, and the state of a stream before it; None: its start."""
        done, first = self.done(process), 0
        while first in done:
            first += 1
        with self._usable():
            found = self._db.execute(
                "SELECT number, state FROM places WHERE data = ? AND process = ? AND number < ? ORDER BY number DESC",
                (self._data, process, first),
            ).fetchone()
        return (0, None) if found is None else (found[0] + 1, json.loads(found[1]))

    def note(self, process: int, finished: list[int], last: int, state: dict[str, Any] | None) -> None:
        """Batches that have all their answers; and the state of a stream after batch `last`."""
        rows = [(self._data, process, number) for number in finished]
        with self._usable(), self._db:  # all of it, or nothing
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO done VALUES (?, ?, ?)", rows)
            if state is not None:
                row = (self._data, process, last, json.dumps(state))
                self._db.execute("INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?)", row)


def shares(worker: int, workers: int, processes: int) -> list[tuple[int, int, int]]:
    """What one of several workers reads of a training in so many processes: (process, i, n), its batches i, i + n, ...

    A data set is read in order, so a worker reads whole processes where there are enough of them.
    """
    if workers <= processes:
        return [(process, 0, 1) for process in range(worker, processes, workers)]
    process = worker % processes
    return [(process, worker // processes, len(range(process, workers, processes)))]


class Decoder:
    """One of several workers.

    Args:
        processes: how many will train, or groups of those that share rows: they share the data.
        batch: samples that are decoded together.
        worker, workers: which one of how many this is.
    """

    def __init__(self, run: Run, processes: int, batch: int, worker: int, workers: int) -> None:
        config = run.config
        self.run, self.processes, self.batch, self.worker, self.workers = run, processes, batch, worker, workers
        self.data = config.stage_data(STAGE)
        facts = [
            self.data.model_dump(mode="json"), config.seed, config.gradient_accumulation, config.max_new_tokens,
            run.teacher_hash, processes,
        ]  # fmt: skip
        self.ledger = Ledger(run.folder / "answers.sqlite", run.teacher_hash, hash_of(facts)[:16])
        self.total = config.stage(STAGE).steps * config.gradient_accumulation
        self.decoded, self.read, self._began = 0, 0, time.perf_counter()
        self._told = self._began

    def __call__(self) -> None:
        """Decode this worker's share."""
        for process, first, step in shares(self.worker, self.workers, self.processes):
            self._process(process, first, step)

    def _process(self, process: int, first: int, step: int) -> None:
        run, config = self.run, self.run.config
        source = build_source(
            self.data, config.teacher, run.teacher, run.tokenizer, config.seed * 4 + STAGE, process, self.processes
        )
        done, start = self.ledger.done(process), 0
        streams = isinstance(source, Stream)
        if isinstance(source, Stream):
            start, state = self.ledger.place(process)
            if state is not None:
                source.load_state_dict(state)
        waiting: dict[str, Any] = {}
        finished: list[int] = []
        for number in range(start, self.total):
            mine = number % step == first and number not in done
            if not mine and not streams:
                continue
            samples = source.samples(number * self.processes + process)
            if mine:
                finished.append(number)
                self.read += 1
                # Plain text asks nothing that could be answered.
                for sample in samples:
                    if any(question for question, _ in sample.turns):
                        key = self.ledger.key(sample, config.max_new_tokens)
                        if key not in waiting and self.ledger.get(key) is None:
                            waiting[key] = sample
            if len(waiting) >= self.batch or len(finished) >= BATCHES or number + 1 == self.total:
                self._decode(source, waiting)
                self.ledger.note(process, finished, number, source.state_dict() if isinstance(source, Stream) else None)
                waiting, finished = {}, []
        if finished:
            self._decode(source, waiting)
            self.ledger.note(process, finished, finished[-1], None)
        if streams:
            source.close()  # type: ignore[attr-defined]  # threads that read ahead

    def _decode(self, source: Any, waiting: dict[str, Any]) -> None:
        """Decode these samples' answers, and keep them batch by batch."""
        run, keys = self.run, list(waiting)
        for begin in range(0, len(keys), self.batch):
            part = keys[begin : begin + self.batch]
            samples = [waiting[key] for key in part]
            with run.accelerator.autocast():
                said = own_answers(run.teacher, run.tokenizer, source, samples, run.config.max_new_tokens)
            for key, answers in zip(part, said, strict=True):
                self.ledger.put(key, answers)
            self.decoded += len(part)
        now = time.perf_counter()
        if now - self._told >= EVERY:
            self._told = now
            every = sum(
                len(range(first, self.total, step))
                for _, first, step in shares(self.worker, self.workers, self.processes)
            )
            rate = self.read / (now - self._began)
            speed, hours = self.decoded / (now - self._began), (every - self.read) / rate / 3600
            say(
                f"process {self.worker}: {self.read:,} of at most {every:,} batches, {self.decoded:,} answers, "
                f"{speed:.1f} a second; at most {hours:.1f} h left"
            )


def decode_ahead(config: Config, processes: int | None = None, batch: int = 64) -> str:
    """Decode what stage 3 needs; each process of `accelerate launch` or `torchrun` takes a share. A line on the result.

    Args:
        processes: how many will train: they share the data, those that share rows as one. None: as many as decode.
        batch: samples that are decoded together.

    Raises:
        RunError: stage 3 decodes nothing, its data cannot be shown to the teacher, or rows cannot be shared among so
            many processes.
    """
    stage = config.stage(STAGE)
    if not stage.steps or "sequence" not in stage.losses:
        raise RunError(f"stage{STAGE} must have steps and a weight of `sequence`, else it needs no answers")
    run = Run(config, whole=True)
    if isinstance(config.stage_data(STAGE), TaskData) and not fits_tasks(run.teacher, run.tokenizer):
        raise RunError(f"data.sets must be given: {config.teacher} cannot be shown the built-in tasks; {UNFIT}")
    workers = run.accelerator.num_processes
    processes = processes or workers
    try:
        check_sharing(processes, config.context)
    except ValueError as error:
        raise RunError(f"{error}; say by --processes how many will train") from error
    decoder = Decoder(run, processes // config.context, batch, run.accelerator.process_index, workers)
    decoder()
    run.accelerator.wait_for_everyone()
    done = sum(len(decoder.ledger.done(process)) for process in range(decoder.processes))
    return (
        f"{done:,} of {decoder.total * decoder.processes:,} batches of stage {STAGE} in {processes} processes "
        f"have their answers; there are {len(decoder.ledger):,}"
    )
