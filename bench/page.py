"""`python -m bench.page cpu`: a device's pages, of ops bench/reports/<device>.md and of models bench/reports/
<device>_models.md, and their plots, from the rows there are."""

from __future__ import annotations

import sys
from pathlib import Path

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
    of_models_too = target.with_name(f"{device}_models.md")
    head = [
        "",
        "Written from `bench/results`; the method is in `bench/README.md`. Each row of those files "
        "names its commit, versions and clock.",
        "",
        f"{first['threads']} threads, instruction set {first['isa']}; "
        + ", ".join(f"{k} {v}" for k, v in first["versions"].items())
        + f". Clock {first['clock']}.",
        "",
    ]  # fmt: skip
    title = f"# Measured on {first['device']}"
    lines, lines_of_models = [title, *head], [f"{title}: models", *head]
    if of_models:
        lines += [f"Models are on [a page of their own]({of_models_too.name}).", ""]
    for op, rows in by_op.items():
        lines += report.section(op, rows, target)
    for name, rows in of_models.items():
        lines_of_models += models.section(name, rows, target)
    for page, text in ((target, lines), (of_models_too, lines_of_models if of_models else [])):
        if text:
            page.write_text("\n".join(text).rstrip() + "\n")
    return target


if __name__ == "__main__":
    print(write(*sys.argv[1:]))
