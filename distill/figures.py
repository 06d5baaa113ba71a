"""Plots of a run, readable on white and on black: transparent background, grey text, saturated lines."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

GREY = "#808890"
COLOURS = ("#2f81f7", "#e0662b", "#2da44e", "#a371f7", "#d4a72c", "#db61a2")
_STYLE: "dict[RcKeyType, Any]" = {
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25,
    "font.size": 10, "axes.titlesize": 10, "figure.dpi": 110,
    "svg.hashsalt": "linmu",
}  # fmt: skip


@contextmanager
def figure(path: Path, columns: int, width: float, height: float) -> Iterator[list[Axes]]:
    """Panels side by side, written to `path`, PNG or SVG, when they are drawn; sizes in inches."""
    with plt.rc_context(_STYLE):
        made, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        yield list(axes[0])
        # Without a date and with a fixed salt, a plot of the same numbers is the same file.
        made.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(made)


def _smooth(values: list[float], window: int) -> list[float]:
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def loss_curves(path: Path, stages: dict[int, list[dict[str, float]]], names: dict[str, str]) -> None:
    """One panel for each stage: every loss against the step, thin as measured, thick as a running mean."""
    with figure(path, len(stages), 4.2 * len(stages), 3.2) as panels:
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
    with figure(path, 1, 9.5, 3.4) as (panel,):
        width = 0.85 / len(labels)
        for i, label in enumerate(labels):
            at = [g + (i - (len(labels) - 1) / 2) * width for g in range(len(groups))]
            rows = [table[label].get(group) for group in groups]
            heights = [100 * row["accuracy"] if row else 0 for row in rows]
            errors = [
                [100 * (row["accuracy"] - row["interval"][0]) if row else 0 for row in rows],
                [100 * (row["interval"][1] - row["accuracy"]) if row else 0 for row in rows],
            ]
            colour = GREY if label == "teacher" else COLOURS[i % len(COLOURS)]
            panel.bar(at, heights, width * 0.92, label=label, color=colour, yerr=errors,
                      error_kw={"ecolor": GREY, "elinewidth": 1, "capsize": 2})  # fmt: skip
        panel.set(xticks=range(len(groups)), xticklabels=groups, ylabel="exact match, %", ylim=(0, 105))
        panel.legend(ncols=len(labels), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def speed_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Three panels against the length of the input."""
    quantities = (
        ("ttft_s", "time to first token, s"),
        ("tokens_per_second", "tokens/s while answering"),
        ("cache_bytes", "memory held while answering, KB"),
    )
    with figure(path, 3, 12.6, 3.2) as panels:
        for panel, (key, title) in zip(panels, quantities, strict=True):
            for name, colour in (("teacher", GREY), ("student", COLOURS[0])):
                mine = [row for row in rows if row["model"] == name]
                scale = 1 / 1024 if key == "cache_bytes" else 1
                panel.plot([r["tokens"] for r in mine], [r[key] * scale for r in mine], "o-", color=colour, label=name)
            panel.set(title=title, xlabel="input tokens", xscale="log")
            lengths = sorted({row["tokens"] for row in rows})
            panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.legend()
