"""The console command `linmu`. Heavy imports stay inside the commands."""

from __future__ import annotations

import runpy
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
except ImportError as e:
    sys.exit(f"linmu: {e}: pip install 'linmu[distill]' (`python -m linmu_ops.env` does without)")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
OPTION_HELP = 'name=value of the block\'s options, e.g. "text_window=16"; "preset=paper" for the paper\'s block.'
DEVICE_HELP = "cpu, cuda, cuda:1, ...; a GPU if there is one."


@app.callback()
def _linmu() -> None:
    """LinMU: linear-attention ops and models."""


@app.command()
def env(json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions and binaries, and try every op and implementation."""
    # By path, because importing the package would already need a torch that works.
    spec = find_spec("linmu_ops")
    assert spec is not None and spec.origin is not None
    run = runpy.run_path(spec.origin.replace("__init__.py", "env.py"))["main"]
    raise typer.Exit(run(["--json"] if json else []))


@app.command()
def convert(
    teacher: Annotated[str, typer.Argument(help="Folder of a transformers model, or its name on the hub.")],
    out: Annotated[str, typer.Argument(help="Folder to save the linear model in.")],
    keep_attention: Annotated[list[int] | None, typer.Option(help="A layer that stays quadratic; repeatable.")] = None,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16, ...")] = "auto",
) -> None:
    """Make a model linear, untrained; prints where each tensor comes from."""
    import json

    from rich.console import Console
    from safetensors import SafetensorError

    from linmu_models.generate import convert_folder

    options = {}
    for item in option or ():
        name, _, value = item.partition("=")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    try:
        with Console(stderr=True).status(f"making {teacher} linear"):
            report = convert_folder(teacher, out, options, keep_attention or (), dtype)
        typer.echo(report)
    except (ValueError, OSError, SafetensorError) as error:
        _stop(error)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder of a model, linear or not, with its processor.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image file; repeatable.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video file; repeatable.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video, at most.")] = 64,
    fps: Annotated[float, typer.Option(min=0.001, help="Frames of a second of video.")] = 2.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: the most likely token.")] = 0.0,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16, ...")] = "auto",
) -> None:
    """Answer a prompt about images and videos, word by word; how fast, and what is remembered, go to stderr."""
    from rich.console import Console
    from safetensors import SafetensorError

    from distill.progress import peak_memory
    from linmu_models.generate import generate_text, load

    if 0 < temperature < 1e-3:
        _stop(f"--temperature must be 0, or at least 0.001, got {temperature}")
    # What Pillow warns of in a file is either seen all the same or refused in one line.
    warnings.filterwarnings("ignore", module="PIL")
    say = Console(stderr=True, highlight=False)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    try:
        with say.status(f"loading {model}"):
            loaded = load(model, device, dtype)
        answer = generate_text(
            *loaded, prompt, image or (), video or (), frames=frames, fps=fps, max_new_tokens=max_new_tokens,
            stream=lambda text: typer.echo(text, nl=False), **sampling,
        )  # fmt: skip
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        _stop(error)
    typer.echo()
    rate = "" if answer.tokens_per_second is None else f", then {answer.tokens_per_second:.1f} tokens/s"
    say.print(
        f"{answer.prompt_tokens} tokens in, {answer.tokens} out; first after {answer.first_token_seconds:.2f} s{rate}; "
        f"state {answer.cache_bytes / 2**20:.2f} MiB, process {peak_memory() / 2**30:.2f} GiB at most",
        soft_wrap=True,
    )


@app.command()
def distill(
    config: Annotated[Path, typer.Argument(help="A TOML file; see distill/README.md.")],
    stage: Annotated[int | None, typer.Option(help="Run this stage only: 1, 2 or 3.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    ablate: Annotated[bool, typer.Option("--ablate", help="CONFIG is a table of runs; it goes on by itself.")] = False,
    row: Annotated[list[str] | None, typer.Option(help="With --ablate: only this row; may be repeated.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="With --ablate: so many seeds.")] = None,
) -> None:
    """Make a teacher linear: convert it, train the student in three stages, write a report."""
    from distill.checkpoint import CheckpointError
    from distill.config import ConfigError, load_config

    if ablate and stage is not None:
        _stop("--stage is for one run, not for --ablate")
    if not ablate and (row or seeds):
        _stop("--row and --seeds need --ablate")
    try:
        settings = None if ablate else load_config(config)
        from distill.ablation import run_table
        from distill.handoff import HandoffError
        from distill.run import RunError
        from distill.run import distill as run
        from distill.train import Interrupted, TrainingError
    except ConfigError as error:
        _stop(error)
    from distill.data.records import DataError

    try:
        report = run_table(config, row or (), seeds) if settings is None else run(settings, stage, resume)
    except (ConfigError, RunError, HandoffError, DataError, TrainingError, CheckpointError, OSError) as error:
        _stop(error)
    except Interrupted as error:
        _stop(error, 130)
    except KeyboardInterrupt:
        _stop("stopped; go on with --resume", 130)
    if report is not None:
        typer.echo(f"report: {report}")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A model's folder, or that of a finished run.")],
    teacher: Annotated[str | None, typer.Option(help="A model beside it; for a run: its own teacher.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task group.")] = 200,
    group: Annotated[list[str] | None, typer.Option(help="Only this task group; may be repeated.")] = None,
    split: Annotated[str, typer.Option(help="test, or test_font: a font that training never showed.")] = "test",
    seed: Annotated[int, typer.Option(min=0)] = 2024,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
) -> None:
    """Exact match on the built-in tasks with 95 % intervals, beside the teacher's."""
    from safetensors import SafetensorError

    from distill.evaluate import EvaluationError, evaluate_folder

    try:
        typer.echo(evaluate_folder(folder, teacher, samples, group, split, seed, device))
    except (EvaluationError, OSError, ValueError, SafetensorError) as error:
        _stop(error)


def _stop(error: Exception | str, status: int = 1) -> NoReturn:
    # Other libraries explain at length, and over many lines, what we say in one.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    ours = isinstance(error, str) or type(error).__module__.partition(".")[0] in ("distill", "linmu_models")
    said = "\n".join(lines) if ours else lines[0]
    typer.echo(f"linmu: {said.removeprefix('linmu: ')}", err=True)
    raise typer.Exit(status)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
