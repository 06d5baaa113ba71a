"""What is recalled from far away: many keys, chains of assignments, long pages, by length and by depth.

    python -m bench.runs.far [--samples 200] [--row teacher] [--group needles] [--frames 64] [--keys 4] [--seeds 3]
    python -m bench.runs.far --run runs/demo --run runs/demo-1 --run runs/demo-2     # finished runs, seeds 0, 1, 2

Beside the shipped teacher and the students of `demo.toml` stand the rows that training has to beat: a teacher whose
cache is as small as the student's state, windows alone, near and kept tokens, zero steps. Answers are greedy. Goes on
where it stopped: results are lines of bench/results/ablations/far.jsonl, the page is bench/reports/far.md.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import linmu_models
from linmu_distill.config import EVALUATION_SEED, Config, load_config
from linmu_distill.data import LONG_GROUPS, SPLITS, generate
from linmu_distill.evaluate import Asked, tell
from linmu_distill.evaluation import evaluate
from linmu_distill.limited import EQUAL_MEMORY, equal_tokens, limited
from linmu_distill.run import CALIBRATION_BATCHES, TEACHER
from linmu_distill.sources import build_source
from linmu_distill.student import ALONE, exact_alone, new_student
from linmu_distill.teacher import load_teacher
from linmu_ops._tables import markdown

from ..provenance import where
from .page import accuracy
from .table import Results

ZERO, TRAINED = "zero steps", "trained"
ROWS = {
    TEACHER: "attention to every token",
    EQUAL_MEMORY: "the teacher, whose cache holds its first 4 tokens and the last ones: as many bytes as the student",
    **dict(zip(ALONE, ("windows and sinks", "windows, sinks and kept tokens, without a scan"), strict=True)),
    ZERO: "the student as converted and calibrated",
    TRAINED: "the student after three stages of `demo.toml`",
}
FRAMES, KEYS, HOPS, LINES = (8, 16, 32, 64, 128, 256), (1, 4, 16, 32), (1, 2, 4), (48, 96)
PARTS = 4  # of the depth


def questions(groups: Sequence[str], frames: Sequence[int], keys: Sequence[int]) -> list[Asked]:
    """What is asked of each row."""
    asked = []
    if "needle" in groups:
        asked += [Asked("needle", {"frames": [length] * 2}) for length in frames]
    if "needles" in groups:
        asked += [Asked("needles", {"keys": k, "frames": [length] * 2}) for k in keys for length in frames]
    if "tracking" in groups:
        asked += [Asked("tracking", {"hops": hops, "frames": [length] * 2}) for hops in HOPS for length in frames]
    if "page" in groups:
        asked += [Asked("page", {"sizes": [[lines, 8]]}) for lines in LINES]
    return asked


def untrained(teacher: Any, tokenizer: Any, config: Config) -> tuple[Any, list[Any]]:
    """A student as it is before the first stage of a run, and its blocks."""
    student, blocks, _ = new_student(teacher, config)
    source = build_source(config.data, config.teacher, teacher, tokenizer, config.seed * 4)
    batches = [dict(source.processor(source.samples(i))) for i in range(CALIBRATION_BATCHES)]
    linmu_models.calibrate(student, teacher, batches, step_sizes=True)
    return student, list(blocks.values())


class Models:
    """The model of each row, made when it is first asked for."""

    def __init__(self, config: Config, runs: Sequence[Path]) -> None:
        self.config, self.runs = config, runs
        self.teacher, self.tokenizer = load_teacher(config.teacher, "float32")
        self._untrained: dict[int, tuple[Any, list[Any]]] = {}

    def seeds(self, row: str, seeds: int) -> range:
        """The seeds of a row; a teacher has one."""
        return range({TEACHER: 1, EQUAL_MEMORY: 1, TRAINED: len(self.runs)}.get(row, seeds))

    def _start(self, seed: int) -> tuple[Any, list[Any]]:
        if seed not in self._untrained:
            chosen = self.config.model_copy(update={"seed": seed})
            self._untrained = {seed: untrained(self.teacher, self.tokenizer, chosen)}
        return self._untrained[seed]

    def of(self, row: str, seed: int) -> tuple[Any, AbstractContextManager[Any]]:
        """The model, and what must be open while it is asked."""
        if row == TEACHER:
            return self.teacher, nullcontext()
        if row == TRAINED:
            return load_teacher(str(self.runs[seed] / "student"), "float32")[0], nullcontext()
        student, blocks = self._start(seed)
        if row == EQUAL_MEMORY:
            return self.teacher, limited(self.teacher, equal_tokens(self.teacher, student, self.tokenizer))
        return student, exact_alone(blocks, ALONE[row]) if row in ALONE else nullcontext()


def missing(
    models: Models, rows: Sequence[str], asked: Sequence[Asked], samples: int, seeds: int, split: str, results: Results
) -> Iterator[dict[str, Any]]:
    """The lines that are not there yet."""
    for row in rows:
        for seed in models.seeds(row, seeds):
            left = [one for one in asked if (row, _key(one, samples, split, seed)) not in results.read()]
            if not left:
                continue
            model, context = models.of(row, seed)
            with context:
                for one in left:
                    began = time.perf_counter()
                    found = evaluate(
                        model, models.tokenizer, one.group, samples, EVALUATION_SEED, split=split, **one.options
                    )
                    yield {
                        "row": row, "key": _key(one, samples, split, seed), "seed": seed, "group": one.group,
                        "options": one.options, "split": split, "samples": samples,
                        "right": "".join(str(int(hit)) for hit in found.hits), "by_depth": found.by_depth(PARTS),
                        "seconds": time.perf_counter() - began, **where("cpu"),
                    }  # fmt: skip


def _key(one: Asked, samples: int, split: str, seed: int) -> str:
    return f"{one.label} {split} {samples} {seed}"


def _cell(records: list[dict[str, Any]]) -> str:
    if not records:
        return "-"
    hits = np.array([[int(hit) for hit in record["right"]] for record in records], dtype=float)
    mean, low, high = accuracy([hits])
    return f"{mean:.0%} ({low:.0%}-{high:.0%}{f', {len(hits)} seeds' if len(hits) > 1 else ''})"


def _grid(lines: list[dict[str, Any]], group: str) -> list[str]:
    """The tables of a group: a row for each model, a column for each length."""
    mine = [line for line in lines if line["group"] == group]
    by: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in mine:
        options = dict(line["options"])
        across = f"{options.pop('frames')[0]} frames" if "frames" in options else f"{options.pop('sizes')[0][0]} lines"
        head = ", ".join(tell(name, value) for name, value in options.items())
        by.setdefault((head, across, line["row"]), []).append(line)
    parts = []
    for head in sorted({key[0] for key in by}, key=lambda told: [int(w) for w in told.split() if w.isdigit()]):
        columns = sorted({key[1] for key in by if key[0] == head}, key=lambda told: int(told.split()[0]))
        names = [row for row in ROWS if any(key[0] == head and key[2] == row for key in by)]
        body = [[row, *(_cell(by.get((head, column, row), [])) for column in columns)] for row in names]
        parts += [*([f"{head}:", ""] if head else []), markdown(["row", *columns], body), ""]
    return parts


def _depths(lines: list[dict[str, Any]]) -> list[str]:
    """Answers about needles by the quarter of the video that they lie in."""
    sums: dict[tuple[str, str], np.ndarray] = {}
    for line in lines:
        if line["group"] in ("needle", "needles"):
            label = Asked(line["group"], line["options"]).label
            key = (label, line["row"])
            sums[key] = sums.get(key, np.zeros((PARTS, 2), dtype=int)) + np.array(line["by_depth"])
    body = [[label, row, *(f"{right} of {n}" for right, n in found)] for (label, row), found in sums.items()]
    quarters = [f"{i / PARTS:.0%} to {(i + 1) / PARTS:.0%}" for i in range(PARTS)]
    return [markdown(["task", "row", *quarters], body), ""] if body else []


def write_page(results: Results, folder: Path, samples: int, split: str) -> Path:
    """`folder/far.md`, of all that has been asked so many times of a split."""
    lines = [line for line in results.read().values() if line["samples"] == samples and line["split"] == split]
    found = [row for row in ROWS if any(line["row"] == row for line in lines)]
    parts = [
        "# What is recalled from far away", "",
        f"Share of {samples} questions of the split `{split}` answered exactly, and its 95 % interval: Wilson's, or, "
        "where there are several seeds, over samples and seeds. A frame has 32 tokens. A guess at a digit is right in "
        "10 % of cases, the guess of one of k digits that are seen in 1 / k and a tenth of the rest.", "",
        markdown(["row", "what"], [[row, ROWS[row]] for row in found]), "",
    ]  # fmt: skip
    for group, head in (
        ("needle", "One needle"), ("needles", "The digit by one of many keys"),
        ("tracking", "The end of a chain of assignments"), ("page", "A line of a long page"),
    ):  # fmt: skip
        if grid := _grid(lines, group):
            parts += [f"## {head}", "", *grid]
    if table := _depths(lines):
        parts += ["## By depth", "", "Right answers by the part of the video that the needle is in.", "", *table]
    commits = sorted({f"{line['commit']}{'-dirty' if line.get('dirty') else ''}" for line in lines})
    parts += [f"Made by `python -m bench.runs.far --samples {samples}` at {', '.join(commits)}.", ""]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "far.md"
    path.write_text("\n".join(parts))
    return path


def main(
    samples: Annotated[int, typer.Option(min=1, help="Questions of each cell.")] = 200,
    row: Annotated[list[str] | None, typer.Option(help="Rows to measure; all that can be if none is named.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="Task groups; all if none is named.")] = None,
    frames: Annotated[list[int] | None, typer.Option(min=2, help="Lengths of videos.")] = None,
    keys: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of keys.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of untrained students.")] = 1,
    run: Annotated[list[Path] | None, typer.Option(help="Folders of finished runs, one a seed.")] = None,
    split: Annotated[str, typer.Option(help="val; test once, for what ships.")] = "val",
    results: Path = Path("bench/results/ablations/far.jsonl"),
    reports: Path = Path("bench/reports"),
) -> None:
    """Recall by keys, length and depth, beside what training has to beat."""
    groups = ("needle", *LONG_GROUPS)
    for name, given, known in (("row", row, ROWS), ("group", group, groups), ("split", [split], SPLITS[1:])):
        if unknown := [one for one in given or () if one not in known]:
            raise typer.BadParameter(f"--{name} must be among {', '.join(known)}, got {', '.join(unknown)}")
    asked = questions(group or groups, frames or FRAMES, keys or KEYS)
    for one in asked:
        try:
            generate(one.group, 1, 0, split, **one.options)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    models, kept = Models(load_config(Path("distill/configs/demo.toml")), run or []), Results(results)
    for line in missing(models, row or list(ROWS), asked, samples, seeds, split, kept):
        kept.append(line)
        label = Asked(line["group"], line["options"]).label
        print(f"{line['row']}, seed {line['seed']}, {label}: {line['right'].count('1')} of {samples}", flush=True)
        write_page(kept, reports, samples, split)
    print(write_page(kept, reports, samples, split))


if __name__ == "__main__":
    typer.run(main)
