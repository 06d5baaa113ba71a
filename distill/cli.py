"""The console command `linmu`. Heavy imports stay inside the commands."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from typing import Annotated

try:
    import typer
except ImportError as e:
    sys.exit(f"linmu: {e}: pip install 'linmu[distill]' (`python -m linmu_ops.env` does without)")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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


def main() -> None:
    app()


if __name__ == "__main__":
    main()
