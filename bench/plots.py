"""Plots of benches, in the style of the plots of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from linmu_distill.figures import COLOURS, GREY, figure


def drawn(plot: Path, command: str) -> str:
    """A page's line about a plot beside it. Plots are drawn from rows, and git does not keep them."""
    return f"Plot: `{command}` draws `{plot.name}`."


def length_axis(axes: Any, lengths: Iterable[int], ylabel: str, title: str) -> None:
    """Both axes logarithmic, ticks at the lengths; after the lines are drawn."""
    from matplotlib.ticker import LogLocator, NullLocator

    ticks = sorted(set(lengths))
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=ylabel, title=title)
    axes.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def legend(made: Any) -> None:
    """One legend for all panels, beside or below them, where it hides nothing."""
    handles, labels = made.axes[0].get_legend_handles_labels()
    if len(made.axes) == 1:
        made.legend(handles, labels, loc="outside right center", frameon=False)
    else:
        made.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def row_intervals(
    path: Path, panels: dict[str, dict[str, tuple[float, float, float]]], teacher: dict[str, float]
) -> None:
    """A panel for each task group: rows of a table down, mean and 95 % interval across; the teacher as a line."""
    rows = list(next(iter(panels.values())))
    with figure(path, len(panels), 2.2 + 1.9 * len(panels), 1.1 + 0.26 * len(rows)) as axes:
        for axis, (group, values) in zip(axes, panels.items(), strict=True):
            for i, row in enumerate(rows):
                mean, low, high = (100 * v for v in values[row])
                colour = COLOURS[0] if i else COLOURS[1]
                axis.plot([low, high], [i, i], color=colour, linewidth=1.6)
                axis.plot([mean], [i], "o", color=colour, markersize=4.5)
            axis.axvline(100 * values[rows[0]][0], color=COLOURS[1], linewidth=0.8, alpha=0.6)
            if group in teacher:
                axis.axvline(100 * teacher[group], color=GREY, linewidth=1, linestyle="--")
            axis.set(title=f"{group}, %", ylim=(len(rows) - 0.5, -0.5))
            axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows))


def answer_curves(path: Path, ticks: list[str], lines: dict[str, list[tuple[float, float, float]]], label: str,
                  trained: str | None) -> None:  # fmt: skip
    """Accuracy against a size, a line for each row, with 95 % intervals; what training showed is drawn in."""
    with figure(path, 1, 7, 3.4) as (axis,):
        for colour, (name, values) in zip((GREY, *COLOURS * 4), lines.items(), strict=False):
            means, lows, highs = ([100 * v for v in part] for part in zip(*values, strict=True))
            axis.plot(range(len(ticks)), means, "o-", color=colour, label=name)
            axis.fill_between(range(len(ticks)), lows, highs, color=colour, alpha=0.12, linewidth=0)
        if trained in ticks:
            axis.axvline(ticks.index(trained), color=GREY, linewidth=1, linestyle=":")
        axis.set(xlabel=label, ylabel="exact match, %", ylim=(0, 105))
        axis.set_xticks(range(len(ticks)), ticks)
        axis.legend()
