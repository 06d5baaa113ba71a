"""The console command `linmu`. What takes long to import is imported inside the commands.

Other packages add commands by entry points of the group `linmu.commands`: a command's name, and its function.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from typer.core import TyperGroup
except ImportError as e:
    sys.exit(f"linmu: {e}: pip install 'linmu[models]' (`python -m linmu_ops.env` does without)")
except KeyboardInterrupt:
    sys.exit(130)

from .words import shown, waiting

OURS = ("linmu_models", "linmu_distill")
OF_DISTILL = ("distill", "answers", "plan", "evaluate")  # named in `linmu --help`, installed or not
OPTION_HELP = 'name=value of the block\'s options, e.g. "text_window=16"; "preset=paper" for the paper\'s block.'
MOST = 2**31 - 1  # tokens; what libraries count in 32 bits
DEVICE_HELP = "cpu, cuda, cuda:1, ...; a GPU if there is one."


def _added() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="linmu.commands")}


class Commands(TyperGroup):
    """Our own commands, then those that other packages add. What may end any of them, at any place, has one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            stop("stopped; nothing is left half done", 130)
        except ModuleNotFoundError as error:
            stop(f"{error}: pip install 'linmu[models]'")
        except Exception as error:
            if _is_of_memory(error):
                stop(f"this takes more memory than there is: {first_line(error)}")
            # The import of linmu_ops reads the variables.
            if isinstance(error, ValueError) and str(error).startswith("LINMU_"):
                stop(error)
            raise

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return [*own, *(name for name in dict.fromkeys([*OF_DISTILL, *sorted(_added())]) if name not in own)]

    def get_command(self, ctx: Any, name: str) -> Any:
        own = super().get_command(ctx, name)
        if own is not None:
            return own
        point = _added().get(name)
        if point is None and name not in OF_DISTILL:
            return None
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        try:
            if point is None:
                raise ImportError("this installation has no linmu_distill, or is older than its files")
            alone.command(name)(point.load())
        except ImportError as error:
            alone.command(name, context_settings=ANYTHING)(_missing(name, error))
        return typer.main.get_command(alone)


def _is_of_memory(error: Exception) -> bool:
    """NumPy's, or PyTorch's of a GPU or a CPU."""
    words = str(error)
    return (
        isinstance(error, MemoryError) or "OutOfMemoryError" in type(error).__name__ or "DefaultCPUAllocator" in words
    )


ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True}


def _missing(name: str, error: ImportError) -> Callable[[], None]:
    install = "pip install 'linmu[distill]', or `make setup` in a checkout"
    said = f"`linmu {name}` cannot be loaded: {error}: {install}"

    def missing() -> None:
        stop(said)

    missing.__doc__ = f"Not available: {error}."
    return missing


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _linmu() -> None:
    """LinMU: linear-attention ops and models."""


@app.command()
def env(json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions and binaries, and try every op and implementation."""
    from linmu_ops.env import main as run

    raise typer.Exit(run(["--json"] if json else []))


@app.command()
def families() -> None:
    """List the model types that can be converted, and transformers' others for images and text: why they cannot."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as THEIRS

    from linmu_ops._tables import plain

    from ._api import families as known
    from .adapters.checked import CHECKED

    def generic(name: str) -> str:
        why = CHECKED.get(name)
        return "generic (checked when converted)" if why is None else f"refused: {why}" if why else "generic (checked)"

    ours = known()
    rows = [(name, "images and text" if name in THEIRS else "text", "adapter") for name in ours]
    rows += [(name, "images and text", generic(name)) for name in sorted(THEIRS) if name not in ours]
    typer.echo("\n".join(plain(["model type", "takes", "conversion"], rows)))


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

    from safetensors import SafetensorError

    from .generate import convert_folder

    options = {}
    for item in option or ():
        name, _, value = item.partition("=")
        if name in options:
            stop(f"--option must be given once for each name, got {name} again")
        try:
            options[name] = json.loads(value)
        except ValueError:  # words, or a number of thousands of digits
            options[name] = value
        except RecursionError:
            stop(f"--option must not nest so deep, got {name}={value[:20]}...")
    try:
        with waiting(f"making {teacher} linear"):
            report = convert_folder(teacher, out, options, keep_attention or (), dtype)
        typer.echo(report)
    except (ValueError, OSError, SafetensorError) as error:
        stop(error)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder of a model, linear or not, with its processor.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image file; repeatable.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video file; repeatable.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video, at most.")] = 64,
    fps: Annotated[float, typer.Option(min=0.001, help="Frames of a second of video.")] = 2.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST)] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: the most likely token.")] = 0.0,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16, ...")] = "auto",
    weights: Annotated[
        str, typer.Option(help="float (of that dtype), or int8: faster large models on a CPU.")
    ] = "float",
    prefill_chunk: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Tokens of the prompt that are read at a time; all if left out.")
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option(help="A file of --save-state: go on with its conversation, which is not read again.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(help="Keep the conversation, and the state after it, in this file.")
    ] = None,
) -> None:
    """Answer a prompt about images and videos, word by word; how fast, and what is remembered, go to stderr."""
    from rich.console import Console
    from safetensors import SafetensorError

    from .generate import generate_text, load, peak_memory

    if 0 < temperature < 1e-3:
        stop(f"--temperature must be 0, or at least 0.001, got {temperature}")
    # What Pillow warns of in a file is either seen all the same or refused in one line.
    warnings.filterwarnings("ignore", module="PIL")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    try:
        with waiting(f"loading {model}"):
            loaded = load(model, device, dtype, weights)
        answer = generate_text(
            *loaded, prompt, image or (), video or (), frames=frames, fps=fps, max_new_tokens=max_new_tokens,
            stream=lambda text: typer.echo(text, nl=False), prefill_chunk_size=prefill_chunk,
            load_state=load_state, save_state=save_state, **sampling,
        )  # fmt: skip
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        stop(error)
    typer.echo()
    rate = "" if answer.tokens_per_second is None else f", then {answer.tokens_per_second:.1f} tokens/s"
    Console(stderr=True, highlight=False).print(
        f"{answer.prompt_tokens} tokens in, {answer.tokens} out; first after {answer.first_token_seconds:.2f} s{rate}; "
        f"state {answer.cache_bytes / 2**20:.2f} MiB, process {peak_memory() / 2**30:.2f} GiB at most",
        soft_wrap=True,
    )


@app.command()
def demo(
    student: Annotated[
        str | None,
        typer.Argument(help="Folder of a LinMU model. If left out: that of `make demo`, or the teacher, converted."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder of its teacher, or its name on the hub; the shipped one if left out.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; at any but this one others can use the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    max_upload: Annotated[float, typer.Option(min=0.001, max=1e6, help="MB of a file, at most.")] = 64.0,
    max_pixels: Annotated[
        int, typer.Option(min=1024, max=10**9, help="Read of a picture, or of all frames of a clip together, at most.")
    ] = 2**22,
    folder: Annotated[
        Path | None, typer.Option(help="Keep uploads here; in a temporary folder if left out, deleted at the end.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST)] = 256,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16, ...")] = "auto",
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Show the page in a browser.")] = False,
) -> None:
    """Try a student beside its teacher, on a page in the browser: words as they come, speed, memory."""
    from safetensors import SafetensorError

    warnings.filterwarnings("ignore", module="PIL")
    try:
        from .demo.command import run
    except ModuleNotFoundError as error:
        stop(f"{error}: pip install 'linmu[demo]'")
    try:
        run(
            student, teacher, host=host, port=port, max_bytes=int(max_upload * 2**20), max_pixels=max_pixels,
            folder=folder, max_new_tokens=max_new_tokens, device=device, dtype=dtype, open_page=open_page,
        )  # fmt: skip
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        stop(error)


def first_line(error: Exception | str) -> str:
    """The first line of an error's words; its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stop(error: Exception | str, status: int = 1) -> NoReturn:
    """Say in one line what is wrong, and end the command. An error that has `lines`, one for each mistake, has more."""
    # Other libraries explain at length, and over many lines, what we say in one.
    ours = isinstance(error, str) or type(error).__module__.partition(".")[0] in OURS
    lines = getattr(error, "lines", None) or [str(error).strip() if ours and str(error).strip() else first_line(error)]
    for line in lines:
        typer.echo(f"linmu: {shown(line.removeprefix('linmu: '))}", err=True)
    raise typer.Exit(status)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
