"""Rows of ops as tables, sections of a page, and plots."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from linmu_distill.files import read_lines
from linmu_ops._tables import markdown, plain

HERE = Path(__file__).parent
Row = dict[str, Any]


def results_file(device: str, op: str) -> Path:
    return HERE / "results" / device / f"{op}.jsonl"


def read(device: str) -> dict[str, list[Row]]:
    files = sorted((HERE / "results" / device).glob("*.jsonl"))
    return {f.stem: read_lines(f, (*TITLE, "impl", "status")) for f in files}


TITLE = ("op", "case", "dtype", "backward")


def title(row: Row) -> str:
    """Of one case: what all its rows share."""
    return f"{row['op']} · {row['case']} · {row['dtype']} · {'forward + backward' if row['backward'] else 'forward'}"


def _cells(row: Row) -> list[str]:
    if "us" not in row:
        return [row["impl"], row["status"]]
    best = row["times_best_peer"]
    return [
        row["impl"], f"{row['us']:,.1f}", f"{row['us_p20']:,.1f} to {row['us_p80']:,.1f}", f"{row['gbps']:.1f}",
        f"{row['gflops']:.1f}", f"{row['roof_percent']:.0f} % {row['bound']}", f"{best:.2f}" if best else "",
    ]  # fmt: skip


HEADER = ["implementation", "µs", "p20 to p80", "GB/s", "GFLOP/s", "of the roof", "times best peer"]


def table(rows: list[Row], verified: bool = True) -> str:
    """Plain text, for the terminal."""
    lines = [title(rows[0]) + ("" if verified else "   UNVERIFIED")]
    lines += [f"  target: {target}"] if (target := rows[0].get("target")) else []
    lines += [f"  {line}" for line in plain(HEADER, [_cells(r) for r in rows if "us" in r], left=1)]
    lines += [f"  {r['impl']}: {r['status']}" for r in rows if "us" not in r]
    return "\n".join([*lines, ""])


def _markdown(rows: list[Row]) -> list[str]:
    table = markdown(HEADER, [_cells(r) for r in rows if "us" in r], left=1)
    absent = [f"{r['impl']}: {r['status']}." for r in rows if "us" not in r]
    return [table, "", *(["; ".join(absent).replace(".;", ";"), ""] if absent else [])]


def section(op: str, rows: list[Row], page: Path) -> list[str]:
    """Markdown of one op; plots go beside the page."""
    from . import plots  # matplotlib: measuring does without

    lines = [f"## {op}", ""]
    if plot := _length_plot(op, rows, page.with_name(f"{page.stem}_{op}.svg")):
        lines += [plots.drawn(plot, f"python -m bench.page {page.stem}"), ""]
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cases[title(row)].append(row)
    for name, group in cases.items():
        first = group[0]
        modified = ", modified" if first["dirty"] else ""
        unverified = "" if first["verified"] else ", the op's tests were not run before"
        lines += [f"**{name}**  (commit {first['commit']}{modified}{unverified})", ""]
        lines += [f"Target on an H200: {target}.", ""] if (target := first.get("target")) else []
        lines += _markdown(group)
    return lines


def _length_plot(op: str, rows: list[Row], target: Path) -> Path | None:
    """Time against L over the cases that differ in L alone, with the roof drawn in."""
    from . import plots

    swept = [r for r in rows if "us" in r and r["case"].startswith("L=")]
    if not swept:
        return None
    with plots.figure(target, 1, 7, 4) as (axes,):
        for colour, impl in zip(plots.COLOURS * 3, dict.fromkeys(r["impl"] for r in swept), strict=False):
            points = [(r["sizes"]["L"], r["us"] / r["sizes"]["L"]) for r in swept if r["impl"] == impl]
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=impl)
        roof = {r["sizes"]["L"]: r["us"] * r["roof_percent"] / 100 / r["sizes"]["L"] for r in swept}
        axes.plot(list(roof), list(roof.values()), "--", color=plots.GREY, label="roof")
        plots.length_axis(axes, roof, "µs per token", op)
        plots.legend(axes.figure)
    return target
