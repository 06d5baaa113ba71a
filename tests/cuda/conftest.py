"""The CUDA kernels without a GPU: compiled by nvcc, and run thread by thread by the emulator."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linmu_ops import _registry

ROOT = Path(__file__).parents[2]
SOURCES = ("csrc/cuda", "csrc/linmu", "csrc/torch", "tests/cuda")


def build(target: str, place: str | None = None, **options: str) -> tuple[Path, str]:
    """The library `target` and its build log, made anew only when a source, an option or torch has changed.

    It is built in build/`place` (by default its name).
    """
    sources = SOURCES[:-1] if "LINMU_CUDA" in options else SOURCES  # the emulator is no part of it
    files = sorted(
        f for d in sources for f in (ROOT / d).iterdir() if f.suffix in (".h", ".cpp", ".cu", ".cuh", ".txt")
    )
    digest = hashlib.sha256(repr((sorted(options.items()), torch.__version__, _registry.schema_hash())).encode())
    for file in (ROOT / "CMakeLists.txt", *files):
        digest.update(file.name.encode() + file.read_bytes())
    folder = ROOT / "build" / (place or target)
    library, log, stamp = folder / f"lib{target}.so", folder / "log.txt", folder / "stamp.txt"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:  # one of several test processes builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != digest.hexdigest():
            if "LINMU_CUDA" in options:  # all of the compiler's report is wanted
                shutil.rmtree(folder, ignore_errors=True)
            text = compile_into(folder, target, options)
            log.write_text(text)
            stamp.write_text(digest.hexdigest())
    return library, log.read_text()


def compile_into(folder: Path, target: str, options: dict[str, str]) -> str:
    settings = dict(
        LINMU_TORCH_DIR=Path(torch.__file__).parent, LINMU_TORCH_VERSION=torch.__version__,
        LINMU_SCHEMA_HASH=_registry.schema_hash(), LINMU_OUTPUT_DIR=folder, Python_EXECUTABLE=sys.executable, **options,
    )  # fmt: skip
    tools = {
        "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    text = ""
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())],
        ["cmake", "--build", folder, "--target", target],
    ):
        done = subprocess.run(command, env=tools, capture_output=True, text=True)
        text += done.stdout + done.stderr
        assert done.returncode == 0, text[-6000:]
    return text


def by_nvcc(arch: str, float16: bool) -> tuple[Path, str]:
    """liblinmu_cuda.so for one architecture, and nvcc's report. What is for the CPU is not optimised: nothing runs."""
    return build(
        "linmu_cuda",
        f"linmu_cuda_sm_{arch}" + ("" if float16 else "_no_float16"),
        LINMU_CUDA="ON",
        LINMU_CUDA_ARCHS=f"{arch}-real",
        CMAKE_CUDA_FLAGS="-Xptxas=-v" + ("" if float16 else " -DLINMU_CUDA_NO_FLOAT16"),
        CMAKE_CUDA_FLAGS_RELEASE="-O0 -DNDEBUG",
        CMAKE_CXX_FLAGS_RELEASE="-O0 -DNDEBUG",
    )


def register_emulated() -> tuple[ctypes.CDLL, torch.library.Library]:
    """Build liblinmu_emulated.so, and register its ops as linmu_emulated::<op>: for as long as the second lives."""
    path, _ = build("linmu_emulated", LINMU_EMULATE="ON")
    namespace = torch.library.Library("linmu_emulated", "DEF")
    for op in _registry.OPS.values():
        _registry.define_in("linmu_emulated", namespace, op)
    library = ctypes.CDLL(str(path))
    message = ctypes.create_string_buffer(4096)
    assert library.linmu_register(_registry.schema_hash().encode(), message, len(message)) == 0, message.value
    return library, namespace


@pytest.fixture(scope="session")
def emulated():
    """liblinmu_emulated.so, its ops registered as linmu_emulated::<op>."""
    if shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}") is None:
        pytest.skip("needs cmake")
    if not _registry.binaries()["cpu"].loaded:
        pytest.skip(f"needs liblinmu_cpu.so: {_registry.binaries()['cpu'].error}")
    library, namespace = register_emulated()
    yield library
    del namespace  # until here, the definitions live


@pytest.fixture
def by_emulator(emulated, monkeypatch):
    """Until the test ends, linmu_ops runs the emulated CUDA kernels on CPU tensors, where there are any."""
    monkeypatch.setitem(_registry.NAMESPACE, "cpu", "linmu_emulated")
    for op in ("ssd_scan", "ssd_step"):  # as on a GPU
        monkeypatch.setattr(sys.modules[f"linmu_ops.{op}"], "widens", lambda op, x: True)
