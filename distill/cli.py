"""The commands `linmu distill`, `answers`, `plan` and `evaluate`. What takes long to import is imported inside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linmu_models.cli import DEVICE_HELP, stop

if TYPE_CHECKING:
    from .config import Config


def _settings(config: Path) -> Config:
    """What a TOML file says. A mistake in it ends the command."""
    with _needs_extra():
        from .config import ConfigError, load_config

    try:
        return load_config(config)
    except ConfigError as error:
        stop(error)


def distill(
    config: Annotated[Path, typer.Argument(help="A TOML file; see distill/README.md.")],
    stage: Annotated[int | None, typer.Option(help="Run this stage only: 1, 2 or 3.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
) -> None:
    """Make a teacher linear: convert it, train the student in three stages, write a report."""
    settings = _settings(config)
    with _needs_extra():
        from .checkpoint import CheckpointError
        from .config import ConfigError
        from .data.records import DataError
        from .handoff import HandoffError
        from .objective import TrainingError
        from .run import RunError
        from .run import distill as run
        from .train import Interrupted

    try:
        with _of_others("go on with --resume"):
            report = run(settings, stage, resume)
    except (ConfigError, RunError, HandoffError, DataError, TrainingError, CheckpointError, OSError) as error:
        stop(error)
    except Interrupted as error:
        stop(error, 130)
    except KeyboardInterrupt:
        stop("stopped; go on with --resume", 130)
    if report is not None:
        typer.echo(f"report: {report}")


def answers(
    config: Annotated[Path, typer.Argument(help="The TOML file of a run.")],
    processes: Annotated[
        int | None, typer.Option(min=1, max=2**16, help="That will train; as many as decode if left out.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=2**16, help="Samples that are decoded together.")] = 64,
) -> None:
    """Decode the teacher's own answers before stage 3 needs them. Stopped at any instant, it goes on from there."""
    settings = _settings(config)
    with _needs_extra():
        from .answers import decode_ahead
        from .data.records import DataError
        from .run import RunError

    try:
        with _of_others("the same command goes on"):
            line = decode_ahead(settings, processes, batch)
    except (RunError, DataError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        stop("stopped; the same command goes on", 130)
    typer.echo(line)


def plan(
    config: Annotated[Path, typer.Argument(help="The TOML file of a run.")],
    gpus: Annotated[int, typer.Option(min=1, max=2**20, help="Processes, one on each.")] = 1,
    memory: Annotated[float, typer.Option(min=0, max=1e6, help="Of a GPU, in GB.")] = 80.0,
    tflops: Annotated[float, typer.Option(min=0.001, max=1e6, help="Of a GPU, in the run's precision.")] = 312.0,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="That training gets of them.")] = 0.5,
) -> None:
    """What each GPU will hold in each stage, and for how long. Nothing is loaded; status 1 where it cannot fit."""
    settings = _settings(config)
    with _needs_extra():
        from . import plan as planner
        from .config import ConfigError

    try:
        stages = planner.plan(settings, gpus)
    except (ConfigError, planner.PlanError, ValueError) as error:
        stop(error)
    typer.echo(planner.table(settings, stages, gpus, memory, tflops, share))
    if not all(planner.fits(row, memory) for row in stages):
        raise typer.Exit(1)


def evaluate(
    folder: Annotated[Path, typer.Argument(help="A model's folder, or that of a finished run.")],
    teacher: Annotated[str | None, typer.Option(help="A model beside it; for a run: its own teacher.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=10**9, help="Samples of each task group.")] = 200,
    group: Annotated[list[str] | None, typer.Option(help="Only this task group; may be repeated.")] = None,
    split: Annotated[
        str, typer.Option(help="val; test, on which no option was chosen; val_font, test_font: in an unseen font.")
    ] = "val",
    seed: Annotated[int, typer.Option(min=0)] = 2024,
    frames: Annotated[list[int] | None, typer.Option(min=2, help="Of long videos; may be repeated.")] = None,
    keys: Annotated[list[int] | None, typer.Option(min=1, help="Of `needles`; may be repeated.")] = None,
    hops: Annotated[list[int] | None, typer.Option(min=1, help="Of `tracking`; may be repeated.")] = None,
    chains: Annotated[list[int] | None, typer.Option(min=1, help="Of `tracking`; may be repeated.")] = None,
    lines: Annotated[list[int] | None, typer.Option(min=1, help="Of a page; may be repeated.")] = None,
    rows: Annotated[
        bool, typer.Option("--rows", help="Also a teacher of equal memory, windows alone, near + kept, zero steps.")
    ] = False,
    depths: Annotated[int, typer.Option(min=0, max=100, help="Also by where the answer lies, in so many parts.")] = 0,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
) -> None:
    """Exact match on the built-in tasks with 95 % intervals, beside the teacher's."""
    with _needs_extra():
        from safetensors import SafetensorError

        from .evaluate import EvaluationError, evaluate_folder

    options: dict[str, list[Any]] = {
        "frames": [(count, count) for count in frames or ()],
        "keys": keys or [],
        "hops": hops or [],
        "chains": chains or [],
        "sizes": [((count, 8),) for count in lines or ()],
    }
    try:
        table = evaluate_folder(
            folder, teacher, samples, group, split, seed, device, options=options, rows=rows, depths=depths
        )
    except (EvaluationError, OSError, ValueError, SafetensorError) as error:
        stop(error)
    typer.echo(table)


@contextmanager
def _of_others(advice: str) -> Iterator[None]:
    """Where another process has ended, this one ends with one line: the reason is in that one's."""
    from .parallel import is_of_another

    try:
        yield
    except RuntimeError as error:
        if not is_of_another(error):
            raise
        stop(f"another process of this run has ended, or does not answer; its own last line says why; {advice}")


@contextmanager
def _needs_extra() -> Iterator[None]:
    """What is imported here comes with the extra `distill`."""
    try:
        yield
    except ModuleNotFoundError as error:
        stop(f"{error}: pip install 'linmu[distill]'")
