"""nvcc compiles and links liblinmu_cuda.so, against whatever torch is there, and its report holds what kernels need."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from linmu_ops import _registry
from tests.cuda.conftest import ROOT, build

SHARED = {"80": 163 * 1024, "90a": 227 * 1024, "100": 227 * 1024}  # the shared memory that one block may have
ARCHS = [pytest.param(arch, marks=() if arch == "90a" else pytest.mark.sweep) for arch in SHARED]
# Kernels that may not spill in bfloat16, wherever they are compiled: the forwards, and the gradients by warpgroups.
UNSPILLED = (
    "states_kernel", "slice_kernel", "output_kernel", "step_kernel", "forward_kernel", "conv_kernel", "mix_norm_kernel",
    "warpgroup_dq_kernel", "warpgroup_dkv_kernel",
)  # fmt: skip

SPILLED = {("step_kernel", "100"): 16}  # bytes: the one that does, on a chip that nobody has measured it on


# Kernels whose wgmma ptxas runs one after another (C75xx): their loops need another design. No other kernel may, and
# one that no longer does leaves this set.
SERIAL = {"warpgroup_output_kernel"}


@pytest.fixture(scope="module", params=ARCHS)
def arch(request):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if f"compute_{request.param.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    return request.param


@pytest.fixture(scope="module")
def compiled(arch):
    options = dict(LINMU_CUDA="ON", LINMU_CUDA_ARCHS=f"{arch}-real", CMAKE_CUDA_FLAGS="-Xptxas=-v")
    return build("linmu_cuda", f"linmu_cuda_sm_{arch}", **options)


@pytest.fixture(scope="module")
def kernels(compiled, arch):
    """Kernel with its template arguments -> what ptxas says of it."""
    found = {}
    pattern = rf"Compiling entry function '(\w+)' for 'sm_{arch}'(.*?Used \d+ registers.*?)\n"
    for name, report in re.findall(pattern, compiled[1], re.DOTALL):
        found[name] = {
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


def test_every_kernel_is_built(kernels):
    sources = "\n".join(f.read_text() for f in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    names = set(re.findall(r"__global__.*?\b(\w+_kernel)\(", sources, re.DOTALL))
    assert names
    for name in names:
        assert any(name in mangled for mangled in kernels), name


def test_shared_memory_is_within_the_chip(kernels, arch):
    for name, report in kernels.items():
        assert report["shared"] <= SHARED[arch], name  # dynamic shared memory: static_asserts beside the kernels


def test_no_other_kernel_has_its_products_run_in_series(compiled, kernels, arch):
    lines = [line for line in compiled[1].splitlines() if "(C75" in line]
    found = {n for n in kernels for line in lines if n in line}
    assert all(any(n in line for n in found) for line in lines), lines[:3]
    serial = {k for k in SERIAL for n in found if k in n}
    assert all(any(k in n for k in SERIAL) for n in found), found
    assert serial == (SERIAL if arch == "90a" else set())


def test_in_bfloat16_these_do_not_spill(kernels, arch):
    judged = [n for n in kernels if "4bf16" in n and any(k in n for k in UNSPILLED)]
    assert len({k for k in UNSPILLED for n in judged if k in n}) == len(UNSPILLED)
    for name in judged:
        allowed = sum(most for (kernel, where), most in SPILLED.items() if kernel in name and where == arch)
        assert kernels[name]["spills"] <= allowed, (name, kernels[name])
