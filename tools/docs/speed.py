"""Writes the table of ops into docs/speed.md, as `bench/reports/cpu.md` has it: `python -m tools.docs.speed`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE, REPORT = ROOT / "docs" / "speed.md", ROOT / "bench" / "reports" / "cpu.md"
BEGIN, END = "<!-- ops: written by `python -m tools.docs.speed` -->\n", "<!-- end of ops -->\n"
CASE = re.compile(r"^\*\*(\w+) · (.+?)\*\*(.*?)(?=^\*\*|^#|\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| (.+?) \|.*\| ([\d.]*) \|$", re.MULTILINE)


def cases(report: str) -> dict[str, list[tuple[float, str, str]]]:
    """{op: [(how many times faster than the best peer, case, that peer), ...]}, in the report's order."""
    found: dict[str, list[tuple[float, str, str]]] = {}
    for op, case, table in CASE.findall(report):
        rows = [(name, float(times)) for name, times in ROW.findall(table) if times]
        ours = [times for name, times in rows if name.startswith("linmu")]
        peers = [name for name, times in rows if times == 1 and not name.startswith("linmu")]
        if ours and peers:
            found.setdefault(op, []).append((max(ours), case, peers[0]))
    return found


def table(report: str) -> str:
    lines = [
        "",
        "| op | cases | times faster than the best peer | that peer | slower than it |",
        "|---|---|---|---|---|",
    ]
    for op, given in cases(report).items():
        least, most = min(given), max(given)
        peers = "; ".join(dict.fromkeys(peer for _, _, peer in given))
        loses = "; ".join(f"{case}: {times:g}" for times, case, _ in given if times < 1)
        lines.append(f"| `{op}` | {len(given)} | {least[0]:.2f} to {most[0]:.2f} | {peers} | {loses} |")
    return "\n".join([*lines, "", ""])


def parts(page: str) -> tuple[str, str, str]:
    """What is before, in and after the table."""
    before, _, rest = page.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside, after


if __name__ == "__main__":
    before, _, after = parts(PAGE.read_text())
    PAGE.write_text(before + BEGIN + table(REPORT.read_text()) + END + after)
