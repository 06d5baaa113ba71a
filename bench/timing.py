"""One timer for CPU and CUDA: variants interleaved in one process, medians and percentiles."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pytest_benchmark.stats import Stats

Function = Callable[[], object]
SHORTEST = 200e-6  # seconds; faster calls are repeated within one sample, far above the clock's resolution
LONG = 50e-3  # seconds; what the caches hold before so long a call makes no difference to it
# glibc returns a block this large to the system and faults it in again at the next call, which costs more than any
# kernel here; M_MMAP_MAX and M_TRIM_THRESHOLD of <malloc.h> make it keep what it has.
MALLOPT = {-4: 0, -1: 2**31 - 1}
L2_BYTES = 256 * 2**20  # more than any GPU's L2


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p20: float
    p80: float
    rounds: int


def keep_memory() -> None:
    """Make freed memory be used again, for every variant alike."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in MALLOPT.items():
            libc.mallopt(option, value)


def summarise(samples: list[float]) -> Timing:
    stats = Stats()
    for sample in samples:
        stats.update(sample)
    ordered = stats.sorted_data
    at = (len(ordered) - 1) / 100
    return Timing(stats.median, ordered[round(20 * at)], ordered[round(80 * at)], stats.rounds)


def interleave(
    functions: dict[str, Function], device: str, *, seconds: float = 1.0, warmup: float = 0.2, rounds: tuple[int, int]
) -> dict[str, Timing]:
    """Time `functions` in turn, round after round, so that a machine that slows down slows all of them.

    Each gets about `seconds` in all after `warmup` seconds of warm-up, within `rounds` (fewest, most) samples.
    """
    inner, each = {}, {}
    for name, f in functions.items():
        inner[name], each[name] = warm_up(f, device, warmup)
    slowest = max(inner[n] * each[n] for n in functions)
    count = int(min(max(seconds / slowest, rounds[0]), rounds[1]))
    if device == "cuda":
        samples = _cuda_samples(functions, count)
    else:
        samples = _cpu_samples(functions, inner, {n for n in functions if each[n] > LONG}, count)
    return {name: summarise(mine) for name, mine in samples.items()}


def warm_up(f: Function, device: str, seconds: float) -> tuple[int, float]:
    """(calls per sample, seconds per call) after calling `f` for `seconds`, at least once."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        calls += 1
    each = (time.perf_counter() - start) / calls
    return (1 if device == "cuda" else max(1, round(SHORTEST / each))), each


def _cpu_samples(
    functions: dict[str, Function], inner: dict[str, int], long: set[str], rounds: int
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            f, calls = functions[name], inner[name]
            if name not in long:
                f()  # brings its own data back into the cache after the others
            start = time.perf_counter()
            for _ in range(calls):
                f()
            samples[name].append((time.perf_counter() - start) / calls)
    return samples


def _cuda_samples(functions: dict[str, Function], rounds: int) -> dict[str, list[float]]:
    """CUDA events, with the L2 flushed before each call and a backlog so that the launch is not what is timed."""
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(200_000)
            start.record()
            f()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [s.elapsed_time(e) * 1e-3 for s, e in pairs] for name, pairs in events.items()}
