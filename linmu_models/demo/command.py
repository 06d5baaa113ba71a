"""What `linmu demo` does: finds the two models, loads them, and serves the page until it is stopped."""

from __future__ import annotations

import signal
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from typing import Any

from ..words import waiting
from .pair import Pair
from .server import listen, only_here, serve
from .shelf import Example, Shelf

# Of `make demo`, in a checkout.
STUDENT, TEACHER = Path("runs/demo/student"), Path("distill/teachers/tiny")
UNTRAINED = "The student is the teacher, converted a moment ago: it answers alike until its windows are full."


def run(
    student: str | None,
    teacher: str | None,
    *,
    host: str,
    port: int,
    max_bytes: int,
    max_pixels: int,
    folder: Path | None,
    max_new_tokens: int,
    open_page: bool,
    **how: Any,
) -> None:
    """Serve the page until the process is interrupted.

    Raises:
        ValueError, OSError: a model is missing or no model, the port is taken, the folder cannot be written to.
    """
    from rich.console import Console

    say = Console(stderr=True, highlight=False, markup=False)
    student, teacher = find(student, teacher)
    with _ended_by_exit(), listen(host, port) as listening, _uploads(folder) as kept:
        with waiting(f"loading {teacher}" + (f" and {student}" if student else ", and converting it")):
            pair = Pair.load(teacher, student, max_new_tokens, **how)
            pair.warm_up()
            shelf = Shelf(kept, max_bytes, max_pixels, examples(say.print) if pair.takes_media else ())
        address = f"http://{_written(host)}:{listening.getsockname()[1]}"
        if student is None:
            say.print(UNTRAINED, soft_wrap=True)
        say.print(f"The page: {address} (Ctrl-C ends it)", soft_wrap=True)
        if not only_here(host):
            say.print("Whoever reaches this address can use the page, and this machine's processor.", soft_wrap=True)
        if open_page:
            timer = Timer(0.5, webbrowser.open, [address])
            timer.daemon = True
            timer.start()
        with suppress(KeyboardInterrupt):  # the server has ended, and hands it on
            serve(pair, shelf, host, listening)


def find(student: str | None, teacher: str | None) -> tuple[str | None, str]:
    """The folders of student and teacher, where none is named those of `make demo`. A student of None is to be made of
    the teacher: of the one that is named, or of the shipped one where `make demo` has not run.

    Raises:
        ValueError: a student is named without its teacher, or no teacher is there.
    """
    if student is not None:
        if teacher is None:
            raise ValueError("demo: --teacher must be given too, as the page shows both")
        return student, teacher
    if teacher is not None:
        return None, teacher
    if (STUDENT / "config.json").exists():
        return str(STUDENT), str(TEACHER)
    if (TEACHER / "config.json").exists():
        return None, str(TEACHER)
    if package := find_spec("linmu_teacher"):
        return None, next(iter(package.submodule_search_locations or ()))
    raise ValueError(
        "demo: --teacher must be given where no teacher is there: `pip install linmu-teacher` brings a small one, and "
        "a checkout has it"
    )


def examples(say: Callable[[str], None]) -> list[Example]:
    """The pictures and clips of this installation: those of entry points of the group `linmu.examples`.

    Args:
        say: told of one that lacks a package.
    """
    found: list[Example] = []
    for point in entry_points(group="linmu.examples"):
        try:
            made: Callable[[], Iterable[tuple[str, str, Any]]] = point.load()
            found += [Example(*one) for one in made()]
        except ImportError as error:
            say(f"The examples {point.name!r} are left out: {error}")
    return found


@contextmanager
def _ended_by_exit() -> Iterator[None]:
    """While the context is open, the signal to terminate is an exit, so that what is temporary is deleted."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _uploads(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="linmu-demo-", ignore_cleanup_errors=True) as made:
            yield Path(made)
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"demo: --folder must be a folder, or the name of a new one, got {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _written(host: str) -> str:
    return f"[{host}]" if ":" in host else host
