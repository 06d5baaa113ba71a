"""Files that a run wrote and reads back. What was cut or damaged since is told in one line, and made anew."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(f"linmu: {line}", file=sys.stderr, flush=True)


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds; an empty `kind`, dict or list, where there is no file, or where it is not a whole one of
    a `kind`, which is said in a line."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return kind()
    except (ValueError, RecursionError) as error:
        why = str(error)
    else:
        if isinstance(found, kind):
            return found
        why = f"it must hold a {kind.__name__}, got a {type(found).__name__}"
    say(f"{path} is damaged and made anew ({why})")
    return kind()


def read_lines(path: Path, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no file. Lines that are cut, or lack one of the keys `needs`,
    are left out, which is said in a line."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    whole = [record for record in map(_object, lines) if record is not None and all(key in record for key in needs)]
    if lost := len(lines) - len(whole):
        say(f"{path}: {lost} of {len(lines)} lines are damaged and left out")
    return whole


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
