"""Rows of models as tables, sections of the report, and plots."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import report as ops_report
from linmu_distill.files import read_lines
from linmu_ops._tables import markdown, plain
from linmu_ops.nn.config import PRESETS

Row = dict[str, Any]
STARTED = "started"
LIGHT = (
    "The student's rows are too fast: the state behind their steps had an empty window of text, so that a step "
    "attended to the tokens since then, 1 to 8, and not to the whole window and the sinks. They are kept until they "
    "are measured again, and are in no plot."
)
TASK = ("dtype", "kind", "part", "tokens", "batch", "commit")
KINDS = {"prefill": "time to first token", "decode": "decode"}


def results_file(device: str, shape: str, layers: int | None, block: str = "exact") -> Path:
    name = shape if layers is None else f"{shape}-{layers}-layers"
    name += "" if block == "exact" else f"-{block}"
    return ops_report.HERE / "results" / device / "models" / f"{name}.jsonl"


def read_rows(file: Path) -> list[Row]:
    """Every row of a file; of a measurement that was only started, the row that says so."""
    rows = read_lines(file, ("status", *TASK))
    ended = {_task(r) for r in rows if r["status"] != STARTED}
    return [r for r in rows if r["status"] != STARTED or _task(r) not in ended]


def _task(row: Row) -> tuple[Any, ...]:
    return tuple(row[k] for k in TASK)


def title(row: Row) -> str:
    """What all rows of a task share."""
    whole = " with the vision tower" if row["part"] == "whole" else ""
    return (
        f"{row['shape']} ({row['layers']} layers) · {row['dtype']} · {KINDS[row['kind']]}{whole} · "
        f"{row['tokens']:,} tokens · batch {row['batch']}"
    )


def _bytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.3f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


HEADER = ["", "seconds", "p20 to p80", "tokens/s", "x plain", "x strongest", "of free", "memory, peak", "cache"]


def _cells(row: Row) -> list[str]:
    each = row["seconds"] / row.get("steps", 1)
    spread = [row[k] / row.get("steps", 1) for k in ("seconds_p20", "seconds_p80")]
    ratios = [row.get(k) for k in ("times_plain", "times_strongest")]
    return [
        row["variant"], f"{each:.4g}", f"{spread[0]:.4g} to {spread[1]:.4g}" if row["samples"] > 1 else "one sample",
        f"{row['tokens_per_second']:,.1f}" if "tokens_per_second" in row else "",
        *("" if r is None else f"{r:.2f}{'' if r >= 1 else ' (slower)'}" for r in ratios),
        f"{row['times_free']:.2f}" if "times_free" in row else "", _bytes(row["peak_bytes"]),
        _bytes(row["cache_bytes"]),
    ]  # fmt: skip


def _absent(rows: list[Row]) -> list[str]:
    return [f"{r['variant'] or 'all'}: {r['status']}" for r in rows if "seconds" not in r]


def table(rows: list[Row]) -> str:
    """Plain text, for the terminal."""
    lines = plain(HEADER, [_cells(r) for r in rows if "seconds" in r], left=1)
    return "\n".join([title(rows[0]), *(f"  {line}" for line in (*lines, *_absent(rows))), ""])


def read(device: str) -> dict[str, list[Row]]:
    """Rows by the names of their files."""
    files = sorted((ops_report.HERE / "results" / device / "models").glob("*.jsonl"))
    return {f.stem: rows for f in files if (rows := read_rows(f))}


def section(name: str, rows: list[Row], page: Path) -> list[str]:
    """Markdown of one model; plots go beside the page."""
    from bench import plots  # matplotlib: measuring does without

    lines = [f"## Model {name}", "", _about(rows[-1]), ""]
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        mine = [r for r in rows if r["dtype"] == dtype]
        if plot := _plot(mine, page.with_name(f"{page.stem}_model_{name}_{dtype}.svg")):
            lines += [plots.drawn(plot, f"python -m bench.page {page.stem}"), ""]
        lines += _markdown(mine)
    return lines


def is_light(row: Row) -> bool:
    """Whether a student's decode was once measured on a state whose window of text was empty."""
    light = row["kind"] == "decode" and row["student"] and "state" not in row
    return light and PRESETS[row["block"]].text_window > 0


def _about(row: Row) -> str:
    sizes = ""
    if "parameters" in row:
        sizes = (
            f" Decoder and output layer: {row['parameters'] / 1e9:.2f} G parameters, the student's "
            f"{row['student_parameters'] / 1e9:.2f} G."
        )
    return (
        f"{row['layers']} decoder layers, random weights, blocks: {row['block']}, {row['threads']} threads, "
        f"commit {row['commit']}{', modified' if row['dirty'] else ''}.{sizes} *x plain* and *x strongest*: how many "
        "times faster than the teacher in transformers as users run it, and than the fastest way to run it. Slower is "
        "marked. *Of free*: how many times as long as a teacher whose attention costs nothing."
    )


def _markdown(rows: list[Row]) -> list[str]:
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["dtype"], row["kind"], row["part"]].append(row)
    lines = []
    for (dtype, kind, part), group in groups.items():
        tower = ", with the vision tower" if part == "whole" else ""
        lines += [
            f"**{KINDS[kind].capitalize()}{tower}, {dtype}** (seconds a {'token' if kind == 'decode' else 'prompt'})",
            "",
        ]
        if any(is_light(r) for r in group if "seconds" in r):
            lines += [LIGHT, ""]
        cells = []
        for r in group:
            what = _cells(r) if "seconds" in r else [r["variant"] or "all", r["status"], *[""] * (len(HEADER) - 2)]
            cells.append([f"{r['tokens']:,}", str(r["batch"]), *what])
        lines.append(markdown(["tokens", "batch", *HEADER], cells, left=3))
        lines.append("")
    return lines


def _plot(rows: list[Row], target: Path) -> Path | None:
    """Time to first token, tokens/s and memory against length, at the smallest batch (decode: also the largest)."""
    from bench import plots

    timed = [r for r in rows if "seconds" in r and r["part"] == "decoder" and not is_light(r)]
    prefill = [r for r in timed if r["kind"] == "prefill" and r["batch"] == min(x["batch"] for x in timed)]
    decode = [r for r in timed if r["kind"] == "decode"]
    batches = sorted({r["batch"] for r in decode})
    panels: list[tuple[str, str, list[Row], str]] = []
    if prefill:
        panels.append(("time to first token", "seconds", prefill, "seconds"))
    panels += [
        (f"decode, batch {b}", "tokens/s", [r for r in decode if r["batch"] == b], "tokens_per_second")
        for b in dict.fromkeys(batches[:1] + batches[-1:])
    ]
    if decode:
        kept = [r | dict(megabytes=r["cache_bytes"] / 1e6) for r in decode if r["batch"] == batches[0]]
        panels.append((f"cache or state, batch {batches[0]}", "MB", kept, "megabytes"))
    if prefill and all(r["peak_bytes"] for r in prefill):
        peaks = [r | dict(megabytes=r["peak_bytes"] / 1e6) for r in prefill]
        panels.append(("peak memory of the prefill", "MB", peaks, "megabytes"))
    if not panels:
        return None
    names = list(dict.fromkeys(r["variant"] for r in timed))
    colours = dict(zip(names, plots.COLOURS * len(names), strict=False))
    with plots.figure(target, len(panels), 7 if len(panels) == 1 else 4.2 * len(panels), 4) as all_axes:
        for axes, (heading, unit, group, field) in zip(all_axes, panels, strict=True):
            for name in names:
                points = sorted((r["tokens"], r[field]) for r in group if r["variant"] == name)
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", color=colours[name], label=name)
            plots.length_axis(axes, (r["tokens"] for r in group), unit, heading)
        plots.legend(all_axes[0].figure)
    return target
