"""What is recalled from far away, by length and depth: a needle, many keys, chains of assignments, long pages.

    python -m bench.runs.far [--samples 200] [--row teacher] [--group needles] [--frames 64] [--keys 4] [--seeds 3]
    python -m bench.runs.far --run runs/demo --run runs/demo-1 --run runs/demo-2     # finished runs, seeds 0, 1, 2

Beside the shipped teacher and the students of `demo.toml` stand the rows that training has to beat: a teacher whose
cache is as small as the student's state, windows alone, near and kept tokens, zero steps. The groups that lie within
the windows are asked too. Answers are greedy. All rows are asked a part of each cell before any is asked the next, so
that a run that is stopped early is fair. Goes on where it stopped: results are lines of
bench/results/ablations/far.jsonl, the page is bench/reports/far.md.
"""

import copy
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import linmu_models
from linmu_distill.config import EVALUATION_SEED, Config, load_config
from linmu_distill.data import GROUPS, LONG_GROUPS, SPLITS, generate
from linmu_distill.evaluate import Asked
from linmu_distill.evaluate import untrained as start_of
from linmu_distill.evaluation import evaluate
from linmu_distill.limited import EQUAL_MEMORY, equal_tokens, limited
from linmu_distill.run import CALIBRATION_BATCHES, TEACHER
from linmu_distill.sources import build_source
from linmu_distill.student import ALONE, exact_alone, mixers, new_student
from linmu_distill.teacher import load_teacher
from linmu_ops.nn import exact

from ..provenance import where
from .far_page import CHANGED, DEPTHS, NEAR_KEPT, ROWS, TRAINED, WINDOWS, write_page
from .kept import NEVER, Variant, varied
from .sheet import check_named
from .table import Results

FRAMES, KEYS, HOPS, LINES = (8, 16, 32, 64, 128, 256), (1, 4, 16, 32), (1, 2, 4), (48, 96)
NEAR_GROUPS = tuple(group for group in GROUPS if group != "needle")
FULL = 64  # frames; of longer videos fewer are asked about, as many frames in all
VARIANTS = dict(
    zip(
        CHANGED,
        (
            (NEAR_KEPT, Variant(256, NEVER, "")),
            (NEAR_KEPT, Variant(1024, NEVER, "")),
            (TRAINED, Variant(256, exact._CLOSED, "")),
            (TRAINED, Variant(128, exact._CLOSED + 2, "")),
            (TRAINED, Variant(128, exact._CLOSED - 2, "")),
            (TRAINED, Variant(128, exact._CLOSED, "", limited=False)),
        ),
        strict=True,
    )
)
"""Row -> the row that it changes, and how."""
PART = 40  # questions that are asked of each row in turn


def questions(groups: Sequence[str], frames: Sequence[int], keys: Sequence[int]) -> list[Asked]:
    """What is asked of each row."""
    asked = [Asked(group, {}) for group in groups if group in NEAR_GROUPS]
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


def fewer(one: Asked, count: int) -> int:
    """So many questions, or, about videos longer than `FULL` frames, as many as have no more frames in all."""
    frames = one.options.get("frames", [FULL])[0]
    return max(1, count * FULL // max(frames, FULL))


@contextmanager
def remembered(module: torch.nn.Module) -> Iterator[None]:
    """While open, a module that sees numbers for the second time returns what it made of them at first.

    All rows have the same vision tower, which takes half of the time.
    """
    forward, known = module.forward, {}

    def once(numbers: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        key = _digest([numbers, *args, *(part for item in sorted(kwargs.items()) for part in item)])
        if key not in known:
            known[key] = forward(numbers, *args, **kwargs)
        return copy.copy(known[key])  # the caller changes what it is given

    module.forward = once
    try:
        yield
    finally:
        del module.forward


def _digest(values: Sequence[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.digest()


class Models:
    """The model of each row, made when it is first asked for. All of them see through the teacher's vision tower."""

    def __init__(self, config: Config, runs: Sequence[Path]) -> None:
        self.config, self.runs = config, runs
        self.teacher, self.tokenizer = load_teacher(config.teacher, "float32")
        self._starts: dict[int, tuple[Any, list[Any]]] = {}
        self._trained: dict[int, Any] = {}
        self._tokens: int | None = None

    def seeds(self, row: str, seeds: int) -> range:
        """The seeds of a row; a teacher has one, and so have windows alone, of which nothing is drawn."""
        one = {TEACHER: 1, EQUAL_MEMORY: 1, WINDOWS: 1}
        row = VARIANTS[row][0] if row in VARIANTS else row
        return range({**one, TRAINED: len(self.runs)}.get(row, seeds))

    def _start(self, seed: int) -> tuple[Any, list[Any]]:
        """A student before training: a run's own where there is a run of the seed."""
        if seed not in self._starts:
            if seed < len(self.runs):
                student = start_of(self.runs[seed], self.teacher)
                self._starts[seed] = (student, list(mixers(student, self.teacher).values()))
            else:
                chosen = self.config.model_copy(update={"seed": seed})
                self._starts[seed] = untrained(self.teacher, self.tokenizer, chosen)
            self._share_tower(self._starts[seed][0])
        return self._starts[seed]

    def _share_tower(self, model: Any) -> None:
        """Give a model the teacher's vision tower, which it has a copy of.

        Raises:
            ValueError: its own is another one.
        """
        own, theirs = model.model.visual.state_dict(), self.teacher.model.visual.state_dict()
        if own.keys() != theirs.keys() or not all(torch.equal(own[name], theirs[name]) for name in own):
            raise ValueError("each run must have the vision tower of its teacher, got another one")
        model.model.visual = self.teacher.model.visual

    def of(self, row: str, seed: int) -> tuple[Any, AbstractContextManager[Any]]:
        """The model, and what must be open while it is asked."""
        if row == TEACHER:
            return self.teacher, nullcontext()
        if row in VARIANTS:
            of, variant = VARIANTS[row]
            model = self.of(TRAINED, seed)[0] if of == TRAINED else self._start(seed)[0]
            return model, varied(list(mixers(model, self.teacher).values()), variant)
        if row == TRAINED:
            if seed not in self._trained:
                self._trained[seed] = load_teacher(str(self.runs[seed] / "student"), "float32")[0]
                self._share_tower(self._trained[seed])
            return self._trained[seed], nullcontext()
        student, blocks = self._start(seed)
        if row == EQUAL_MEMORY:
            self._tokens = self._tokens or equal_tokens(self.teacher, student, self.tokenizer)
            return self.teacher, limited(self.teacher, self._tokens)
        return student, exact_alone(blocks, ALONE[row]) if row in ALONE else nullcontext()


def missing(
    models: Models, rows: Sequence[str], asked: Sequence[Asked], samples: int, seeds: int, split: str, results: Results
) -> Iterator[dict[str, Any]]:
    """The lines that are not there yet: a part of a cell each."""
    turns = [(row, seed) for row in rows for seed in models.seeds(row, seeds)]
    for start in range(0, samples, PART):
        for one in asked:
            first, last = fewer(one, start) if start else 0, fewer(one, min(start + PART, samples))
            known = results.read()
            left = [turn for turn in turns if (turn[0], _key(one, first, last, split, turn[1])) not in known]
            with remembered(models.teacher.model.visual):
                for row, seed in left if last > first else ():
                    model, context = models.of(row, seed)
                    with context:
                        began = time.perf_counter()
                        found = evaluate(
                            model, models.tokenizer, one.group, last - first, EVALUATION_SEED,
                            split=split, first=first, **one.options,
                        )  # fmt: skip
                        yield {
                            "row": row, "key": _key(one, first, last, split, seed), "seed": seed, "group": one.group,
                            "options": one.options, "split": split, "first": first, "samples": last - first,
                            "right": "".join(str(int(hit)) for hit in found.hits), "by_depth": found.by_depth(DEPTHS),
                            "seconds": time.perf_counter() - began, **where("cpu"),
                        }  # fmt: skip


def _key(one: Asked, first: int, last: int, split: str, seed: int) -> str:
    return f"{one.label} {split} {last if first == 0 else f'{first}-{last}'} {seed}"


def main(
    samples: Annotated[
        int, typer.Option(min=1, help=f"Questions of each cell; fewer of videos longer than {FULL} frames.")
    ] = 200,
    row: Annotated[list[str] | None, typer.Option(help="Rows to measure; all that can be if none is named.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="Task groups; all if none is named.")] = None,
    frames: Annotated[list[int] | None, typer.Option(min=2, help="Lengths of videos.")] = None,
    keys: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of keys.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of untrained students.")] = 1,
    run: Annotated[list[Path] | None, typer.Option(help="Folders of finished runs, by seed.")] = None,
    split: Annotated[str, typer.Option(help="val; test once, for what ships.")] = "val",
    results: Path = Path("bench/results/ablations/far.jsonl"),
    reports: Path = Path("bench/reports"),
) -> None:
    """Recall by keys, length and depth, beside what training has to beat."""
    groups = (*NEAR_GROUPS, "needle", *LONG_GROUPS)
    check_named("row", row, ROWS | CHANGED)
    check_named("group", group, groups)
    check_named("split", [split], SPLITS[1:])
    for folder in run or ():
        if not (folder / "student" / "config.json").exists():
            raise typer.BadParameter(f"--run must be the folder of a finished run, got {folder}")
    asked = questions(group or groups, frames or FRAMES, keys or KEYS)
    for one in asked:
        try:
            generate(one.group, 1, 0, split, **one.options)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    models, kept = Models(load_config(Path("distill/configs/demo.toml")), run or []), Results(results)
    try:
        for line in missing(models, row or list(ROWS), asked, samples, seeds, split, kept):
            kept.append(line)
            label, right = Asked(line["group"], line["options"]).label, line["right"].count("1")
            print(f"{line['row']}, seed {line['seed']}, {label}: {right} of {line['samples']}", flush=True)
    finally:
        print(write_page(kept, reports))


if __name__ == "__main__":
    typer.run(main)
