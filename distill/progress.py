"""What a person sees while a stage trains: a bar on a terminal, lines elsewhere, TensorBoard."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from linmu_models.words import shown

from .stages import Stage

LINE_SECONDS = 15.0


@contextmanager
def telling() -> Iterator[Callable[[str], Callable[[str], None]]]:
    """tell(what)(how_far) says how far what is being done is: beside a spinner on a terminal, elsewhere in a line now
    and then."""
    console = Console(stderr=True, highlight=False)
    last = time.monotonic()
    with console.status("") as status:

        def tell(what: str, how_far: str) -> None:
            nonlocal last
            words = shown(f"{what}: {how_far}")
            status.update(Text(words))
            if not console.is_terminal and time.monotonic() - last > LINE_SECONDS:
                last = time.monotonic()
                console.print(words, markup=False, soft_wrap=True)

        yield lambda what: partial(tell, what)


class Progress:
    """Shows the records of a stage's steps. Use as a context."""

    def __init__(self, stage: Stage, step: int, folder: Path, show: bool) -> None:
        """Start at `step` of `stage`; `show` is False on all processes but the first."""
        self._stage, self._show = stage, show
        self._console = Console(stderr=True)
        self._last_line = time.monotonic()
        self._writer: Any = None
        if not show:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._bar = Bar(
            TextColumn(f"stage {stage.number}  {stage.title}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TextColumn("left"), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=stage.steps, completed=step, note="")

    def __enter__(self) -> "Progress":
        if self._show:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._show:
            self._bar.stop()
            self._writer.close()

    def update(self, record: dict[str, float]) -> None:
        """Show the record of a finished step."""
        if not self._show:
            return
        step = int(record["step"])
        for name, value in record.items():
            if name not in ("step", "seconds"):
                self._writer.add_scalar(name, value, step)
        parts = [f"{name} {record[name]:.3f}" for name in ("loss", *self._stage.losses) if name in record]
        note = f"{'  '.join(parts)}  {record['tokens_per_second']:,.0f} tokens/s  "
        note += f"{record['padding']:.1%} padding  {record['peak_memory_mb']:,.0f} MB"
        self._bar.update(self._task, completed=step, note=note)
        due = time.monotonic() - self._last_line > LINE_SECONDS or step == self._stage.steps
        if not self._console.is_terminal and due:
            self._last_line = time.monotonic()
            left = (self._stage.steps - step) * record["seconds"] / step
            self._console.print(
                f"stage {self._stage.number}  {step}/{self._stage.steps}  {note}  {left:.0f} s left", soft_wrap=True
            )
