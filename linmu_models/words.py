"""Words of others, such as names of files, on a terminal."""

from typing import Any


def shown(words: str) -> str:
    """Words as one line of a terminal: what would break the line, or steer the terminal, is written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def waiting(what: str) -> Any:
    """A context in which a terminal shows what is being done."""
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(shown(what)))  # a name's brackets are no markup
