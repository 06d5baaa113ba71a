"""`python -m bench.page cpu`: a device's page, bench/reports/<device>.md, and its plots, from the rows there are."""

from __future__ import annotations

import sys
from pathlib import Path

from . import report
from .models import report as models


def write(device: str) -> Path:
    """bench/reports/<device>.md of every result there is, with the plots beside it.

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
    lines = [
        f"# Measured on {first['device']}",
        "",
        "Written from `bench/results`; the method is in `bench/README.md`. Each row of those files "
        "names its commit, versions and clock.",
        "",
        f"{first['threads']} threads, instruction set {first['isa']}; "
        + ", ".join(f"{k} {v}" for k, v in first["versions"].items())
        + f". Clock {first['clock']}.",
        "",
    ]  # fmt: skip
    for op, rows in by_op.items():
        lines += report.section(op, rows, target)
    for name, rows in of_models.items():
        lines += models.section(name, rows, target)
    target.write_text("\n".join(lines).rstrip() + "\n")
    return target


if __name__ == "__main__":
    print(write(*sys.argv[1:]))
