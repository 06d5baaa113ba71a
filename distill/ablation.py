"""`linmu distill --ablate TABLE`: runs that differ in a few options, with several seeds, scored on the same samples.

A table goes on where it stopped: what is in its results, or in those of a table beside it, is not run again, and a run
that was cut short is resumed.
"""

import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from transformers import PreTrainedModel

from . import handoff, held_out
from .checkpoint import locked, write_atomically
from .config import Config, ConfigError, Name, describe, hash_of, load_values, parse_config
from .files import read_json, read_lines
from .report import read_metrics
from .run import TEACHER, Run, RunError
from .stages import STAGES

_PAGE_SECONDS = 15.0  # many processes do not write a page more often


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Strict):
    """One line of a table: a run for each seed, or a run of another line looked at after an earlier stage."""

    name: Name
    about: str = ""
    """For the page: what the line is."""
    set: dict[str, Any] = {}
    """Options of `Config` that differ from the base; tables are merged, all else is replaced."""
    of: Name | None = None
    """Score the runs of this line..."""
    after: Annotated[int, Field(ge=0, lt=len(STAGES))] | None = None
    """...as they were after this stage; 0: as converted and calibrated."""

    @model_validator(mode="after")
    def _a_run_or_a_look_at_one(self) -> "Row":
        if (self.of is None) != (self.after is None) or (self.of and self.set):
            raise ValueError("of and after belong together, without set")
        return self


class Curve(_Strict):
    """Accuracy of one task group against one option of its generator."""

    group: str
    option: str
    values: Annotated[list[Any], Field(min_length=1)]
    samples: Annotated[int, Field(gt=0)] = 100
    label: str = ""
    """The axis."""
    trained: Any = None
    """The largest value that training shows; drawn in."""


class TableConfig(_Strict):
    """The TOML file of a table. Its name is the file's."""

    title: str
    about: str = ""
    base: str
    """A configuration of `linmu distill`, relative to the table's folder. Its `name` and `seed` are not used."""
    seeds: Annotated[int, Field(gt=0)] = 3
    set: dict[str, Any] = {}
    """Options that all rows share."""
    rows: Annotated[list[Row], Field(min_length=1)]
    """The first is what the others are compared with."""
    unequal_compute: str = ""
    """Why rows may differ in their number of steps; without it, they may not."""
    held_out: Annotated[int, Field(ge=0)] = 64
    """Test samples of each group on which the distance to the teacher is measured."""
    curves: dict[Name, Curve] = {}
    results: str = "bench/results/ablations"
    reports: str = "bench/reports"


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` in it; tables are merged, all else is replaced."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


class Table:
    """A table file with the configuration of each of its runs."""

    def __init__(self, path: Path) -> None:
        """Read the file and check every row.

        Raises:
            ConfigError: the file, its base or a row is wrong, or rows differ in their number of steps.
        """
        values = load_values(path)
        try:
            self.config = TableConfig.model_validate(values)
        except ValidationError as error:
            raise ConfigError(describe(error, str(path))) from error
        self.name = path.stem
        self._source = str(path)
        self._base = load_values(path.parent / self.config.base)
        names = [row.name for row in self.config.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or TEACHER in names:
            raise ConfigError(
                f"{path}: rows: a name must occur once and not be {TEACHER!r}, got {[*twice, TEACHER][0]}"
            )
        self.runs = [row for row in self.config.rows if row.of is None]
        for row in self.config.rows:
            if row.of is not None and row.of not in {other.name for other in self.runs}:
                raise ConfigError(f"{path}: rows.{row.name}.of must name a row that is run, got {row.of}")
        self.first = self.run_config(self.runs[0], 0)
        self._check_compute()
        self._check_scoring()

    def _check_compute(self) -> None:
        steps = {row.name: sum(self.run_config(row, 0).stage(i).steps for i in (1, 2, 3)) for row in self.runs}
        if len(set(steps.values())) > 1 and not self.config.unequal_compute:
            told = ", ".join(f"{name} {count}" for name, count in steps.items())
            raise ConfigError(
                f"{self._source}: rows must have as many steps in all, got {told}; or say why not in unequal_compute"
            )

    def _check_scoring(self) -> None:
        for row in self.runs:
            if self.scoring(self.run_config(row, 0)) != self.scoring(self.first):
                raise ConfigError(f"{self._source}: rows.{row.name} must be scored as the first: teacher, evaluation")

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            RunError: there is none.
        """
        for row in self.config.rows:
            if row.name == name:
                return row
        names = ", ".join(row.name for row in self.config.rows)
        raise RunError(f"--row must be among {names}, got {name}")

    def run_config(self, row: Row, seed: int) -> Config:
        """The configuration of one run: base, then the table's `set`, then the row's."""
        values = merged(merged(self._base, self.config.set), row.set)
        output = str(Path(values.get("output", "runs")) / self.name / row.name)
        return parse_config(
            {**values, "output": output, "name": str(seed), "seed": seed}, f"{self._source}: {row.name}"
        )

    def scoring(self, config: Config) -> dict[str, Any]:
        """Everything but the model that scores depend on."""
        return {
            "evaluation": config.evaluation.model_dump(mode="json", exclude={"speed_lengths", "speed_new_tokens"}),
            "held_out": self.config.held_out,
            "curves": {name: curve.model_dump(mode="json") for name, curve in self.config.curves.items()},
            "teacher": config.teacher.path,
        }

    def key(self, row: Row, seed: int) -> str:
        """Hash of all that the result of a row depends on, the code excepted."""
        config = self.run_config(row if row.of is None else self.row(row.of), seed)
        ignored = {"name", "output", "threads", "checkpoints", "evaluation"}
        facts = {"run": config.model_dump(mode="json", exclude=ignored), "after": row.after, **self.scoring(config)}
        return hash_of(facts)[:16]

    @property
    def teacher_key(self) -> str:
        """As `key`, of the teacher's scores."""
        return hash_of(self.scoring(self.first))[:16]


# -- results ---------------------------------------------------------------------------------------------------------


class Results:
    """A JSONL file: a line for each row and seed, and one for the teacher."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(row, key) -> its last line. Lines of rows as they once were stay in the file and match no key."""
        return {(record["row"], record["key"]): record for record in read_lines(self.path, ("row", "key"))}

    def of_other_tables(self, key: str) -> dict[str, Any] | None:
        """What a table beside this one measured under the same key, with that table's name in "from"."""
        for path in sorted(self.path.parent.glob("*.jsonl")):
            for record in Results(path).read().values() if path != self.path else ():
                if record["key"] == key:
                    return {"from": path.stem, **record}
        return None

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, whole or not at all; several processes may."""
        with locked(self.path.parent):
            # A line that is damaged must not swallow the next one.
            lines = [*read_lines(self.path), record]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))


@functools.cache
def provenance() -> dict[str, Any]:
    """Commit, versions, and what was run on."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        told = [*git, "describe", "--always", "--exclude=*"]
        commit = subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
        # A table's own results do not change what the next ones are made by.
        changed = [*git, "diff", "--quiet", "HEAD", "--", ":!bench/results", ":!bench/reports"]
        commit += "-dirty" if subprocess.run(changed).returncode else ""
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("LINMU_COMMIT", "unknown")
    versions = {name: version(name) for name in ("torch", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"commit": commit, "versions": {"python": platform.python_version(), **versions}, "device": device}


# -- one run ---------------------------------------------------------------------------------------------------------


def score(table: Table, run: Run, after: int | None, model: PreTrainedModel) -> dict[str, Any]:
    """Exact match and distance to the teacher on held-out samples, the same for every model: the teacher (None), or
    what stage `after` of the run left."""
    from .data import Processor, generate
    from .evaluation import evaluate

    options, counts = run.config.evaluation, run.config.evaluation.counts(final=True)

    def told(group: str, samples: int, more: dict[str, Any]) -> dict[str, Any]:
        with run.accelerator.autocast():
            result = evaluate(model, run.tokenizer, group, samples, options.seed, **more)
        right = "".join(str(int(hit)) for hit in result.hits)
        return {"n": result.n, "accuracy": result.accuracy, "interval": result.interval, "right": right}

    scores: dict[str, Any] = {}
    for group, samples in counts.items():
        more = options.options.get(group, {})
        scores[group] = told(group, samples, more)
        if table.config.held_out:
            processor = Processor.from_config(run.teacher.config, run.tokenizer)
            chosen = generate(group, table.config.held_out, options.seed, "test", **more)
            size = 2 if group == "needle" else 16
            batches = [processor(chosen[i : i + size]) for i in range(0, len(chosen), size)]
            with run.accelerator.autocast():
                scores[group] |= held_out.measure(model, run.teacher, batches, run.config.losses.chunk_size)
    if options.held_out is not None:
        scores["held_out"] = run.measure_held_out(after, model)
    curves = {
        name: [
            {"value": value, **told(curve.group, curve.samples, {**options.options.get(curve.group, {}),
                                                                 curve.option: value})}
            for value in curve.values
        ]
        for name, curve in table.config.curves.items()
    }  # fmt: skip
    return {"scores": scores, **({"curves": curves} if curves else {})}


def _claim(table: Table, row: Row, seed: int) -> Config:
    """The configuration of a run whose folder is its own.

    Raises:
        RunError: the folder holds a run with other options.
    """
    config = table.run_config(row, seed)
    path = config.folder / "config.json"
    facts = config.model_dump(mode="json", exclude={"threads", "checkpoints", "evaluation"})
    if known := read_json(path):
        if known != json.loads(json.dumps(facts)):
            raise RunError(f"{config.folder} holds a run with other options; delete it, or rename the row")
    else:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(facts, indent=1))
    return config


def _start(config: Config) -> Run:
    run = Run(config)
    if (processes := run.accelerator.num_processes) > 1:
        raise RunError(f"a table runs in one process, got {processes}; start several to use more")
    return run


def train_and_score(table: Table, row: Row, seed: int, looks: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Train one run from wherever it stopped; the records of `looks`, which are the row or looks at its stages."""
    run = _start(_claim(table, row, seed))
    if not run.is_finished(len(STAGES)):
        run.check_stages()
    run.prepare()
    for stage in STAGES:
        if not run.is_finished(stage.number):
            run.train(stage.number)
    for look in looks:
        last = len(STAGES) if look.after is None else look.after
        student = run.student_after(last)
        record = {"row": look.name, "seed": seed, "key": table.key(look, seed), "set": row.set, **provenance()}
        record |= {"parameters": sum(p.numel() for block in student.blocks.values() for p in block.parameters())}
        yield record | _training(run, last) | score(table, run, last, student.model)


def _training(run: Run, last: int) -> dict[str, Any]:
    """What the stages up to `last` cost, and the means of their last losses."""
    steps, tokens, seconds, losses = 0, 0, 0.0, {}
    for number in range(1, last + 1):
        _, facts = handoff.load_result(run.folder, number, run.teacher_hash, run.config, same_config=True)
        if not facts["steps"]:
            continue
        steps += facts["steps"]
        seconds += facts["seconds"]
        tokens += sum(int(record["tokens"]) for record in read_metrics(handoff.stage_folder(run.folder, number)))
        losses[f"stage{number}"] = facts["means"]
    return {"teacher": run.teacher_hash, "steps": steps, "tokens": tokens, "seconds": seconds, "losses": losses}


# -- a table ---------------------------------------------------------------------------------------------------------


def run_table(path: Path, only: Sequence[str] = (), seeds: int | None = None) -> Path:
    """Run what is missing of a table, all rows for one seed and then the next, and write its page; returns its path.

    Processes that are given the same table share its runs: each takes one that no other is at.

    Args:
        only: names of rows; empty: all.
        seeds: the most seeds, instead of the table's own number; a later call may go on to more.

    Raises:
        ConfigError, RunError, and what `distill` raises.
    """
    from .ablation_report import write_page

    table = Table(path)
    chosen = [table.row(name) for name in only] or table.config.rows
    results = Results(Path(table.config.results) / f"{table.name}.jsonl")
    say = functools.partial(Console(stderr=True).print, soft_wrap=True, highlight=False)

    def store(record: dict[str, Any], began: float) -> None:
        results.append(record)
        reports = Path(table.config.reports)
        with locked(reports):
            page = reports / f"{table.name}.md"
            if not page.exists() or time.time() - page.stat().st_mtime > _PAGE_SECONDS:
                write_page(table, results, reports)
        told = ", ".join(f"{group} {found.get('accuracy', found.get('agreement')):.0%}"
                         for group, found in record["scores"].items())  # fmt: skip
        say(f"{table.name}  {record['row']}: {told}  ({time.monotonic() - began:.0f} s)")

    def borrow(row: str, key: str, **facts: Any) -> None:
        """Tables share rows: the same run is not made twice."""
        if (row, key) not in results.read() and (record := results.of_other_tables(key)):
            store({**record, "row": row, **facts}, time.monotonic())

    def do(seed: int, row: Row) -> bool:
        """Whether it is done now; False: another process is at it."""
        of = row if row.of is None else table.row(row.of)
        looks = [look for look in chosen if look is of or look.of == of.name]
        for look in looks:
            borrow(look.name, table.key(look, seed), set=look.set)

        def missing() -> list[Row]:
            known = results.read()
            return [look for look in looks if (look.name, table.key(look, seed)) not in known]

        if row not in missing():
            return True
        with locked(table.run_config(of, seed).folder, wait=False) as mine:
            if mine and row in (wanted := missing()):
                began = time.monotonic()
                say(f"[bold]{table.name}  {of.name}, seed {seed}[/]")
                for record in train_and_score(table, of, seed, wanted):
                    store(record, began)
        return mine

    borrow(TEACHER, table.teacher_key)
    with locked(table.first.folder.parents[1] / TEACHER, wait=False) as mine:
        if mine and (TEACHER, table.teacher_key) not in results.read():
            began, run = time.monotonic(), _start(table.first)
            facts = {"row": TEACHER, "seed": None, "key": table.teacher_key, "teacher": run.teacher_hash}
            store(facts | provenance() | score(table, run, None, run.teacher), began)
    # What another process is at is come back to: it may have been stopped by then.
    left = [(seed, row) for seed in range(table.config.seeds if seeds is None else seeds) for row in chosen]
    before = len(left) + 1
    while left and len(left) < before:
        before = len(left)
        left = [(seed, row) for seed, row in left if not do(seed, row)]
    if left:
        told = ", ".join(f"{row.name} {seed}" for seed, row in left)
        say(f"{table.name}  other processes are at: {told}")
    with locked(Path(table.config.reports)):
        return write_page(table, results, Path(table.config.reports))
