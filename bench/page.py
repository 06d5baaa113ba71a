"""`python -m bench.page cpu`: a device's pages, of ops bench/reports/<device>.md and of models bench/reports/
<device>_models.md, and their plots, from the rows there are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import report
from .models import report as models


def write(device: str) -> Path:
    """bench/reports/<device>.md of every result there is, with a page of models and the plots beside it.

    Raises:
        FileNotFoundError: there is none.
    """
    target = report.HERE / "reports" / f"{device}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    by_op = report.read(device)
    of_models = models.read(device)
    first = next((rows[0] for rows in (*by_op.values(), *of_models.values()) if rows), None)
    if first is None:
        raise FileNotFoundError(f"bench: {report.HERE / 'results' / device} must hold results, got none")
    page_of_models = target.with_name(f"{device}_models.md")
    ops = [line for op, rows in by_op.items() for line in report.section(op, rows, target)]
    if of_models:
        ops = [f"Models are on [a page of their own]({page_of_models.name}).", "", *ops]
        sections = [line for name, rows in of_models.items() for line in models.section(name, rows, target)]
        page_of_models.write_text(_page(": models", first, sections))
    target.write_text(_page("", first, ops))
    return target


def _page(title: str, row: dict[str, Any], sections: list[str]) -> str:
    lines = [
        f"# Measured on {row['device']}{title}",
        "",
        "Written from `bench/results`; the method is in `bench/README.md`. Each row of those files "
        "names its commit, versions and clock.",
        "",
        f"{row['threads']} threads, instruction set {row['isa']}; "
        + ", ".join(f"{k} {v}" for k, v in row["versions"].items())
        + f". Clock {row['clock']}.",
        "",
        *sections,
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(write(*sys.argv[1:]))
