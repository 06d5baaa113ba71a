"""Tables of text: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def plain(head: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> list[str]:
    """Lines of a table for a terminal, the head first.

    Args:
        left: so many columns are set flush left, the others flush right; all flush left if left out.
    """
    cells = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    flush = [str.ljust if left is None or i < left else str.rjust for i in range(len(head))]
    return ["  ".join(set_(c, w) for set_, c, w in zip(flush, row, widths, strict=True)).rstrip() for row in cells]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> str:
    """A table in Markdown; `left` as in `plain`."""
    rule = "|".join("---" if left is None or i < left else "---:" for i in range(len(head)))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])
