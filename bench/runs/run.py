"""`python -m bench.runs.run TABLE`: runs that differ in a few options, with several seeds, scored on the same samples.

A table goes on where it stopped: what is in its results, or in those of a table beside it, is not run again, and a run
that was cut short is resumed.
"""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import PreTrainedModel

from bench.provenance import where
from linmu_distill import handoff, held_out
from linmu_distill.checkpoint import CheckpointError, write_atomically
from linmu_distill.config import EVALUATION_SEED, Config, ConfigError
from linmu_distill.data import Processor, generate
from linmu_distill.data.records import DataError
from linmu_distill.evaluation import evaluate
from linmu_distill.files import read_json
from linmu_distill.handoff import HandoffError
from linmu_distill.limited import EQUAL_MEMORY, equal_tokens, limited
from linmu_distill.objective import TrainingError
from linmu_distill.report import read_metrics
from linmu_distill.run import TEACHER, Run, RunError
from linmu_distill.stages import STAGES
from linmu_distill.student import exact_alone
from linmu_distill.train import Interrupted
from linmu_models.cli import stop
from linmu_models.saving import locked

from .page import write_page
from .rivals import RivalRun
from .table import Results, Row, Table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_PAGE_SECONDS = 15.0  # many processes do not write a page more often


def score(
    table: Table,
    run: Run,
    after: int | None,
    model: PreTrainedModel,
    alone: str | None = None,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Exact match and distance to the teacher on held-out samples, the same for every model: the teacher (None), or
    what stage `after` of the run left.

    Args:
        alone: what a part of it is called.
        tokens: of so many alone the model's attention keeps keys and values.
    """
    options, counts = run.config.evaluation, run.config.evaluation.counts(final=True)

    def told(group: str, samples: int, more: dict[str, Any]) -> dict[str, Any]:
        with run.accelerator.autocast(), limited(model, tokens) if tokens else nullcontext():
            result = evaluate(model, run.tokenizer, group, samples, EVALUATION_SEED, **more)
        right = "".join(str(int(hit)) for hit in result.hits)
        return {"n": result.n, "accuracy": result.accuracy, "interval": result.interval, "right": right}

    scores: dict[str, Any] = {}
    frames = table.config.needle_frames
    asked: dict[str, dict[str, Any]] = {"needle": {"frames": (frames, frames)}}
    for group, samples in counts.items():
        more = asked.get(group, {})
        scores[group] = told(group, samples, more)
        if table.config.held_out:
            processor = Processor.from_config(run.teacher.config, run.tokenizer)
            chosen = generate(group, table.config.held_out, EVALUATION_SEED, "val", **more)
            size = 2 if group == "needle" else 16
            batches = [processor(chosen[i : i + size]) for i in range(0, len(chosen), size)]
            with run.accelerator.autocast():
                scores[group] |= held_out.measure(model, run.teacher, batches, tokens=tokens)
    if options.held_out is not None:
        scores["held_out"] = run.measure_held_out(after, model, alone, tokens)
    curves = {
        name: [
            {"value": value, **told(curve.group, curve.samples, {**asked.get(curve.group, {}),
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
    facts = config.model_dump(mode="json", exclude={"checkpoint_every", "evaluation"})
    facts |= row.own
    if known := read_json(path):
        if known != json.loads(json.dumps(facts)):
            raise RunError(f"{config.folder} holds a run with other options; delete it, or rename the row")
    else:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(facts, indent=1))
    return config


def _start(config: Config, row: Row | None = None) -> Run:
    run = Run(config) if row is None or not row.own else RivalRun(config, row)
    if (processes := run.accelerator.num_processes) > 1:
        raise RunError(f"a table runs in one process, got {processes}; start several to use more")
    return run


def train_and_score(table: Table, row: Row, seed: int, looks: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Train one run from wherever it stopped; the records of `looks`, which are the row or looks at its stages."""
    run = _start(_claim(table, row, seed), row)
    if not run.is_finished(len(STAGES)):
        run.check_stages()
    run.prepare()
    for stage in STAGES:
        if not run.is_finished(stage.number):
            run.train(stage.number)
    for look in looks:
        last = len(STAGES) if look.after is None else look.after
        student = run.student_after(last)
        record = {"row": look.name, "seed": seed, "key": table.key(look, seed), "set": row.set, **_where(run)}
        record |= {"parameters": sum(p.numel() for block in student.blocks.values() for p in block.parameters())}
        training = _training(run, last)
        if look.alone == "equal-memory":
            tokens = equal_tokens(run.teacher, student.model, run.tokenizer)
            yield record | training | score(table, run, None, run.teacher, EQUAL_MEMORY, tokens)
        else:
            # Where it is no part, nothing is changed.
            blocks = student.blocks.values() if look.alone else ()
            with exact_alone(blocks, kept=look.alone == "near-kept"):
                yield record | training | score(table, run, last, student.model, look.alone)


def _where(run: Run) -> dict[str, Any]:
    return where(run.accelerator.device.type)


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


def run_table(path: Path, only: Sequence[str] = (), seeds: int | None = None) -> Path:
    """Run what is missing of a table, all rows for one seed and then the next, and write its page; returns its path.

    Processes that are given the same table share its runs: each takes one that no other is at.

    Args:
        only: names of rows; empty: all.
        seeds: the most seeds, instead of the table's own number; a later call may go on to more.

    Raises:
        ConfigError, RunError, and what `linmu_distill.run.distill` raises.
    """
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
            store(facts | _where(run) | score(table, run, None, run.teacher), began)
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


@app.command()
def main(
    table: Annotated[Path, typer.Argument(help="A table of runs: a TOML file as in bench/runs/tables.")],
    row: Annotated[list[str] | None, typer.Option(help="Only this row; may be repeated.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="So many seeds.")] = None,
) -> None:
    """Run what is missing of a table, and write its page."""
    try:
        page = run_table(table, row or (), seeds)
    except (ConfigError, RunError, HandoffError, DataError, TrainingError, CheckpointError, OSError) as error:
        stop(error)
    except Interrupted as error:
        stop(error, 130)
    except KeyboardInterrupt:
        stop("stopped; the same command goes on", 130)
    typer.echo(f"page: {page}")


if __name__ == "__main__":
    app()
