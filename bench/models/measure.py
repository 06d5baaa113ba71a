"""One row per variant of a prefill or a decode: checked for equal results, then timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bench.measure import TOLERANCE
from bench.timing import summarise
from linmu_models.cache import cache_bytes

from . import memory
from .inputs import decoder_inputs, whole_inputs
from .shapes import Shape
from .variants import FREE, PLAIN, Decode, Prefill, Variant

Row = dict[str, Any]
STEPS = 8  # tokens of one sample of a decode
SAMPLES = 20  # at most
LONG = 10.0  # seconds; beside so long a call, what a first call does once (libraries, fresh memory) is small


@dataclass(frozen=True)
class Task:
    """What is measured: `kind` "prefill" or "decode", `part` "decoder" or "whole"."""

    kind: str
    part: str
    tokens: int
    batch: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.part}, {self.tokens} tokens, batch {self.batch}"


def _seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


@dataclass
class Run:
    """A variant that is ready: `call` gives logits, `after` goes back to where it began."""

    call: Callable[[], Tensor]
    after: Callable[[], object]
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    first: float = 0.0  # seconds of the first call


def _ready(task: Task, variant: Variant, prefills: dict[str, Prefill], device: str) -> Run:
    if task.kind == "decode":
        decode = Decode(variant, task.tokens, task.batch, STEPS)
        return Run(decode, decode.rewind, cache_bytes(decode.cache))
    prefill = prefills.setdefault(variant.name, Prefill(variant))
    if task.part == "whole":
        inputs = whole_inputs(variant.model, task.tokens, task.batch)
        return Run(lambda: prefill.whole(**inputs), lambda: None)
    layout, inputs = decoder_inputs(variant.model, task.tokens, task.batch)
    rest = prefill.prepare(layout)
    return Run(lambda: prefill.decoder(**inputs, **rest), lambda: None)


def _first_call(run: Run, device: str) -> Tensor:
    """Its logits; notes memory and time of the first call that compiles nothing."""
    logits = None
    while True:
        before = _graphs()
        start = time.perf_counter()
        got, run.peak_bytes = memory.peak_of(run.call, device)
        run.first = time.perf_counter() - start
        logits = got.float() if logits is None else logits
        run.after()
        if _graphs() == before:
            return logits


def _different(got: Tensor, want: Tensor, dtype: torch.dtype) -> str | None:
    """How logits differ from those of the plain variant, or None."""
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    return None if error <= TOLERANCE[dtype] * scale else f"logits differ by {error:.1e} at a scale of {scale:.1e}"


def measure(
    task: Task, shape: Shape, found: list[Variant], prefills: dict[str, Prefill], *, seconds: float,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:  # fmt: skip
    """One row per variant; `status` is "ok" or why there is no time.

    Args:
        prefills: what has been compiled; filled on the way, for the next task.
        seconds: of samples for each variant, at least one; where the first call takes longer, and more than `LONG`,
            it is the only sample.
    """
    device, dtype = found[0].model.device.type, found[0].model.dtype
    itemsize = dtype.itemsize
    ready: dict[str, Run] = {}
    status: dict[str, str] = {}
    logits: dict[tuple[bool, bool], Tensor] = {}
    for variant in found:
        say(f"{task}: {variant.name}, first call")
        status[variant.name] = "ok"
        need = memory.needed(shape, task.kind, variant.is_student, task.tokens, task.batch, itemsize)
        free = memory.available(device)
        if free is not None and need > free:
            status[variant.name] = f"not run: needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} are free"
            continue
        try:
            run = _ready(task, variant, prefills, device)
            got = _first_call(run, device)
        except Exception as e:
            # A row that says so, whatever went wrong, and on with the next.
            words = str(e).strip().splitlines() or [""]
            status[variant.name] = f"failed: {type(e).__name__}: {words[0]}"[:300]
            continue
        if different := _different(got, logits.setdefault((variant.is_student, variant.free), got), dtype):
            status[variant.name] = f"not timed: {different}"
            continue
        ready[variant.name] = run
    say(f"{task}: samples")
    times = _samples(ready, device, seconds)
    rows = []
    for variant in found:
        name = variant.name
        row: Row = dict(
            kind=task.kind, part=task.part, tokens=task.tokens, batch=task.batch, variant=name, status=status[name],
            student=variant.is_student, compiled=variant.compiled,
        )  # fmt: skip
        if name in ready:
            t = summarise(times[name])
            row |= dict(
                seconds=t.median, seconds_p20=t.p20, seconds_p80=t.p80, samples=t.rounds,
                peak_bytes=ready[name].peak_bytes, cache_bytes=ready[name].cache_bytes,
            )  # fmt: skip
            if task.kind == "decode":
                row |= dict(steps=STEPS, tokens_per_second=task.batch * STEPS / t.median)
                row |= dict(state="of a prefix") if variant.is_student else {}
        rows.append(row)
    return with_ratios(rows)


def _samples(ready: dict[str, Run], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each, in turn, starting with another one each round."""
    samples: dict[str, list[float]] = {n: [] for n in ready}
    names = list(ready)
    for name, run in ready.items():
        if run.first > max(seconds, LONG):
            samples[name].append(run.first)
    for i in range(SAMPLES):
        for name in names[i % max(len(names), 1) :] + names[: i % max(len(names), 1)]:
            run, mine = ready[name], samples[name]
            if mine and sum(mine) + mine[-1] > seconds:
                continue
            before, took = _graphs(), _seconds(run.call, device)
            run.after()
            if _graphs() == before:
                mine.append(took)
    return samples


def with_ratios(rows: list[Row]) -> list[Row]:
    """Students' rows with how many times faster they are than the plain teacher, and than the fastest one, and how many
    times as long they take as one without attention."""
    teachers = {r["variant"]: r["seconds"] for r in rows if not r["student"] and "seconds" in r}
    free = teachers.pop(FREE, None)
    for row in rows:
        if row["student"] and "seconds" in row and free is not None:
            row["times_free"] = row["seconds"] / free
        if row["student"] and "seconds" in row and PLAIN in teachers:
            row["times_plain"] = teachers[PLAIN] / row["seconds"]
            row["times_strongest"] = min(teachers.values()) / row["seconds"]
            row["strongest"] = min(teachers, key=teachers.__getitem__)
    return rows
