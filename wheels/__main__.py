"""`make wheels`: everything that is published, built into dist/ and checked. Nothing is downloaded.

    python -m wheels [any] [teacher] [x86_64] [aarch64] [cuda]        all but cuda where none is named

x86_64 needs g++, aarch64 aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu), cuda needs nvcc and nvidia-cutlass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .check import main as check

ROOT = Path(__file__).resolve().parents[1]
DIST, BUILD = ROOT / "dist", ROOT / "build" / "wheels"
# 100 with PTX, which later GPUs compile for themselves.
CUDA_ARCHS = "80-real;90a-real;100"
KINDS = ("any", "teacher", "x86_64", "aarch64", "cuda")
LICENSES = ("LICENSE", "csrc/torch/LICENSE.pytorch", "csrc/cuda/LICENSE.cutlass")


def build(kind: str) -> Path:
    """The wheel of that kind, in dist/."""
    if kind == "any":
        return wheel(ROOT, "linmu", {"LINMU_BUILD": "none"})
    if kind == "teacher":
        folder = staged("linmu_teacher", ["LICENSE"])
        shutil.copytree(ROOT / "distill" / "teachers" / "tiny", folder / "linmu_teacher", dirs_exist_ok=True)
        return wheel(folder, "linmu_teacher", {})
    if kind == "cuda":
        folder = staged("linmu_cuda", LICENSES)
        library = compiled("x86_64", {"LINMU_BUILD": "cuda", "LINMU_CUDA_ARCHS": CUDA_ARCHS}, "liblinmu_cuda.so")
        shutil.copy(library, folder / "linmu_cuda")
        # Its CUDA runtime asks for threads, which this system's glibc has had in libc itself since 2.34.
        return wheel(folder, "linmu_cuda", {}, ["--build-option=--plat-name=manylinux_2_34_x86_64"])
    return wheel(ROOT, "linmu", {"LINMU_BUILD": "cpu", "LINMU_WHEEL": kind})


def staged(name: str, licenses: Sequence[str]) -> Path:
    """A fresh copy of wheels/<name> to pack, with the licences of what it will hold."""
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "wheels" / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in licenses:
        shutil.copy(ROOT / file, folder)
    return folder


def compiled(processor: str, variables: dict[str, str], library: str) -> Path:
    lib = BUILD / f"lib-{processor}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(lib)]
    subprocess.check_call(command, cwd=ROOT, env={**os.environ, "LINMU_WHEEL": processor, **variables})
    return lib / "linmu_ops" / library


def wheel(folder: Path, name: str, variables: dict[str, str], options: Sequence[str] = ()) -> Path:
    # What an earlier build left would be packed as well.
    shutil.rmtree(folder / "build" / "lib", ignore_errors=True)
    for old in (folder / "build").glob("lib.*"):
        shutil.rmtree(old)
    out = BUILD / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    command += [f"--config-settings={option}" for option in options]
    subprocess.check_call([*command, str(folder)], env={**os.environ, **variables})
    (made,) = out.glob(f"{name}-*.whl")
    DIST.mkdir(exist_ok=True)
    return made.replace(DIST / made.name)


def main(arguments: list[str]) -> int:
    wanted = arguments or [kind for kind in KINDS if kind != "cuda"]
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown:
        print(f"wheels: what is built must be of {', '.join(KINDS)}, got {unknown[0]}", file=sys.stderr)
        return 2
    made = [build(kind) for kind in wanted]
    if check([str(file) for file in made]):
        return 1
    for file in made:
        if "manylinux" in file.name:
            subprocess.check_call([sys.executable, "-m", "auditwheel", "show", str(file)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
