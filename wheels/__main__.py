"""`make wheels`: everything that is published, built into dist/ and checked. Nothing is downloaded.

    python -m wheels [any] [teacher] [x86_64] [aarch64] [cuda]        all but cuda where none is named

A processor that is not this machine's needs a cross compiler (Debian: g++-aarch64-linux-gnu, g++-x86-64-linux-gnu);
cuda needs nvcc and nvidia-cutlass.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .check import PROCESSORS
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
        shutil.copy(runtime_licence(), folder / "LICENSE.cuda-runtime")
        library = compiled("x86_64", {"LINMU_BUILD": "cuda", "LINMU_CUDA_ARCHS": CUDA_ARCHS}, "liblinmu_cuda.so")
        shutil.copy(library, folder / "linmu_cuda")
        # Its CUDA runtime asks for threads, which this system's glibc has had in libc itself since 2.34.
        return wheel(folder, "linmu_cuda", {}, ["--build-option=--plat-name=manylinux_2_34_x86_64"])
    return wheel(ROOT, "linmu", {"LINMU_BUILD": "cpu", "LINMU_WHEEL": kind, "CXX": compiler(kind)})


def staged(name: str, licenses: Sequence[str]) -> Path:
    """A fresh copy of wheels/<name> to pack, with the licences of what it will hold."""
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "wheels" / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in licenses:
        shutil.copy(ROOT / file, folder)
    return folder


def runtime_licence() -> Path:
    """NVIDIA's terms for the CUDA runtime, which is linked into the library; they come with the toolkit."""
    command = [os.environ.get("CUDACXX", "nvcc"), "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr + said.stdout, re.MULTILINE)
    toolkit = Path(top[1]).resolve() if top else Path()
    ours = "nvidia_cuda_runtime*/licenses/License.txt"  # where pip installed the toolkit, in either of two layouts
    places = [toolkit.glob("EULA.txt"), toolkit.glob(f"dist-info/{ours}"), toolkit.parents[1].glob(ours)] if top else []
    found = next((file for place in places for file in place), None)
    if found is None:
        sys.exit(f"wheels: cuda needs the licence of the CUDA runtime, and none is in {toolkit} (EULA.txt)")
    return found


def compiler(kind: str) -> str:
    """What compiles that kind; "" for one of nothing compiled."""
    if kind == "cuda":
        return os.environ.get("CUDACXX", "nvcc")
    if kind not in PROCESSORS.values():
        return ""
    return os.environ.get("CXX", "g++" if kind == platform.machine() else f"{kind}-linux-gnu-g++")


def lacking(kinds: Sequence[str]) -> str | None:
    """Why not all of that can be built here, in one line; None where it can."""
    for kind in kinds:
        needed = compiler(kind)
        if needed and shutil.which(needed) is None:
            others = " ".join(other for other in kinds if other != kind)
            rest = f"; without it: python -m wheels {others}" if others else ""
            return f"{kind} needs {needed}, which is not found{rest}"
    return None


def compiled(processor: str, variables: dict[str, str], library: str) -> Path:
    lib = BUILD / f"lib-{processor}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(lib)]
    variables = {"LINMU_WHEEL": processor, "CXX": compiler(processor), **variables}
    subprocess.check_call(command, cwd=ROOT, env={**os.environ, **variables})
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
    if why := lacking(wanted):
        print(f"wheels: {why}", file=sys.stderr)
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
