"""Drives CMake. LINMU_BUILD=auto|none|cpu|cuda says what to build; cuda includes cpu.

auto (the default) builds cpu wherever a C++ compiler is found, and cuda where nvcc, a torch with CUDA and CUTLASS's
headers are, too.

LINMU_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer into build/asan/linmu_ops (`make asan`).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "none", "cpu", "cuda")


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
    import torch

    if not nvcc:
        return "cpu", f"C++ compiler {compiler}; no nvcc found"
    if torch.version.cuda is None:
        return "cpu", f"C++ compiler {compiler}; this torch has no CUDA"
    if not (os.environ.get("LINMU_CUTLASS_DIR") or importlib.util.find_spec("cutlass_library")):
        return "cpu", f"C++ compiler {compiler}; no CUTLASS headers: pip install nvidia-cutlass"
    return "cuda", f"C++ compiler {compiler}, {nvcc}, torch with CUDA {torch.version.cuda}"


class CMakeBuild(build_ext):
    def run(self) -> None:
        choice = chosen()
        if choice == "none":
            return
        import torch

        sanitize = bool(os.environ.get("LINMU_SANITIZE"))
        build = ROOT / "build" / ("asan" if sanitize else "cmake")
        output = build / "linmu_ops" if sanitize else Path(self.get_ext_fullpath("linmu_ops._C")).resolve().parent
        hash_code = "import linmu_ops._registry as r, linmu_ops; print(r.schema_hash())"
        environment = {**os.environ, "LINMU_NO_BINARY": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", hash_code]
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if found.returncode:
            sys.exit(f"linmu: building needs the op schemas, and linmu_ops cannot be imported:\n{found.stderr}")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DLINMU_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DLINMU_TORCH_VERSION={torch.__version__}",
            f"-DLINMU_SCHEMA_HASH={found.stdout.strip()}",
            f"-DLINMU_OUTPUT_DIR={output}",
            f"-DLINMU_CUDA={'ON' if choice == 'cuda' else 'OFF'}",
            f"-DLINMU_SANITIZE={'ON' if sanitize else 'OFF'}",
            f"-DLINMU_MISSING={'WARNING' if os.environ.get('LINMU_BUILD', 'auto') == 'auto' else 'FATAL_ERROR'}",
            f"-DPython_EXECUTABLE={sys.executable}",
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


# linmu_distill lies in distill/ (`package-dir` of pyproject.toml). Benches and tests are for a checkout alone.
packages = find_packages(include=["linmu_ops*", "linmu_models*"])
packages += ["linmu_distill", *(f"linmu_distill.{name}" for name in find_packages("distill"))]

setup(packages=packages, ext_modules=[Extension("linmu_ops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
