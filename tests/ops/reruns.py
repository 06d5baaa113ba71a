"""The same tests on another instruction set, the same call on several numbers of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from linmu_ops import _registry

# Where a processor has more than AVX-512, its kernels of all types but bfloat16 are avx512's.
OLDER = ["avx2", pytest.param("avx512", marks=pytest.mark.sweep)]


def rerun_with_isa(isa: str, file: str, select: str) -> None:
    """Run the tests of `file` named `select` in a process whose kernels are of instruction set `isa`, or skip."""
    binary = _registry.binaries()["cpu"]
    levels = ("generic", "avx2", "avx512", "avx512bf16")
    if not binary.loaded:
        pytest.skip(f"{binary.file}: {binary.error}")
    if levels.index(isa) >= levels.index(binary.info["isa"]):
        pytest.skip(f"this processor's best is {binary.info['isa']}, which the other tests use")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", select]
    run = subprocess.run(command, env={**os.environ, "LINMU_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def assert_same_bits(run: Callable[[], Sequence[Tensor]], threads: Sequence[int]) -> None:
    """Fail unless `run()` gives the same bits at each of these numbers of CPU threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
