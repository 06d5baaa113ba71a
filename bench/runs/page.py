"""The page of a table: each row's accuracy with intervals, its difference to the first row, its compute.

python -m bench.runs.page bench/runs/tables/open.toml      # page and plots, from the results there are
"""

import sys
from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from linmu_distill.evaluation import wilson_interval
from linmu_distill.run import TEACHER
from linmu_ops._tables import markdown

from .. import plots
from .table import Curve, Results, Row, Table

Interval = tuple[float, float, float]
"""Mean, lower and upper end of its 95 % interval."""
Records = list[dict[str, Any]]

_READING = """\
Every number is a mean over seeds with its 95 % interval. The seed sets the new parameters and the training data; the
held-out samples are the same for all rows and seeds, so rows are compared seed by seed and sample by sample. The
interval covers both other seeds and other samples: variances of the means over either, added; t distribution with the
degrees of freedom of Welch and Satterthwaite; Wilson's form for shares, one pseudo-sample in differences. **Bold**: 0
is not in the interval of the difference; of twenty rows that differ in nothing, one is bold by chance.
"""


def _hits(records: Records, group: str) -> np.ndarray:
    """(S, N) 0 or 1: seeds, samples."""
    return np.array([[int(hit) for hit in record["scores"][group]["right"]] for record in records], dtype=float)


def _spread(groups: list[np.ndarray], pseudo: float) -> tuple[float, float, float]:
    """Mean over groups, seeds and samples; its standard error; the 97.5 % quantile of t that belongs to it.

    Args:
        groups: (S, N_g) values; the columns are the same samples for all seeds.
        pseudo: added to each group's sum of squares over samples.
    """
    seeds, count = len(groups[0]), len(groups)
    by_seed = np.mean([values.mean(1) for values in groups], axis=0)
    of_seeds = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    of_samples, squared = 0.0, 0.0
    for values in groups:
        n, columns = values.shape[1], values.mean(0)
        part = (((columns - columns.mean()) ** 2).sum() + pseudo) / (n * max(n - 1 + pseudo, 1)) / count**2
        of_samples += part
        squared += part**2 / max(n - 1, 1)
    variance = of_seeds + of_samples
    if seeds > 1:
        squared += of_seeds**2 / (seeds - 1)
    freedom = variance**2 / squared if squared else 1e9
    return float(by_seed.mean()), sqrt(variance), float(student_t.ppf(0.975, freedom))


def accuracy(groups: list[np.ndarray]) -> Interval:
    """A share of right answers and its 95 % interval; see `_spread`."""
    mean, error, quantile = _spread(groups, 0.0)
    n = mean * (1 - mean) / error**2 if error else min(values.shape[1] for values in groups)
    return (mean, *wilson_interval(mean * n, n, quantile))


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> Interval:
    """How much more is right, sample by sample and seed by seed."""
    mean, error, quantile = _spread([a - b for a, b in zip(ours, theirs, strict=True)], 1.0)
    return mean, mean - quantile * error, mean + quantile * error


def over_seeds(values: list[float]) -> Interval:
    """A mean and its 95 % interval over seeds; of one seed, without end."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -np.inf, np.inf
    half = float(student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / sqrt(len(values)))
    return mean, mean - half, mean + half


def _share(value: Interval) -> str:
    return f"{value[0]:.1%} ({value[1]:.0%}-{value[2]:.0%})"


def _gain(value: Interval, scale: float = 100.0, digits: int = 1) -> str:
    mean, low, high = (v * scale for v in value)
    if not np.isfinite(low):
        return f"{mean:+.{digits}f}"
    text = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def _distance(value: Interval) -> str:
    return f"{value[0]:.3f}" + (f" ({value[1]:.3f}-{value[2]:.3f})" if np.isfinite(value[1]) else "")


def _sizes(record: dict[str, Any]) -> dict[str, int]:
    """Samples of each group."""
    return {group: len(found["right"]) for group, found in record["scores"].items() if "right" in found}


class Page:
    """The records that belong to a table as it is now, by row."""

    def __init__(self, table: Table, results: Results, stale: bool = False) -> None:
        """With `stale`, also of rows as they were once: the last line of each row and seed."""
        known = results.read()
        self.table = table
        self.records: dict[str, Records] = {}
        used = {(TEACHER, table.teacher_key)}
        teacher = known.get((TEACHER, table.teacher_key))
        self.teacher = [] if teacher is None else [teacher]
        for row in table.config.rows:
            found = []
            # Seeds beyond the table's number count, if someone ran them.
            for seed in sorted({record["seed"] for (name, _), record in known.items() if name == row.name}):
                key = (row.name, table.key(row, seed))
                used.add(key)
                if key in known:
                    found.append(known[key])
            if found:
                self.records[row.name] = found
        self.stale = len(known) - len(used & known.keys())
        if stale:
            self._take_last(list(known.values()))
        first = next((record for record in (*self.teacher, *(r[0] for r in self.records.values()))), None)
        scores = first["scores"] if first else {}
        self.groups = [group for group, found in scores.items() if "right" in found]
        self.measured = [group for group, found in scores.items() if "kl" in found]

    def _take_last(self, lines: Records) -> None:
        last: dict[str, dict[int | None, dict[str, Any]]] = {}
        for line in lines:
            last.setdefault(line["row"], {})[line["seed"]] = line
        self.teacher = list(last.pop(TEACHER, {}).values())
        # Seeds of other samples cannot be averaged with the last one's.
        sizes = {name: _sizes([*found.values()][-1]) for name, found in last.items()}
        self.records = {
            name: [line for line in found.values() if _sizes(line) == sizes[name]] for name, found in last.items()
        }

    @property
    def first(self) -> Row:
        """What the others are compared with."""
        return self.table.config.rows[0]

    def pairs(self, name: str) -> tuple[Records, Records]:
        """The records of a row and of the first one for the seeds that both have."""
        theirs = {record["seed"]: record for record in self.records.get(self.first.name, [])}
        ours = [record for record in self.records[name] if record["seed"] in theirs]
        return ours, [theirs[record["seed"]] for record in ours]

    def accuracies(self, records: Records) -> dict[str, Interval]:
        """Of each group, and their mean."""
        matrices = {group: _hits(records, group) for group in self.groups}
        return {**{group: accuracy([m]) for group, m in matrices.items()}, "mean": accuracy(list(matrices.values()))}

    def accuracy_table(self) -> str:
        """A line for each row."""
        lines = []
        for name, records in ((TEACHER, self.teacher), *self.records.items()):
            if not records:
                continue
            found = self.accuracies(records)
            gain = "-"
            if name not in (TEACHER, self.first.name) and (both := self.pairs(name))[0]:
                gain = _gain(difference(*([_hits(side, group) for group in self.groups] for side in both)))
            seeds = "-" if name == TEACHER else str(len(records))
            lines.append([name, seeds, *(_share(found[group]) for group in [*self.groups, "mean"]), gain])
        head = ["row", "seeds", *self.groups, "mean", f"mean, against {self.first.name}, points"]
        return markdown(head, lines)

    def gain_table(self) -> str:
        """Differences by group."""
        lines = []
        for name in self.records:
            ours, theirs = self.pairs(name)
            if name != self.first.name and ours:
                cells = [difference([_hits(ours, g)], [_hits(theirs, g)]) for g in self.groups]
                lines.append([name, *(_gain(cell) for cell in cells)])
        return markdown(["row", *self.groups], lines)

    def kl(self, record: dict[str, Any]) -> float:
        """Mean over groups of KL(teacher || student), nats a token."""
        return float(np.mean([record["scores"][group]["kl"] for group in self.measured]))

    def distance_table(self) -> str:
        """KL to the teacher on held-out samples and the last losses of training."""
        lines = []
        for name, records in self.records.items():
            gain = "-"
            if name != self.first.name and (both := self.pairs(name))[0]:
                gain = _gain(over_seeds([self.kl(a) - self.kl(b) for a, b in zip(*both, strict=True)]), 1.0, 3)
            parts = [f"{np.mean([r['scores'][group]['kl'] for r in records]):.3f}" for group in self.measured]
            lines.append([name, _distance(over_seeds([self.kl(record) for record in records])), gain, *parts])
        return markdown(["row", "mean", f"against {self.first.name}", *self.measured], lines)

    def compute_table(self) -> str:
        """What each row cost."""
        lines = []
        for name, records in self.records.items():
            losses = []
            for stage, means in records[0]["losses"].items():
                told = [f"{label} {np.mean([r['losses'][stage][key] for r in records]):.3f}"
                        for key, label in (("hidden", "L_hid"), ("token", "L_tok")) if key in means]  # fmt: skip
                losses.append(f"{stage.removeprefix('stage')}: {', '.join(told)}")
            tokens, seconds = (np.mean([record[key] for record in records]) for key in ("tokens", "seconds"))
            lines.append(
                [name, f"{records[0]['steps']:,}", f"{tokens / 1e6:.2f}", f"{seconds / 60:.1f}",
                 f"{records[0]['parameters'] / 1e6:.2f}", "; ".join(losses) or "-"]
            )  # fmt: skip
        head = ["row", "steps", "million tokens", "minutes of training", "million parameters in blocks",
                "last losses, by stage"]  # fmt: skip
        return markdown(head, lines)

    def row_table(self) -> str:
        """What each row is."""
        lines = []
        for row in self.table.config.rows:
            changes = row.set | row.own | ({"base": row.base} if row.base else {})
            what = f"`{row.of}` after stage {row.after}" if row.of else _options(changes)
            what += {"windows": ", windows alone", "near-kept": ", windows and kept tokens alone",
                     "equal-memory": ": its teacher with as many bytes of cache"}.get(row.alone or "", "")  # fmt: skip
            lines.append([row.name, row.about, what, str(len(self.records.get(row.name, []))) or "0"])
        return markdown(["row", "what it is", "options that differ from the base", "seeds so far"], lines)


def _options(values: dict[str, Any], prefix: str = "") -> str:
    told = []
    for key, value in values.items():
        inner = isinstance(value, dict)
        told.append(_options(value, f"{prefix}{key}.") if inner else f"`{prefix}{key} = {_toml(value)}`")
    return ", ".join(told) or "-"


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _draw_answers(page: Page, plot: Path) -> None:
    panels: dict[str, dict[str, Interval]] = {"mean": {}, **{group: {} for group in page.groups}}
    for name, records in page.records.items():
        for group, value in page.accuracies(records).items():
            panels[group][name] = value
    teacher = {group: value[0] for group, value in page.accuracies(page.teacher).items()} if page.teacher else {}
    plots.row_intervals(plot, panels, teacher)


def _curve(page: Page, name: str, curve: Curve) -> dict[str, list[Interval]]:
    """Accuracies of each row at the values of a curve."""
    shown = {TEACHER: page.teacher, **page.records}
    return {
        row: [
            accuracy([np.array([[int(c) for c in r["curves"][name][i]["right"]] for r in records], dtype=float)])
            for i in range(len(curve.values))
        ]
        for row, records in shown.items()
        if records
    }


def _ticks(curve: Curve) -> list[str]:
    return [str(value[0] if isinstance(value, list) else value) for value in map(_flat, curve.values)]


def _draw_curve(plot: Path, curve: Curve, lines: dict[str, list[Interval]]) -> None:
    trained = None if curve.trained is None else str(curve.trained)
    plots.answer_curves(plot, _ticks(curve), lines, curve.label or curve.option, trained)


def write_page(table: Table, results: Results, folder: Path) -> Path:
    """Write `folder/<table>.md` and its plots from the results there are, and return its path."""
    page, config = Page(table, results), table.config
    command = f"python -m bench.runs.page {table.source}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{table.name}.md"
    every = [record for records in (page.teacher, *page.records.values()) for record in records]
    parts = [f"# {config.title}", "", *([config.about.strip(), ""] if config.about else []), "## Rows", ""]
    parts += [page.row_table(), "", _READING]
    if config.unequal_compute:
        parts += [f"Rows differ in compute: {config.unequal_compute}", ""]
    if page.groups and page.records:
        counts = {len(record["scores"][group]["right"]) for record in every for group in page.groups}
        told = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        plot = folder / f"{table.name}.svg"
        _draw_answers(page, plot)
        parts += ["## Answers", "", f"Share answered exactly, {told} held-out questions a group and seed.", "",
                  page.accuracy_table(), "", plots.drawn(plot, command), ""]  # fmt: skip
        if len(page.records) > 1:
            parts += [f"Against {page.first.name}, in points, by group:", "", page.gain_table(), ""]
    if page.measured and page.records:
        parts += ["## Distance to the teacher", "",
                  "KL(teacher ‖ student) on held-out answers, nats a token; intervals over seeds.", "",
                  page.distance_table(), ""]  # fmt: skip
    for name, curve in config.curves.items():
        if lines := _curve(page, name, curve):
            ticks = _ticks(curve)
            plot = folder / f"{table.name}_{name}.svg"
            _draw_curve(plot, curve, lines)
            rows = [[row, *(_share(value) for value in values)] for row, values in lines.items()]
            parts += [f"## {name}", "", markdown([curve.label or curve.option, *ticks], rows), "",
                      plots.drawn(plot, command), ""]  # fmt: skip
    if page.records:
        commits = sorted({f"{record['commit']}{'-dirty' if record.get('dirty') else ''}" for record in every})
        # Lines from before the device was noted are of CPUs.
        places = Counter((record.get("device", "cpu"), *record["versions"].items()) for record in every)
        devices = [
            f"{count} on {'a CPU' if device == 'cpu' else f'one {device}'} ({', '.join(map(' '.join, versions))})"
            for (device, *versions), count in sorted(places.items())
        ]
        parts += ["## Compute", "", page.compute_table(), "",
                  f"Commits {', '.join(commits)}. Lines: {'; '.join(devices)}.", ""]  # fmt: skip
    if page.stale:
        parts += [f"{page.stale} lines of `{results.path}` are of rows as they were once, and are not shown.", ""]
    path.write_text("\n".join(parts))
    return path


def _flat(value: Any) -> Any:
    """Of `[[4, 8]]` the `[4, 8]`."""
    return value[0] if isinstance(value, list) and value and isinstance(value[0], list) else value


def draw(table: Table, results: Results, folder: Path) -> list[Path]:
    """The plots of a table's page, of the last line of each row and seed, also of rows as they were once."""
    page, plots_drawn = Page(table, results, stale=True), []
    if page.groups and page.records:
        plots_drawn.append(folder / f"{table.name}.svg")
        _draw_answers(page, plots_drawn[-1])
    for name, curve in table.config.curves.items():
        if lines := _curve(page, name, curve):
            plots_drawn.append(folder / f"{table.name}_{name}.svg")
            _draw_curve(plots_drawn[-1], curve, lines)
    return plots_drawn


def main(path: Path) -> None:
    """Draw the plots of the table at `path`."""
    table = Table(path)
    results = Results(Path(table.config.results) / f"{table.name}.jsonl")
    for plot in draw(table, results, Path(table.config.reports)):
        print(plot)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
