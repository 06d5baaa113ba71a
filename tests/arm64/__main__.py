"""`make arm64`: the kernels of csrc/cpu compiled for arm64, and run under qemu-user against the references' numbers.

It needs `aarch64-linux-gnu-g++` (or what ARM64_CXX names) and `qemu-aarch64` (or ARM64_RUN); on Debian, the packages
g++-aarch64-linux-gnu and qemu-user. The processor is emulated: nothing is timed, and the orders in which a real one
may do things in several threads are not tried. Every kernel is compiled and linked; those of `CASES` are run, forward.
"""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import linmu_ops
from linmu_ops._testing import run_op

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "arm64"
FLAGS = "-std=c++20 -O2 -Wall -Wextra -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized -Wno-uninitialized"
KERNELS = "-DLINMU_ISA=generic -ffp-contract=fast -fno-math-errno"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ROUNDINGS = 4  # of the dtype, of a result's norm

# What the kernel reads, in the order of run.cpp; which of these it writes; what the reference makes of it.
Case = tuple[list[int | Tensor], list[Tensor], Callable[[], list[Tensor]]]


def main() -> int:
    compiler = shlex.split(os.environ.get("ARM64_CXX", "aarch64-linux-gnu-g++"))
    runner = shlex.split(os.environ.get("ARM64_RUN", "qemu-aarch64"))
    for tool, package in ((compiler[0], "g++-aarch64-linux-gnu"), (runner[0], "qemu-user")):
        if shutil.which(tool) is None:
            print(f"arm64: {tool} must be installed (Debian: {package}), got none", file=sys.stderr)
            return 1
    program = build(compiler)
    failed = 0
    for name, make in CASES.items():
        for dtype in DTYPES:
            for number, case in enumerate(make(dtype)):
                wrong = run([*runner, str(program)], name, case)
                failed += wrong is not None
                print(f"{name} {str(dtype)[6:]} {number}: {wrong or 'ok'}", flush=True)
    return 1 if failed else 0


def build(compiler: list[str]) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    kernels = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    headers = [f.stat().st_mtime for f in (ROOT / "csrc").glob("*/*.h")]

    def compiled(source: Path) -> Path:
        to = BUILD / f"{source.stem}.o"
        if not to.exists() or to.stat().st_mtime < max(*headers, source.stat().st_mtime):
            flags = shlex.split(f"{FLAGS} {KERNELS}" if source in kernels else FLAGS)
            subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(to)], check=True)
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*kernels, Path(__file__).parent / "run.cpp"]))
    program = BUILD / "run"
    # Static, so that the emulator needs no arm64 system.
    subprocess.run([*compiler, "-static", *map(str, objects), "-o", str(program)], check=True)
    return program


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def run(command: list[str], name: str, case: Case) -> str | None:
    """None where the kernel's results are the reference's, else what is wrong."""
    given, written, reference = case
    with (BUILD / "input").open("wb") as file:
        for value in given:
            data = raw(value) if isinstance(value, Tensor) else b""
            file.write(struct.pack("<q", len(data) if isinstance(value, Tensor) else value) + data)
    (BUILD / "output").unlink(missing_ok=True)
    done = subprocess.run([*command, name, str(BUILD / "input"), str(BUILD / "output")], capture_output=True, text=True)
    if done.returncode:
        return f"ended with status {done.returncode}: {done.stderr.strip()}"
    data, at = (BUILD / "output").read_bytes(), 0
    for number, (mine, want) in enumerate(zip(written, reference(), strict=True)):
        size = mine.numel() * mine.element_size()
        got = torch.frombuffer(bytearray(data[at : at + size]), dtype=mine.dtype).view(mine.shape).double()
        at += size
        error = float((got - want).norm() / want.norm())
        if not error <= ROUNDINGS * torch.finfo(mine.dtype).eps:
            return f"result {number} differs by {error:.1e} of its norm"
    return None if at == len(data) else f"{len(data)} bytes came back, not {at}"


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def _random(*shape: int, dtype: torch.dtype, below: float | None = None) -> Tensor:
    """Of a normal distribution; or even in [0, below)."""
    values = torch.randn(shape) if below is None else torch.rand(shape) * below
    return values.to(dtype)


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def ssd_step(dtype: torch.dtype) -> Iterator[Case]:
    acc = _sums(dtype)
    for B, H, P, N, Gx, Gb, Gc in ((2, 4, 16, 32, 4, 2, 1), (1, 3, 5, 7, 1, 3, 3)):
        state, x = _random(B, H, P, N, dtype=acc), _random(B, Gx, P, dtype=dtype)
        dt, A, D = (_random(*s, dtype=acc, below=1) for s in ((B, H), (H,), (H,)))
        b, c = _random(B, Gb, N, dtype=dtype), _random(B, Gc, N, dtype=dtype)
        y, A = torch.zeros(B, H, P, dtype=dtype), -A

        def reference(inputs=(state, x, dt, A, b, c, D)) -> list[Tensor]:  # type: ignore[no-untyped-def]
            *wide, skip = _wide(*inputs)
            out = linmu_ops.ssd_step(*wide, D=skip)
            return [wide[0], out]

        yield [B, H, P, N, Gx, Gb, Gc, DTYPES[dtype], state, x, dt, A, b, c, D, y], [state, y], reference


def ssd_scan(dtype: torch.dtype) -> Iterator[Case]:
    acc = _sums(dtype)
    for B, L, H, P, N, Gx, Gb, Gc in ((1, 150, 4, 16, 32, 2, 1, 4), (2, 37, 2, 5, 7, 2, 2, 2)):
        x, b, c = (_random(B, L, g, s, dtype=dtype) for g, s in ((Gx, P), (Gb, N), (Gc, N)))
        dt, back_dt, gate = (_random(B, L, H, dtype=acc, below=0.3) for _ in range(3))
        A, back_A = (-_random(H, dtype=acc, below=1) for _ in range(2))
        y = torch.zeros(B, L, H, P, dtype=dtype)

        def reference(inputs=(x, dt, A, b, c, back_dt, back_A, gate)) -> list[Tensor]:  # type: ignore[no-untyped-def]
            names = ("x", "dt", "A", "B", "C", "reverse_dt", "reverse_A", "gate")
            out = run_op("ssd_scan", direction="both", **dict(zip(names, _wide(*inputs), strict=True)))
            assert isinstance(out, Tensor)
            return [out]

        given = [B, L, H, P, N, Gx, Gb, Gc, DTYPES[dtype], x, dt, A, b, c, back_dt, back_A, gate, y]
        yield given, [y], reference


def causal_conv1d(dtype: torch.dtype) -> Iterator[Case]:
    acc = _sums(dtype)
    for B, L, D, K in ((2, 33, 24, 4), (1, 5, 7, 2)):
        x, weight, bias = _random(B, L, D, dtype=dtype), _random(D, K, dtype=acc), _random(D, dtype=acc)
        y = torch.zeros_like(x)

        def reference(inputs=(x, weight, bias)) -> list[Tensor]:  # type: ignore[no-untyped-def]
            out = linmu_ops.causal_conv1d(*_wide(*inputs), activation="silu")
            assert isinstance(out, Tensor)
            return [out]

        yield [B, L, D, K, DTYPES[dtype], x, weight, bias, y], [y], reference


def causal_conv1d_step(dtype: torch.dtype) -> Iterator[Case]:
    acc = _sums(dtype)
    for B, D, K in ((2, 24, 4), (1, 7, 2)):
        state, x = _random(B, K - 1, D, dtype=dtype), _random(B, D, dtype=dtype)
        weight, bias, y = _random(D, K, dtype=acc), _random(D, dtype=acc), torch.zeros_like(x)

        def reference(inputs=(state, x, weight, bias)) -> list[Tensor]:  # type: ignore[no-untyped-def]
            wide = _wide(*inputs)
            out = linmu_ops.causal_conv1d_step(*wide, activation="silu")
            return [wide[0], out]

        yield [B, D, K, DTYPES[dtype], state, x, weight, bias, y], [state, y], reference


def gated_delta_step(dtype: torch.dtype) -> Iterator[Case]:
    acc = _sums(dtype)
    for B, H, K, V, Gq, Gk, Gv in ((2, 4, 16, 32, 2, 2, 4), (1, 2, 5, 7, 1, 2, 2)):
        state = _random(B, H, K, V, dtype=acc)
        q, k, v = (_random(B, g, s, dtype=dtype) for g, s in ((Gq, K), (Gk, K), (Gv, V)))
        g, beta = -_random(B, H, dtype=acc, below=1), _random(B, H, dtype=acc, below=1)
        y = torch.zeros(B, H, V, dtype=dtype)

        def reference(inputs=(state, q, k, v, g, beta)) -> list[Tensor]:  # type: ignore[no-untyped-def]
            wide = _wide(*inputs)
            out = linmu_ops.gated_delta_step(*wide, scale=0.5, use_qk_l2norm_in_kernel=True)
            return [wide[0], out]

        yield [B, H, K, V, Gq, Gk, Gv, DTYPES[dtype], state, q, k, v, g, beta, y], [state, y], reference


CASES = {f.__name__: f for f in (ssd_step, ssd_scan, causal_conv1d, causal_conv1d_step, gated_delta_step)}


if __name__ == "__main__":
    torch.manual_seed(0)
    with linmu_ops.use_impl("*:reference"):
        sys.exit(main())
