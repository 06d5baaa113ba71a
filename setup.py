"""Drives CMake. LINMU_BUILD=auto|none|cpu|cuda says what to build; cuda includes cpu.

auto (the default) builds cpu wherever a C++ compiler and a torch are found, and cuda where nvcc, a torch with CUDA and
CUTLASS's headers are, too. torch is never installed for a build: its headers are read where it is.

LINMU_WHEEL=x86_64|aarch64 builds a wheel for every Python and every glibc from 2.28 on, by the compiler that CXX names
(`make wheels`).
LINMU_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer into build/asan/linmu_ops (`make asan`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "none", "cpu", "cuda")
# Processors that wheels are for.
WHEELS = ("x86_64", "aarch64")
DESCRIBE = (
    "import json, sys; sys.path.insert(0, {root!r}); import torch, linmu_ops._registry as r, linmu_ops;"
    "print(json.dumps([torch.__path__[0], torch.__version__, torch.version.cuda, r.schema_hash()]))"
)


class Torch(NamedTuple):
    folder: str
    version: str
    cuda: str | None
    schema_hash: str


@cache
def torch_found() -> Torch:
    """What a build needs to know of torch and of the op schemas, which take a torch to be read; or ImportError."""
    code = DESCRIBE.format(root=str(ROOT))
    environment = {**os.environ, "LINMU_NO_BINARY": "1"}
    # -I: of the environment that pip installs into. The one that pip makes for a build hides its packages.
    for flags in ([], ["-I"]):
        command = [sys.executable, *flags, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            return Torch(*json.loads(done.stdout.splitlines()[-1]))
    raise ImportError(done.stderr.strip() or f"{sys.executable} cannot be run")


def chosen() -> str:
    wanted = os.environ.get("LINMU_BUILD", "auto")
    if wanted not in CHOICES:
        sys.exit(f"LINMU_BUILD must be one of {', '.join(CHOICES)}, got {wanted!r}")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if wanted == "auto":
        choice, why = automatic(compiler, nvcc)
        print(f"linmu: LINMU_BUILD=auto builds {choice} ({why})", file=sys.stderr)
        return choice
    if wanted != "none" and not compiler:
        sys.exit(f"LINMU_BUILD={wanted} needs a C++ compiler; none found (set CXX)")
    if wanted == "cuda" and not nvcc:
        sys.exit("LINMU_BUILD=cuda needs nvcc; none found (set CUDACXX)")
    return wanted


def automatic(compiler: str | None, nvcc: str | None) -> tuple[str, str]:
    if not compiler:
        return "none", "no C++ compiler found"
    try:
        torch = torch_found()
    except ImportError as e:
        return "none", f"linmu_ops and torch cannot be imported: {str(e).splitlines()[-1]}"
    if not nvcc:
        return "cpu", f"C++ compiler {compiler}; no nvcc found"
    if torch.cuda is None:
        return "cpu", f"C++ compiler {compiler}; this torch has no CUDA"
    if not (os.environ.get("LINMU_CUTLASS_DIR") or importlib.util.find_spec("cutlass_library")):
        return "cpu", f"C++ compiler {compiler}; no CUTLASS headers: pip install nvidia-cutlass"
    return "cuda", f"C++ compiler {compiler}, {nvcc}, torch with CUDA {torch.cuda}"


def wheel_processor() -> str | None:
    wanted = os.environ.get("LINMU_WHEEL")
    if wanted and wanted not in WHEELS:
        sys.exit(f"LINMU_WHEEL must be one of {', '.join(WHEELS)}, got {wanted!r}")
    return wanted or None


class CMakeBuild(build_ext):
    def run(self) -> None:
        choice = chosen()
        if choice == "none":
            return
        try:
            torch = torch_found()
        except ImportError as e:
            sys.exit(f"linmu: building needs torch and the op schemas, and linmu_ops cannot be imported:\n{e}")
        sanitize, wheel = bool(os.environ.get("LINMU_SANITIZE")), wheel_processor()
        build = ROOT / "build" / (f"wheel-{wheel}" if wheel else "asan" if sanitize else "cmake")
        output = build / "linmu_ops" if sanitize else Path(self.get_ext_fullpath("linmu_ops._C")).resolve().parent
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DLINMU_TORCH_DIR={torch.folder}",
            f"-DLINMU_TORCH_VERSION={torch.version}",
            f"-DLINMU_SCHEMA_HASH={torch.schema_hash}",
            f"-DLINMU_OUTPUT_DIR={output}",
            f"-DLINMU_CUDA={'ON' if choice == 'cuda' else 'OFF'}",
            f"-DLINMU_SANITIZE={'ON' if sanitize else 'OFF'}",
            f"-DLINMU_WHEEL={'ON' if wheel else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        if wheel:
            configure += [
                "-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={wheel}",
                f"-DCMAKE_CXX_COMPILER={os.environ.get('CXX', 'c++')}",
            ]  # fmt: skip
        given = {
            "LINMU_CUDA_ARCHS": os.environ.get("LINMU_CUDA_ARCHS"),
            "LINMU_CUTLASS_DIR": os.environ.get("LINMU_CUTLASS_DIR"),
        }
        configure += [f"-D{name}={value}" for name, value in given.items() if value]
        # cmake and ninja of this environment, activated or not.
        tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        subprocess.check_call(configure, env=tools)
        subprocess.check_call(["cmake", "--build", str(build)], env=tools)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        processor = wheel_processor()
        return ("py3", "none", f"manylinux_2_28_{processor}") if processor else super().get_tag()


# linmu_distill lies in distill/ (`package-dir` of pyproject.toml). Benches and tests are for a checkout alone.
packages = find_packages(include=["linmu_ops*", "linmu_models*"])
packages += ["linmu_distill", *(f"linmu_distill.{name}" for name in find_packages("distill"))]
# A wheel of nothing compiled is for every Python and platform.
extensions = [] if os.environ.get("LINMU_BUILD") == "none" else [Extension("linmu_ops._C", sources=[])]

setup(packages=packages, ext_modules=extensions, cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
