"""What Triton compiles for a call of each op, without a GPU: `python -m tests.triton_kernels.compiles` prints counts.

Nothing is compiled or launched then: Triton's own hook tells what it would compile for an H100. With --seconds it is
compiled, in this process alone and without a cache, and each op's line is the seconds that its first call takes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from linmu_ops import _native
from linmu_ops._testing import run_small

# Of each op a first call of a model's sizes, and calls of the same model that are longer, shorter, or of more rows.
LENGTHS = [dict(L=n) for n in (1, 16, 63, 64, 65, 200)] + [dict(B=1), dict(B=3)]
CALLS = {
    "ssd_scan": (dict(L=128, P=128, N=128), LENGTHS),
    "gated_delta_scan": (dict(L=64, K=128, V=128), LENGTHS),
    "window_attention": (
        dict(grid=(4, 4, 8), P=128, R=128),
        [dict(grid=(2, 3, 4)), dict(grid=(7, 5, 5)), dict(B=1), dict(B=3)],
    ),
    "causal_conv1d": (dict(L=128, D=256), LENGTHS),
    "branch_mix_norm": (dict(L=128, D=256), LENGTHS),
    "gated_norm": (dict(L=128, D=256), LENGTHS),
    "causal_conv1d_step": (dict(D=256), [dict(B=1), dict(B=16)]),
    "ssd_step": (dict(P=128, N=128), [dict(B=1), dict(B=16)]),
    "gated_delta_step": (dict(K=128, V=128), [dict(B=1), dict(B=16)]),
}


class H100:
    """As much of a driver as compiling needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled(op: str, sizes: dict[str, object], known: set[str]) -> list[str]:
    """Names of the kernels that a call, with its gradients, compiles beyond those that are known."""
    found: list[str] = []

    def hook(key: str, fn: object, **_: object) -> bool:
        if (full := f"{fn.name} {key}") not in known:  # type: ignore[attr-defined]
            known.add(full)
            found.append(fn.name)  # type: ignore[attr-defined]
        return True

    knobs.runtime.jit_cache_hook = hook
    run_small(op, "triton", dtype=torch.bfloat16, **sizes)
    return found


def counts() -> dict[str, dict[str, int]]:
    """Per op: kernels of the first call, and of all the others."""
    found = {}
    for op, (first, others) in CALLS.items():
        known: set[str] = set()
        once = compiled(op, first, known)
        found[op] = dict(first=len(once), others=sum(len(compiled(op, first | more, known)) for more in others))
    return found


def seconds() -> dict[str, float]:
    """Per op, what the first call takes to compile."""
    total = 0.0
    run = JITFunction.run

    def warm(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        nonlocal total
        start = time.process_time(), os.times().children_user
        out = run(self, *args, grid=grid, warmup=True, **kwargs)
        total += time.process_time() - start[0] + os.times().children_user - start[1]  # ptxas is a process
        return out

    JITFunction.run = warm
    found = {}
    for op, (first, _) in CALLS.items():
        total = 0.0
        run_small(op, "triton", dtype=torch.bfloat16, **first)
        found[op] = round(total, 2)
    return found


def main(argv: list[str]) -> None:
    torch.set_num_threads(1)
    for op in CALLS:
        assert (_native.HERE / "triton_kernels" / f"{op}.py").exists()
        __import__(f"linmu_ops.triton_kernels.{op}")
    os.environ["TRITON_INTERPRET"] = "1"  # from here on it only lets the registry take tensors of a CPU
    driver.set_active(H100())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        print(json.dumps(seconds() if "--seconds" in argv else counts(), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
