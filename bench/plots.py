"""Plots that can be read on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GREY = "#808080"
COLOURS = ("#3b82f6", "#e8710a", "#16a34a", "#d946ef", "#ca8a04", "#14b8a6")


def drawn(plot: Path, command: str) -> str:
    """A page's line about a plot beside it. Plots are drawn from rows, and git does not keep them."""
    return f"Plot: `{command}` draws `{plot.name}`."


def figure(panels: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = 7 if panels == 1 else 4.2 * panels
    made, axes = plt.subplots(1, panels, figsize=(width, 4), layout="constrained", squeeze=False)
    return made, axes[0]


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


def save(made: Any, target: Path) -> None:
    """Write the figure as SVG, its text and lines in grey, its background transparent."""
    import matplotlib.pyplot as plt

    for text in (text for one in made.legends for text in one.get_texts()):
        text.set_color(GREY)
    for axes in made.axes:
        for item in (axes.title, axes.xaxis.label, axes.yaxis.label):
            item.set_color(GREY)
        axes.tick_params(colors=GREY)
        for spine in axes.spines.values():
            spine.set_color(GREY)
        axes.grid(color=GREY, alpha=0.25)
    with plt.rc_context({"svg.hashsalt": "linmu"}):  # and no date: a plot of the same numbers is the same file
        made.savefig(target, transparent=True, metadata={"Date": None})
    plt.close(made)
