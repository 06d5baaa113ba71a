"""What the pages of questions share: the check of what was asked for, a share with its interval, the file."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import typer

from .page import Interval


def check_named(flag: str, given: Iterable[object] | None, known: Iterable[object]) -> None:
    """Refuse what no table has.

    Raises:
        typer.BadParameter: one of `given` is not among `known`.
    """
    names = [str(one) for one in known]
    if unknown := [str(one) for one in given or () if str(one) not in names]:
        raise typer.BadParameter(f"--{flag} must be among {', '.join(names)}, got {', '.join(unknown)}")


def between(low: float, high: float) -> str:
    """The ends of an interval of a share."""
    return f"{low:.0%}-{high:.0%}"


def told(share: Interval, more: str = "") -> str:
    """A share, its interval, and what else there is to say of it."""
    mean, low, high = share
    return f"{mean:.0%} ({between(low, high)}{more})"


def write_sheet(folder: Path, name: str, parts: Sequence[str]) -> Path:
    """`folder/name` of these lines; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("\n".join(parts))
    return path
