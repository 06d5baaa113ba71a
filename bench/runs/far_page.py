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


def _shares(cells: _Cells, head: str) -> str:
    """Each row's share of right answers; a trained row also by seed."""
    columns = cells.columns(head)
    body: list[list[str]] = []
    for row in ROWS | CHANGED:
        every = [cells.by[head, column].get(row) for column in columns]
        if not any(every):
            continue
        seeds = sorted({seed for hits in every if hits for seed in hits})
        line = []
        for column, hits in zip(columns, every, strict=True):
            if not hits:
                line.append("-")
                continue
            found, count = _array(hits), cells.count(head, column)
            more = f", {len(found)} seeds" if len(found) > 1 else ""
            more += f", n = {found.shape[1]}" if found.shape[1] < count else ""
            line.append(told(accuracy([found]), more))
        body.append([row, *line])
        for seed in seeds if row == TRAINED and len(seeds) > 1 else ():
            one = [{seed: hits[seed]} if hits and seed in hits else None for hits in every]
            body.append([f"{row}, seed {seed}", *(told(accuracy([_array(h)])) if h else "-" for h in one)])
    names = [f"{column} (n = {cells.count(head, column)})" for column in columns]
    return markdown(["row", *names], body)


def _ratios(cells: _Cells, head: str) -> str | None:
    """Each row's right answers by the teacher's, of the same questions."""
    columns, body = cells.columns(head), []
    for row in ROWS | CHANGED:
        line = []
        for column in columns:
            of = cells.by[head, column]
            found = None
            if row != TEACHER and row in of and TEACHER in of:
                found = ratio(_array(of[row], of[TEACHER]), _array(of[TEACHER], of[row]))
            line.append(told(found) if found else "-")
        if set(line) != {"-"}:
            body.append([row, *line])
    return markdown(["row", *columns], body) if body else None


def _gains(cells: _Cells, head: str) -> str | None:
    """What the scan and its training add to near and kept tokens, in points, seed by seed and question by question."""
    columns, body = cells.columns(head), []
    for row in (ZERO, TRAINED, *CHANGED):
        line = []
        for column in columns:
            ours, theirs = (cells.by[head, column].get(name, {}) for name in (row, NEAR_KEPT))
            seeds = sorted(ours.keys() & theirs.keys())
            if not seeds:
                line.append("-")
                continue
            a, b = ({seed: hits[seed] for seed in seeds} for hits in (ours, theirs))
            mean, low, high = (100 * value for value in difference([_array(a, b)], [_array(b, a)]))
            line.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f}{f', {len(seeds)} seeds' if len(seeds) > 1 else ''})")
        if set(line) != {"-"}:
            body.append([row, *line])
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
