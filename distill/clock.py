"""Where the time of a training goes: to the loader, the teacher, the student, the optimiser, or to saving."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.profiler import record_function

REST = "rest"
PARTS = ("loader", "teacher", "student", "optimiser", "saving", REST)
_running: ContextVar["Clock | None"] = ContextVar("linmu_clock", default=None)


class Clock:
    """Divides the time while it is open between `PARTS`; what is outside every `spent` is "rest".

    On CUDA the borders between parts are events in the device's current stream. So each part gets the time that the
    stream had for it, the wait for the host included, and work that the host has only queued is not taken for done.
    Events are read once they have passed: no step waits for them. On other devices the host's clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._part = REST
        self._borders: deque[tuple[str, Any]] = deque()
        """The part that ended there, and when."""

    def __enter__(self) -> "Clock":
        self._last = self._now()
        self._token = _running.set(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _running.reset(self._token)

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def switch(self, part: str) -> str:
        """From now on time goes to `part`. Returns the part that it went to."""
        before, self._part = self._part, part
        self._borders.append((before, self._now()))
        return before

    def lap(self, *, wait: bool = False) -> dict[str, float]:
        """Seconds of each part since the last lap. What a GPU has yet to do is in a later one, or with `wait` in this
        one."""
        self.switch(self._part)
        if wait and self._on_cuda:
            self._borders[-1][1].synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        while self._borders and (not self._on_cuda or self._borders[0][1].query()):
            part, now = self._borders.popleft()
            seconds[part] += self._last.elapsed_time(now) / 1e3 if self._on_cuda else now - self._last
            self._last = now
        return seconds


@contextmanager
def spent(part: str) -> Iterator[None]:
    """What is done inside counts as `part`, for the clock that runs and for torch.profiler (`linmu.<part>`). Within
    another part it counts as this one alone. Also a decorator."""
    clock = _running.get()
    if clock is None:
        yield
        return
    before = clock.switch(part)
    try:
        with record_function(f"linmu.{part}"):
            yield
    finally:
        clock.switch(before)


def as_record(seconds: Mapping[str, float]) -> dict[str, float]:
    """A lap as a line of the metrics has it: all seconds of it, and each part's share of them."""
    total = sum(seconds.values())
    return {"step_seconds": total, **{f"share/{part}": value / (total or 1.0) for part, value in seconds.items()}}


def of_record(record: Mapping[str, float]) -> dict[str, float]:
    """The lap of a line of the metrics. A line of an older release has none."""
    return {part: record.get("step_seconds", 0.0) * record.get(f"share/{part}", 0.0) for part in PARTS}


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each part's share of the whole; empty where nothing was measured."""
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()} if total else {}
