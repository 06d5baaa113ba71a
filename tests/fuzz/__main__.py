"""`make fuzz`: random cases without a fixed seed, for a given time, by the kernels of every instruction set.

python -m tests.fuzz 600                    every target for 600 seconds
python -m tests.fuzz 60 ssd_scan            one target
python -m tests.fuzz ssd_scan '{"B": 1, ..}'   one case again
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import UnsatisfiedAssumption

from linmu_ops import _registry

from . import TARGETS, prepare

ROUND = 25  # cases of one target, then comes the next


class Fuzzer:
    """Random cases of a target until one fails, shrunk to its smallest."""

    def __init__(self, name: str) -> None:
        self.cases, self.check = TARGETS[name]
        self.count, self.failure, self.last = 0, "", None

    def run(self) -> None:
        """One round."""

        @settings(
            max_examples=ROUND, deadline=None, database=None, derandomize=False, report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        @given(self.cases)
        def one(case: dict[str, Any]) -> None:
            self.last = case
            self.check(case)
            self.count += 1

        try:
            one()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".split("\n")[0]


def fuzz(seconds: float, names: list[str]) -> int:
    """Run the targets in turns; how many failed."""
    isa = _registry.binaries()["cpu"].info["isa"]
    fuzzers = {name: Fuzzer(name) for name in names}
    end = time.monotonic() + seconds
    queue = collections.deque(names)
    while queue and time.monotonic() < end:
        name = queue.popleft()
        fuzzers[name].run()
        if not fuzzers[name].failure:
            queue.append(name)
            continue
        print(f"FAILED {name} on {isa}: {fuzzers[name].failure}", flush=True)
        print(f"  LINMU_CPU_ISA={isa} python -m tests.fuzz {name} '{json.dumps(fuzzers[name].last)}'", flush=True)
    counts = ", ".join(f"{name} {f.count}" for name, f in fuzzers.items())
    print(f"{isa}: {sum(f.count for f in fuzzers.values())} cases ({counts})", flush=True)
    return sum(bool(f.failure) for f in fuzzers.values())


def main(arguments: list[str]) -> int:
    seconds, *names = arguments or ["600"]
    if seconds in TARGETS:
        try:
            TARGETS[seconds][1](json.loads(names[0]))
        except UnsatisfiedAssumption:
            print("out of range")
        return 0
    levels = ("avx2", "avx512", "avx512bf16")
    best = _registry.binaries()["cpu"].info["isa"]
    if "LINMU_CPU_ISA" in os.environ or best not in levels:
        return int(fuzz(float(seconds), names or list(TARGETS)) > 0)
    command = [sys.executable, "-m", "tests.fuzz", *(arguments or [seconds])]
    isas = levels[: levels.index(best) + 1]
    running = [subprocess.Popen(command, env={**os.environ, "LINMU_CPU_ISA": isa}) for isa in isas]
    return int(any([process.wait() for process in running]))


if __name__ == "__main__":
    prepare()
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
