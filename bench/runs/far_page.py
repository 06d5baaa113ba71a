"""The page of `far`: tables by group and split, from the lines there are."""

from pathlib import Path
from typing import Any

import numpy as np

from linmu_distill.data import GROUPS
from linmu_distill.evaluate import Asked, tell
from linmu_distill.limited import EQUAL_MEMORY
from linmu_distill.run import TEACHER
from linmu_distill.student import ALONE
from linmu_ops._tables import markdown

from .page import Interval, accuracy, difference
from .sheet import told, write_sheet
from .table import Results

WINDOWS, NEAR_KEPT = ALONE
ZERO, TRAINED = "zero steps", "trained"
ROWS = {
    TEACHER: "attention to every token",
    EQUAL_MEMORY: "the teacher, whose cache holds its first 4 tokens and the last ones: as many bytes as the student",
    WINDOWS: "windows and sinks",
    NEAR_KEPT: "windows, sinks and kept tokens, without a scan",
    ZERO: "the student as converted and calibrated",
    TRAINED: "the student after three stages of `demo.toml`",
}
CHANGED = {
    "near + 256 kept": "*near + kept* with twice as many kept tokens as it was converted with",
    "near + 1024 kept": "*near + kept* with eight times as many",
    "trained, 256 kept": "*trained* with twice as many kept tokens, and no step more",
    "trained, far less by 2 nats": "*trained* with a seventh of the share of what is far",
    "trained, far more by 2 nats": "*trained* with seven times that share, as far as there is room",
    "trained, no far_limit": "*trained*, in which what is far gains weight with its number without end",
}
"""Rows that look for what stands in the way; asked for by name."""
DEPTHS = 4  # parts of a video
HEADS = {
    "needle": "One needle",
    "needles": "The digit by one of many keys",
    "tracking": "The end of a chain of assignments",
    "page": "A line of a long page",
}
SPLITS = {
    "test": "The split `test`, on which no option was chosen",
    "val": "The split `val`, on which options were chosen",
}

Lines = list[dict[str, Any]]
Hits = dict[int, dict[int, float]]
"""Seed -> question -> 1 if it was answered right, or 0."""


def _hits(lines: Lines) -> Hits:
    """The answers of one row in one cell; those of a part that was asked twice are the last."""
    hits: Hits = {}
    for line in lines:
        first = line.get("first", 0)
        hits.setdefault(line["seed"], {}).update({first + i: float(hit) for i, hit in enumerate(line["right"])})
    return hits


def _array(hits: Hits, among: Hits | None = None) -> np.ndarray:
    """(seeds, questions) of what all seeds were asked, and all of `among` too."""
    common = set.intersection(*(set(one) for rows in (hits, among or {}) for one in rows.values()))
    return np.array([[one[i] for i in sorted(common)] for _, one in sorted(hits.items())])


def ratio(ours: np.ndarray, theirs: np.ndarray) -> Interval | None:
    """A student's right answers by the teacher's, and the interval to first order (the delta method).

    Args:
        ours: (seeds, questions).
        theirs: (1, questions), the same ones.

    Returns:
        The ratio of their means and its interval; None where the teacher has no right answer.
    """
    if not theirs.any():
        return None
    found = float(ours.mean() / theirs.mean())
    _, low, high = difference([ours], [found * theirs])
    return found, max(0.0, found + low / theirs.mean()), found + high / theirs.mean()


class _Cells:
    """The lines of a group and a split, by head of a table, column and row."""

    def __init__(self, lines: Lines) -> None:
        self.by: dict[tuple[str, str], dict[str, Hits]] = {}
        sorted_lines: dict[tuple[str, str, str], Lines] = {}
        for line in lines:
            options = dict(line["options"])
            across = (
                f"{options.pop('frames')[0]} frames" if "frames" in options
                else f"{options.pop('sizes')[0][0]} lines" if "sizes" in options else line["group"]
            )  # fmt: skip
            head = ", ".join(tell(name, value) for name, value in options.items())
            sorted_lines.setdefault((head, across, line["row"]), []).append(line)
        for (head, across, row), mine in sorted_lines.items():
            self.by.setdefault((head, across), {})[row] = _hits(mine)

    def heads(self) -> list[str]:
        return sorted({head for head, _ in self.by}, key=_numbers)

    def columns(self, head: str) -> list[str]:
        columns = [across for mine, across in self.by if mine == head]
        order = list(GROUPS)
        return sorted(columns, key=lambda one: order.index(one) if one in order else _numbers(one)[0])

    def count(self, head: str, column: str) -> int:
        """The most questions that a row of the column was asked."""
        return max(_array(hits).shape[1] for hits in self.by[head, column].values())


def _numbers(told_: str) -> list[int]:
    return [int(word) for word in told_.split() if word.isdigit()]


def _by_seed(every: list[Hits]) -> list[tuple[str, list[Hits]]]:
    """A row's cells, whole and, where it has several seeds, seed by seed: (what to add to its name, cells)."""
    seeds = sorted({seed for hits in every for seed in hits})
    each = [(f", seed {seed}", [{seed: hits[seed]} if seed in hits else {} for hits in every]) for seed in seeds]
    return [("", every), *(each if len(each) > 1 else [])]


def _shares(cells: _Cells, head: str) -> str:
    """Each row's share of right answers."""
    columns = cells.columns(head)
    most = [cells.count(head, column) for column in columns]

    def cell(hits: Hits, count: int) -> str:
        if not hits:
            return "-"
        found = _array(hits)
        more = f", {len(found)} seeds" if len(found) > 1 else ""
        return told(accuracy([found]), more + (f", n = {found.shape[1]}" if found.shape[1] < count else ""))

    body = [
        [row + named, *map(cell, every, most)]
        for row in ROWS | CHANGED
        for named, every in _by_seed([cells.by[head, column].get(row, {}) for column in columns])
        if any(every)
    ]
    return markdown(["row", *(f"{column} (n = {n})" for column, n in zip(columns, most, strict=True))], body)


def _ratios(cells: _Cells, head: str) -> str | None:
    """Each row's right answers by the teacher's, of the same questions."""
    columns = cells.columns(head)
    teachers = [cells.by[head, column].get(TEACHER, {}) for column in columns]

    def cell(hits: Hits, teacher: Hits) -> str:
        found = ratio(_array(hits, teacher), _array(teacher, hits)) if hits and teacher else None
        return told(found) if found else "-"

    body = [
        [row + named, *map(cell, every, teachers)]
        for row in ROWS | CHANGED
        if row != TEACHER
        for named, every in _by_seed([cells.by[head, column].get(row, {}) for column in columns])
    ]
    return _told_rows(columns, body)


def _gains(cells: _Cells, head: str) -> str | None:
    """What a row has more than near and kept tokens, in points, seed by seed and question by question."""
    columns = cells.columns(head)
    bases = [cells.by[head, column].get(NEAR_KEPT, {}) for column in columns]

    def cell(hits: Hits, base: Hits) -> str:
        seeds = sorted(hits.keys() & base.keys())
        if not seeds:
            return "-"
        a, b = ({seed: one[seed] for seed in seeds} for one in (hits, base))
        mean, low, high = (100 * value for value in difference([_array(a, b)], [_array(b, a)]))
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}{f', {len(seeds)} seeds' if len(seeds) > 1 else ''})"

    body = [
        [row + named, *map(cell, every, bases)]
        for row in (ZERO, TRAINED, *CHANGED)
        for named, every in _by_seed([cells.by[head, column].get(row, {}) for column in columns])
    ]
    return _told_rows(columns, body)


def _told_rows(columns: list[str], body: list[list[str]]) -> str | None:
    """A table of the rows that say something; None where none does."""
    body = [line for line in body if set(line[1:]) != {"-"}]
    return markdown(["row", *columns], body) if body else None


def _grid(lines: Lines) -> list[str]:
    """The tables of a group and a split."""
    cells, parts = _Cells(lines), []
    for head in cells.heads():
        parts += [*([f"{head}:", ""] if head else []), _shares(cells, head), ""]
        if table := _ratios(cells, head):
            parts += ["By the teacher's own right answers:", "", table, ""]
        if table := _gains(cells, head):
            parts += [f"Points more than *{NEAR_KEPT}* of the same seeds:", "", table, ""]
    return parts


def _depths(lines: Lines) -> list[str]:
    """Answers about needles by the quarter of the video that they lie in."""
    sums: dict[tuple[str, str], np.ndarray] = {}
    for line in lines:
        if line["group"] in ("needle", "needles"):
            key = (Asked(line["group"], line["options"]).label, line["row"])
            sums[key] = sums.get(key, np.zeros((DEPTHS, 2), dtype=int)) + np.array(line["by_depth"])
    order = list(ROWS | CHANGED)
    every = sorted(sums.items(), key=lambda one: (one[0][0].split(",")[0], _numbers(one[0][0]), order.index(one[0][1])))
    body = [[label, row, *(f"{right} of {n}" for right, n in found)] for (label, row), found in every]
    quarters = [f"{i / DEPTHS:.0%} to {(i + 1) / DEPTHS:.0%}" for i in range(DEPTHS)]
    return [markdown(["task", "row", *quarters], body), ""] if body else []


def _made(lines: Lines, split: str) -> str:
    commits = sorted({f"{line['commit']}{'-dirty' if line.get('dirty') else ''}" for line in lines})
    machines = sorted({f"{line['device']}, {line['isa']}" for line in lines})
    return f"Made by `python -m bench.runs.far --split {split}` at {', '.join(commits)}, on {'; '.join(machines)}."


def write_page(results: Results, folder: Path) -> Path:
    """`folder/far.md`, of all that has been asked."""
    every = list(results.read().values())
    found = [row for row in ROWS | CHANGED if any(line["row"] == row for line in every)]
    parts = [
        "# What is recalled from far away", "",
        "Share of questions answered exactly, and its 95 % interval: Wilson's, or, where there are several seeds, over "
        "questions and seeds. All rows are asked the same n questions. So a ratio to the teacher is "
        "compared question by question. A frame has 32 tokens. A guess at a digit is right in 10 % of cases, the "
        "guess of one of k digits that are seen in 1 / k and a tenth of the rest.", "",
        markdown(["row", "what"], [[row, (ROWS | CHANGED)[row]] for row in found]), "",
    ]  # fmt: skip
    for split, what in SPLITS.items():
        lines = [line for line in every if line["split"] == split]
        if not lines:
            continue
        parts += [f"## {what}", ""]
        near = [line for line in lines if line["group"] not in HEADS]
        for head, mine in (
            *((head, [line for line in lines if line["group"] == group]) for group, head in HEADS.items()),
            ("What lies within the windows", near),
        ):
            if mine:
                parts += [f"### {head}", "", *_grid(mine)]
        if table := _depths(lines):
            parts += ["### By depth", "", "Right answers by the part of the video that the needle is in.", "", *table]
        parts += [_made(lines, split), ""]
    return write_sheet(folder, "far.md", parts)
