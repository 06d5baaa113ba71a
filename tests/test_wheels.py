"""What is published: libraries that load everywhere, found where they are installed; and the wheels that hold them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from linmu_ops import _native

check = pytest.importorskip("wheels.check", reason="needs pyelftools")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON_PATH = {**os.environ, "PYTHONPATH": str(ROOT)}


def library(name):
    found = next(_native.HERE.glob(name), None)
    if found is None:
        pytest.skip(f"{name} is not built")
    return found


def test_the_library_needs_no_python_and_of_torch_its_stable_interface():
    data = library("liblinmu_cpu.so").read_bytes()
    assert check.faults(data, wheel=False) == []
    assert "torch_library_impl" in check.torch_symbols(data)


def test_a_library_of_one_python_is_told():
    assert any(
        re.search(r"needs the symbol _?Py", f) for f in check.faults(library("_C.*.so").read_bytes(), wheel=False)
    )


def test_what_is_too_new_or_lies_elsewhere_is_told(monkeypatch):
    data = library("liblinmu_cpu.so").read_bytes()
    monkeypatch.setattr(check, "NEWEST", {**check.NEWEST, "GLIBC": (2, 1), "GLIBCXX": (3, 0)})
    monkeypatch.setattr(check, "MAY_NEED", re.compile("libtorch_cpu.so"))
    found = "\n".join(check.faults(data))
    for word in ("needs GLIBC_2.2.5, newer", "needs GLIBCXX_3.4, newer", "needs libc10.so"):
        assert word in found


def test_a_wheel_says_the_glibc_of_what_it_holds(tmp_path):
    data = library("liblinmu_cpu.so").read_bytes()
    needed = max(version for name, version in check.versions(check.ELFFile(check.io.BytesIO(data))) if name == "GLIBC")
    for minor, wrong in ((needed[1] - 1, True), (needed[1], False)):
        file = tmp_path / f"linmu-0.1.0-py3-none-manylinux_2_{minor}_x86_64.whl"
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr("linmu_ops/liblinmu_cpu.so", data)
        assert (
            any(f"newer than manylinux_2_{minor}" in fault and "GLIBC_" in fault for fault in check.check(file))
            == wrong
        )


def test_a_wheel_of_no_library_is_for_any_platform(tmp_path):
    for name, wrong in (("linmu-0.1.0-py3-none-any.whl", []), ("linmu-0.1.0-cp311-cp311-linux_x86_64.whl", 1)):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr("linmu_ops/__init__.py", "")
        assert check.check(tmp_path / name) == (wrong and ["it holds no library"])


def test_a_wheel_that_has_grown_is_told(tmp_path):
    for name in check.MOST:
        file = tmp_path / f"{name}-0.1.0-py3-none-any.whl"
        for more in (0, 1):
            file.write_bytes(b"")
            with zipfile.ZipFile(file, "w") as wheel:
                wheel.writestr("data", bytes(check.MOST[name] * 2**20 - 4096 + more * 8192))
            assert check.check(file) == more * [f"it has more than {check.MOST[name]} MB"]


def test_a_wheel_says_the_processor_of_what_it_holds(tmp_path):
    data = library("liblinmu_cpu.so").read_bytes()
    processor = check.PROCESSORS[check.ELFFile(check.io.BytesIO(data))["e_machine"]]
    for platform, wrong in (("manylinux_2_28_riscv64", True), (f"manylinux_2_28_{processor}", False)):
        file = tmp_path / f"linmu-0.1.0-py3-none-{platform}.whl"
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr("linmu_ops/liblinmu_cpu.so", data)
        assert (f"linmu_ops/liblinmu_cpu.so is for {processor}" in check.check(file)) == wrong


STAND_IN = """
#include <string.h>
const char* linmu_build_info(void) { return "archs=stand-in\\n"; }
int linmu_register(const char* hash, char* message, int size) {
  if (!strcmp(hash, "right")) return 0;
  strncpy(message, "other schemas", size);
  return 1;
}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """linmu-cuda as it is installed, with a stand-in for its library."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    shutil.copytree(ROOT / "wheels" / "linmu_cuda" / "linmu_cuda", tmp_path / "site" / "linmu_cuda")
    (tmp_path / "x.c").write_text(STAND_IN)
    file = tmp_path / "site" / "linmu_cuda" / "liblinmu_cuda.so"
    subprocess.check_call([compiler, "-shared", "-fPIC", "-o", file, tmp_path / "x.c"])
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(_native, "HERE", tmp_path / "own")
    monkeypatch.delenv("LINMU_NO_BINARY", raising=False)
    return file


def test_the_library_for_gpus_is_found_in_its_package(package, monkeypatch):
    assert _native.find_library("cuda") is None
    assert "not built" in _native.load_library("cuda", "right").error
    monkeypatch.syspath_prepend(package.parents[1])
    assert _native.find_library("cuda") == package
    loaded = _native.load_library("cuda", "right")
    assert loaded.loaded and loaded.path == package and loaded.info == {"archs": "stand-in"}
    assert "refused to register: other schemas" in _native.load_library("cuda", "wrong").error
    assert "linmu_cuda" not in sys.modules  # data alone: it need not be imported
    own = _native.HERE / package.name
    shutil.copy(package, own)
    assert _native.find_library("cuda") == own  # what was built from source goes first


def test_the_packages_have_one_version():
    for name in ("linmu_teacher", "linmu_cuda"):
        project = tomllib.loads((ROOT / "wheels" / name / "pyproject.toml").read_text())["project"]
        assert project["name"] == name.replace("_", "-") and project["version"] == PROJECT["project"]["version"]
        assert project["requires-python"] == PROJECT["project"]["requires-python"] and "dependencies" not in project


def test_a_build_asks_for_no_torch():
    """It would be another one than the user's, of gigabytes."""
    assert not [name for name in PROJECT["build-system"]["requires"] if re.match("torch|numpy", name)]


def in_setup(code, **environment):
    begin = "import setuptools; setuptools.setup = lambda **_: None; import setup; "
    done = subprocess.run(
        [sys.executable, "-c", begin + code],
        cwd=ROOT,
        env={**PYTHON_PATH, **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_build_reads_the_torch_that_pip_hides(tmp_path):
    import torch

    (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
    code = "print(setup.torch_found().version, setup.automatic('c++', None))"
    status, said = in_setup(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert status == 0 and said.startswith(f"{torch.__version__} ('cpu',"), said


def test_where_there_is_no_torch_nothing_is_compiled_and_it_is_said():
    code = "setup.sys.executable = 'false'; print(setup.automatic('c++', None)); setup.CMakeBuild.run(None)"
    status, said = in_setup(code, LINMU_BUILD="cpu")
    assert status == 1 and "('none', 'linmu_ops and torch cannot be imported" in said
    assert "linmu: building needs torch and the op schemas" in said


def test_an_unknown_processor_is_refused():
    status, said = in_setup("setup.wheel_processor()", LINMU_WHEEL="riscv64")
    assert (status, said) == (1, "LINMU_WHEEL must be one of x86_64, aarch64, got 'riscv64'\n")
    from wheels.__main__ import main

    assert main(["riscv64"]) == 2


def test_what_cannot_be_built_here_is_said_before_anything_is(monkeypatch, capsys):
    from wheels import __main__ as wheels

    monkeypatch.setattr(wheels, "build", lambda kind: pytest.fail(f"{kind} is built"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(wheels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None if "-linux-gnu-" in name else name)
    assert wheels.main([]) == 2
    said = "aarch64 needs aarch64-linux-gnu-g++, which is not found; without it: python -m wheels any teacher x86_64"
    assert capsys.readouterr().err == f"wheels: {said}\n"
    monkeypatch.setattr(wheels.platform, "machine", lambda: "aarch64")
    assert wheels.lacking(["aarch64"]) is None
    assert wheels.lacking(["x86_64"]) == "x86_64 needs x86_64-linux-gnu-g++, which is not found"
    monkeypatch.setenv("CUDACXX", "x-linux-gnu-nvcc")
    assert wheels.lacking(["cuda"]).startswith("cuda needs x-linux-gnu-nvcc, which is not found")


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA toolkit with nothing but an nvcc that says where it lies, as nvcc does."""
    nvcc = tmp_path / "nvidia" / "cu" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '#$ _HERE_=x' >&2\necho '#$ TOP={nvcc.parent}/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    return nvcc.parents[1]


@pytest.mark.parametrize(
    "place", ["EULA.txt", "dist-info/nvidia_cuda_runtime-13.0.dist-info/licenses/License.txt",
              "../../nvidia_cuda_runtime-13.0.dist-info/licenses/License.txt"],
)  # fmt: skip
def test_the_licence_of_the_runtime_is_that_of_the_toolkit(toolkit, place):
    from wheels.__main__ import runtime_licence

    with pytest.raises(SystemExit, match=r"wheels: cuda needs the licence of the CUDA runtime, and none is in .*cu "):
        runtime_licence()
    file = toolkit / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("the terms")
    assert runtime_licence().read_text() == "the terms"


def test_the_wheel_for_gpus_has_the_licences_of_all_that_is_in_it(toolkit, tmp_path, monkeypatch):
    from wheels import __main__ as wheels

    (toolkit / "EULA.txt").write_text("the terms")
    library = tmp_path / "liblinmu_cuda.so"
    library.write_bytes(b"kernels")
    monkeypatch.setattr(wheels, "compiled", lambda *_: library)
    for name in ("DIST", "BUILD"):
        monkeypatch.setattr(wheels, name, tmp_path / name)
    with zipfile.ZipFile(wheels.build("cuda")) as wheel:
        names = wheel.namelist()
        (terms,) = (name for name in names if name.endswith("LICENSE.cuda-runtime"))
        assert wheel.read(terms) == b"the terms"
    assert "linmu_cuda/liblinmu_cuda.so" in names
    licences = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "LICENSE.pytorch", "LICENSE.cutlass", "LICENSE.cuda-runtime"}


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["any", "teacher", "x86_64", "aarch64"])
def test_wheels_are_built_whole(kind, tmp_path, monkeypatch):
    """Small, with the licences of what is inside, and of use where nothing else of ours is."""
    from wheels import __main__ as wheels
    from wheels import fresh

    if kind == "aarch64" and shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("needs aarch64-linux-gnu-g++")
    monkeypatch.setattr(wheels, "DIST", tmp_path / "dist")
    file = wheels.build(kind)
    assert check.check(file) == []
    with zipfile.ZipFile(file) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    licences = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    expected = {Path(name).name for name in PROJECT["project"]["license-files"]}
    assert licences == ({"LICENSE"} if kind == "teacher" else expected)
    assert any(name.endswith("model.safetensors") for name in names) == (kind == "teacher")
    if kind in ("any", "x86_64"):
        folder = str(tmp_path / "site")
        # An editable installation of this checkout must not serve in its place.
        code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
        command = [sys.executable, "-c", code + fresh.smoke(folder, whole=False, compiled=kind == "x86_64")]
        done = subprocess.run(
            command, cwd="/", env={**PYTHON_PATH, "PYTHONPATH": folder}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "ops and blocks, a converted model\n"
