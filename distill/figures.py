"""Plots of a run, readable on white and on black: transparent background, grey text, saturated lines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_GREY = "#808890"
COLOURS = ("#2f81f7", "#e0662b", "#2da44e", "#a371f7", "#d4a72c", "#db61a2")
_STYLE = {
    "text.color": _GREY, "axes.labelcolor": _GREY, "axes.edgecolor": _GREY, "xtick.color": _GREY, "ytick.color": _GREY,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GREY, "grid.alpha": 0.25,
    "font.size": 10, "axes.titlesize": 10, "figure.dpi": 110,
    "svg.hashsalt": "linmu",
}  # fmt: skip


@contextmanager
def _figure(path: Path, columns: int, width: float, height: float) -> Iterator[list[Axes]]:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        yield list(axes[0])
        # Without a date and with a fixed salt, a plot of the same numbers is the same file.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _smooth(values: list[float], window: int) -> list[float]:
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def loss_curves(path: Path, stages: dict[int, list[dict[str, float]]], names: dict[str, str]) -> None:
    """One panel for each stage: every loss against the step, thin as measured, thick as a running mean."""
    with _figure(path, len(stages), 4.2 * len(stages), 3.2) as panels:
        for panel, (number, records) in zip(panels, stages.items(), strict=True):
            for colour, (name, label) in zip(COLOURS, names.items(), strict=False):
                told = [record for record in records if name in record]
                if not told:
                    continue
                steps, values = [record["step"] for record in told], [record[name] for record in told]
                panel.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
                window = max(1, len(values) // 20)
                panel.plot(steps, _smooth(values, window), color=colour, linewidth=1.8, label=label)
            panel.set(title=f"Stage {number}", xlabel="step", yscale="log")
            panel.legend()
        panels[0].set_ylabel("loss (nats a token; L_hid relative)")


def accuracy_bars(path: Path, table: dict[str, dict[str, Any]], groups: list[str]) -> None:
    """Exact match of each group for the teacher and the student after each stage, with 95 % intervals."""
    labels = list(table)
    with _figure(path, 1, 9.5, 3.4) as (panel,):
        width = 0.85 / len(labels)
        for i, label in enumerate(labels):
            at = [g + (i - (len(labels) - 1) / 2) * width for g in range(len(groups))]
            rows = [table[label].get(group) for group in groups]
            heights = [100 * row["accuracy"] if row else 0 for row in rows]
            errors = [
                [100 * (row["accuracy"] - row["interval"][0]) if row else 0 for row in rows],
                [100 * (row["interval"][1] - row["accuracy"]) if row else 0 for row in rows],
            ]
            colour = _GREY if label == "teacher" else COLOURS[i % len(COLOURS)]
            panel.bar(at, heights, width * 0.92, label=label, color=colour, yerr=errors,
                      error_kw={"ecolor": _GREY, "elinewidth": 1, "capsize": 2})  # fmt: skip
        panel.set(xticks=range(len(groups)), xticklabels=groups, ylabel="exact match, %", ylim=(0, 105))
        panel.legend(ncols=len(labels), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def speed_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Three panels against the length of the input."""
    quantities = (
        ("ttft_s", "time to first token, s"),
        ("tokens_per_second", "tokens/s while answering"),
        ("cache_bytes", "memory held while answering, KB"),
    )
    with _figure(path, 3, 12.6, 3.2) as panels:
        for panel, (key, title) in zip(panels, quantities, strict=True):
            for name, colour in (("teacher", _GREY), ("student", COLOURS[0])):
                mine = [row for row in rows if row["model"] == name]
                scale = 1 / 1024 if key == "cache_bytes" else 1
                panel.plot([r["tokens"] for r in mine], [r[key] * scale for r in mine], "o-", color=colour, label=name)
            panel.set(title=title, xlabel="input tokens", xscale="log")
            lengths = sorted({row["tokens"] for row in rows})
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.legend()


def row_intervals(
    path: Path, panels: dict[str, dict[str, tuple[float, float, float]]], teacher: dict[str, float]
) -> None:
    """A panel for each task group: rows of a table down, mean and 95 % interval across; the teacher as a line."""
    rows = list(next(iter(panels.values())))
    with _figure(path, len(panels), 2.2 + 1.9 * len(panels), 1.1 + 0.26 * len(rows)) as axes:
        for axis, (group, values) in zip(axes, panels.items(), strict=True):
            for i, row in enumerate(rows):
                mean, low, high = (100 * v for v in values[row])
                colour = COLOURS[0] if i else COLOURS[1]
                axis.plot([low, high], [i, i], color=colour, linewidth=1.6)
                axis.plot([mean], [i], "o", color=colour, markersize=4.5)
            axis.axvline(100 * values[rows[0]][0], color=COLOURS[1], linewidth=0.8, alpha=0.6)
            if group in teacher:
                axis.axvline(100 * teacher[group], color=_GREY, linewidth=1, linestyle="--")
            axis.set(title=f"{group}, %", ylim=(len(rows) - 0.5, -0.5))
            axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows))


def answer_curves(path: Path, ticks: list[str], lines: dict[str, list[tuple[float, float, float]]], label: str,
                  trained: str | None) -> None:  # fmt: skip
    """Accuracy against a size, a line for each row, with 95 % intervals; what training showed is drawn in."""
    with _figure(path, 1, 7, 3.4) as (axis,):
        for colour, (name, values) in zip((_GREY, *COLOURS * 4), lines.items(), strict=False):
            means, lows, highs = ([100 * v for v in part] for part in zip(*values, strict=True))
            axis.plot(range(len(ticks)), means, "o-", color=colour, label=name)
            axis.fill_between(range(len(ticks)), lows, highs, color=colour, alpha=0.12, linewidth=0)
        if trained in ticks:
            axis.axvline(ticks.index(trained), color=_GREY, linewidth=1, linestyle=":")
        axis.set(xlabel=label, ylabel="exact match, %", ylim=(0, 105))
        axis.set_xticks(range(len(ticks)), ticks)
        axis.legend()
