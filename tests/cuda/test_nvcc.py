"""nvcc compiles and links liblinmu_cuda.so, against whatever torch is there, and its report holds what kernels need."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from linmu_ops import _registry
from tests.cuda.conftest import ROOT, build, compile_into

ARCHS = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}  # and the shared memory that one block may have
# Kernels that no bfloat16 forward may spill in, wherever they are compiled.
FORWARDS = (
    "states_kernel", "output_kernel", "step_kernel", "forward_kernel", "conv_kernel", "mix_norm_kernel",
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    archs = ";".join(f"{a.removeprefix('sm_')}-real" for a in ARCHS)
    return build("linmu_cuda", LINMU_CUDA="ON", LINMU_CUDA_ARCHS=archs, CMAKE_CUDA_FLAGS="-Xptxas=-v")


@pytest.fixture(scope="module")
def kernels(compiled):
    """(kernel with its template arguments, architecture) -> what ptxas says of it."""
    found = {}
    pattern = r"Compiling entry function '(\w+)' for '(\w+)'(.*?Used \d+ registers.*?)\n"
    for name, arch, report in re.findall(pattern, compiled[1], re.DOTALL):
        found[name, arch] = {
            "spills": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
            "registers": int(re.search(r"Used (\d+) registers", report)[1]),
            "shared": int((re.search(r"(\d+) bytes smem", report) or [0, 0])[1]),
        }
    return found


def test_links_and_names_its_entry_points(compiled):
    symbols = subprocess.run(["nm", "-D", "--defined-only", compiled[0]], capture_output=True, text=True).stdout
    assert "linmu_register" in symbols and "linmu_build_info" in symbols
    assert _registry.schema_hash().encode() in compiled[0].read_bytes()
    assert "warning" not in compiled[1].lower().replace("-wno-", "")


def test_every_kernel_is_built_for_every_architecture(kernels):
    sources = "\n".join(f.read_text() for f in (ROOT / "csrc" / "cuda").glob("*.cu"))
    names = set(re.findall(r"__global__.*?\b(\w+_kernel)\(", sources, re.DOTALL))
    assert names
    for name in names:
        for arch in ARCHS:
            assert any(name in mangled and a == arch for mangled, a in kernels), f"{name} for {arch}"


def test_shared_memory_is_within_the_chip(kernels):
    for (name, arch), report in kernels.items():
        assert report["shared"] <= ARCHS[arch], name  # dynamic shared memory: static_asserts beside the kernels


def test_bfloat16_forwards_do_not_spill(kernels):
    judged = [n for n in kernels if "4bf16" in n[0] and any(k in n[0] for k in FORWARDS)]
    assert len({k for k in FORWARDS for n in judged if k in n[0]}) == len(FORWARDS)
    for name in judged:
        assert kernels[name]["spills"] == 0, (name, kernels[name])


@pytest.mark.slow
def test_compiles_for_sm_100_where_this_nvcc_can(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    if "compute_100" not in known.split():
        pytest.skip("this nvcc does not know sm_100")
    compile_into(tmp_path, "linmu_cuda", dict(LINMU_CUDA="ON", LINMU_CUDA_ARCHS="100-real"))
    assert (tmp_path / "liblinmu_cuda.so").exists()
