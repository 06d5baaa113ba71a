"""What near and kept tokens answer without any training, and what the state of what is far adds to them.

    python -m bench.runs.kept [--samples 40] [--row kept-64] [--frames 64]

The shipped teacher is converted and calibrated as in the demo. Then needles are asked about in videos of several
lengths. An answer counts if each of its tokens is the most likely one after the right ones before it: as exact as a
greedy answer. Goes on where it stopped: results are lines of bench/results/ablations/kept.jsonl, the page is
bench/reports/kept.md.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import nn

import linmu_models
from linmu_distill.config import EVALUATION_SEED, Config, load_config
from linmu_distill.data import Processor, generate
from linmu_distill.evaluation import wilson_interval
from linmu_distill.sources import build_source
from linmu_distill.teacher import load_teacher
from linmu_ops._tables import markdown
from linmu_ops.nn import exact

from ..provenance import where
from .sheet import between, check_named, write_sheet
from .table import Results

FRAMES = (10, 16, 32, 64, 128, 256)
NEVER = 1e4  # nats that leave nothing to what is far


class Variant(NamedTuple):
    """A row: so many tokens are kept, and what is far counts less than was fitted, by so many nats.

    Attributes:
        limited: whether the weight of what is far stops to grow with its number where calibration saw no more.
    """

    kept: int
    closed: float
    about: str
    limited: bool = True


ROWS = {
    "kept-0": Variant(0, NEVER, "windows and sinks alone"),
    "kept-16": Variant(16, NEVER, "16 kept tokens for each key/value head, nothing of what is far"),
    "kept-64": Variant(64, NEVER, "64 kept tokens, nothing of what is far"),
    "kept-128": Variant(128, NEVER, "128 kept tokens, nothing of what is far"),
    "kept-256": Variant(256, NEVER, "256 kept tokens, nothing of what is far"),
    "far-closed": Variant(64, exact._CLOSED, "64 kept tokens, the share of what is far near 0, as it starts"),
    "far-open": Variant(64, 0.0, "64 kept tokens, the share of what is far as calibration fits it"),
}


@torch.no_grad()
def right(model: Any, processor: Processor, frames: int, samples: int) -> list[bool]:
    """Which needles the model finds in videos of so many frames."""
    found: list[bool] = []
    needles = generate("needle", samples, EVALUATION_SEED, "val", frames=[frames, frames])
    step = max(1, 128 // frames)
    for start in range(0, samples, step):
        batch = dict(processor(needles[start : start + step]))
        labels = batch.pop("labels")
        said = model(**batch, use_cache=False).logits.argmax(-1)
        for row, answers in zip(said, labels, strict=True):
            at = (answers != -100).nonzero()[:, 0]
            first = at[: 1 + int((at.diff() == 1).long().cumprod(0).sum())]  # of the first question
            found.append(torch.equal(row[first - 1], answers[first]))
    return found


@contextmanager
def varied(blocks: list[Any], variant: Variant) -> Iterator[None]:
    """While open, calibrated blocks are those of a row."""
    before = [(b.windows.sizes, b.share.bias.detach().clone(), b.far_limit.clone()) for b in blocks]
    for block in blocks:
        block.windows.sizes = block.windows.sizes._replace(kept=variant.kept)
        block.share.bias.data += exact._CLOSED - variant.closed
        if not variant.limited:
            block.far_limit.fill_(exact.NO_LIMIT)
    yield
    for block, (sizes, bias, limit) in zip(blocks, before, strict=True):
        block.windows.sizes = sizes
        block.share.bias.data.copy_(bias)
        block.far_limit.copy_(limit)


def calibrated(teacher: Any, tokenizer: Any, config: Config) -> nn.Module:
    """A student as it is before the first stage of a run."""
    student = linmu_models.convert(teacher, config.block).eval()
    source = build_source(config.data, config.teacher, teacher, tokenizer, config.seed * 4)
    batches = [dict(source.processor(source.samples(i))) for i in range(4)]
    linmu_models.calibrate(student, teacher, batches, step_sizes=True)
    return student


def run(samples: int, rows: list[str], lengths: list[int], results: Results, reports: Path) -> Path:
    """Measure what is missing, and write the page."""
    config = load_config(Path("distill/configs/demo.toml"))
    teacher, tokenizer = load_teacher(config.teacher, "float32")
    processor = Processor.from_config(teacher.config, tokenizer)
    student: Any = None
    for name in ("teacher", *rows):
        for frames in lengths:
            key = f"{frames} {samples}"
            if (name, key) in results.read():
                continue
            began = time.perf_counter()
            if name == "teacher":
                hits = right(teacher, processor, frames, samples)
            else:
                student = student or calibrated(teacher, tokenizer, config)
                with varied([layer.self_attn for layer in student.linmu_layers()], ROWS[name]):
                    hits = right(student, processor, frames, samples)
            facts = {"row": name, "key": key, "frames": frames, "samples": samples, "hits": hits}
            results.append({**facts, "seconds": time.perf_counter() - began, **where("cpu")})
            print(f"{name}, {frames} frames: {sum(hits)} of {samples}", flush=True)
        write_page(samples, results, reports)
    return write_page(samples, results, reports)


def write_page(samples: int, results: Results, folder: Path) -> Path:
    """`folder/kept.md`, of all rows that have been measured."""
    found = {
        (record["row"], record["frames"]): sum(record["hits"])
        for record in results.read().values()
        if record["samples"] == samples
    }
    lengths = [frames for frames in FRAMES if any(at == frames for _, at in found)]
    named = [name for name in ("teacher", *ROWS) if any(row == name for row, _ in found)]
    about = {"teacher": "attention to every token", **{name: row.about for name, row in ROWS.items()}}

    def cell(right: int | None) -> str:
        if right is None:
            return "-"
        low, high = wilson_interval(right, samples)
        return f"{right} ({between(low, high)})"

    rows = [[name, about[name], *(cell(found.get((name, frames))) for frames in lengths)] for name in named]
    parts = [
        "# Near and kept tokens, without training", "",
        f"Right answers of {samples} about a needle in videos of {lengths[0]} to {lengths[-1]} frames of 32 tokens, in "
        "brackets the 95 % interval. The shipped teacher, converted with the options of `demo.toml` and calibrated on "
        "four batches. Nothing is trained.", "",
        markdown(["row", "what", *(f"{frames} frames" for frames in lengths)], rows), "",
        "Made by `python -m bench.runs.kept`.", "",
    ]  # fmt: skip
    return write_sheet(folder, "kept.md", parts)


def main(
    samples: Annotated[int, typer.Option(min=1, help="Needles of each length.")] = 40,
    row: Annotated[list[str] | None, typer.Option(help="Rows to measure; all of them if none is named.")] = None,
    frames: Annotated[list[int] | None, typer.Option(help="Lengths to measure; all of them if none is named.")] = None,
) -> None:
    """Needles by what is near, kept and far, untrained."""
    check_named("row", row, ROWS)
    check_named("frames", frames, FRAMES)
    results = Results(Path("bench/results/ablations/kept.jsonl"))
    print(run(samples, row or list(ROWS), frames or list(FRAMES), results, Path("bench/reports")))


if __name__ == "__main__":
    typer.run(main)
