"""nvcc compiles and links liblinmu_cuda.so, against whatever torch is there, and its report holds what kernels need."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from linmu_ops import _registry
from tests.cuda.conftest import ROOT, by_nvcc

SHARED = {"80": 163 * 1024, "90a": 227 * 1024, "100": 227 * 1024}  # the shared memory that one block may have
# Each architecture, with its float16 or not: a build without takes half the time.
BUILDS = [("90a", False), *(pytest.param((arch, True), marks=pytest.mark.sweep) for arch in SHARED)]
# Kernels that may not spill in bfloat16, wherever they are compiled: the forwards, and the gradients by warpgroups.
UNSPILLED = (
    "states_kernel", "slice_kernel", "output_kernel", "step_kernel", "forward_kernel", "conv_kernel", "mix_norm_kernel",
    "warpgroup_dq_kernel", "warpgroup_dkv_kernel",
)  # fmt: skip

SPILLED = {("step_kernel", "100"): 16}  # bytes: the one that does, on a chip that nobody has measured it on

# What follows is of this release of nvcc, on sm_90a. A figure that rises has to say why.
NVCC = "release 13.0"
# Bytes of the kernels that spill, by the beginnings of their names with template arguments.
SPILLED_SM90A = {
    "exact_kernelINS_6half16E": 188, "gradients_kernelIfE": 480, "visits_kernelE": 8, "forward_kernelIfLi64E": 8,
    "dq_kernelINS_4bf16ELi128E": 56, "dq_kernelINS_6half16ELi128E": 88, "dq_kernelIfLi64E": 88,
}  # fmt: skip
# Registers of the largest instance of each kernel, at most; they are given out by eights.
REGISTERS = {
    "clear_kernel": 8, "conv_bwd_kernel": 128, "conv_kernel": 144, "conv_step_kernel": 40, "conv_sums_kernel": 32,
    "dbias_kernel": 128, "dkv_kernel": 255, "dq_kernel": 255, "exact_kernel": 104, "forward_kernel": 255,
    "gradients_kernel": 168, "mark_kernel": 8, "mix_norm_bwd_kernel": 112, "mix_norm_kernel": 64,
    "mix_norm_sums_kernel": 32, "narrow_kernel": 32, "output_kernel": 128, "per_head_kernel": 40,
    "per_visit_kernel": 64, "reduce_kernel": 32, "slice_kernel": 168, "spans_kernel": 24, "states_kernel": 216,
    "step_kernel": 64, "sum_heads_kernel": 32, "visits_kernel": 56, "warpgroup_dkv_kernel": 168,
    "warpgroup_dq_kernel": 248, "warpgroup_forward_kernel": 168, "warpgroup_output_kernel": 255, "zero_kernel": 24,
}  # fmt: skip
# Of 16-bit instances, where float32 ones take more.
REGISTERS_16_BIT = {"states_kernel": 168, "mix_norm_bwd_kernel": 96}


# Kernels whose wgmma ptxas runs one after another (C75xx): their loops need another design. No other kernel may, and
# one that no longer does leaves this set.
SERIAL = {"warpgroup_output_kernel"}


@pytest.fixture(scope="module", params=BUILDS, ids=lambda b: b[0] + ("" if b[1] else "-no-float16"))
def built(request):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if f"compute_{request.param[0].rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{request.param[0]}")
    return request.param


@pytest.fixture(scope="module")
def arch(built):
    return built[0]


@pytest.fixture(scope="module")
def compiled(built):
    return by_nvcc(*built)


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


def named(mangled):
    """A kernel's name, and what follows it: template arguments."""
    at, name = mangled.index("N") + 1, ""
    while size := re.compile(r"\d+").match(mangled, at):
        at = size.end() + int(size[0])
        name = mangled[size.end() : at]
    return name, mangled[at:]


@pytest.fixture
def figures(kernels, arch):
    """Of a kernel and its template arguments, what ptxas says of it, where the figures above are of."""
    if arch != "90a":
        pytest.skip("the figures are of sm_90a")
    if NVCC not in subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout:
        pytest.skip(f"the figures are of nvcc {NVCC}")
    return {named(mangled): report for mangled, report in kernels.items()}


def test_no_other_kernel_spills(figures, built):
    found = {}
    for (name, arguments), report in figures.items():
        if report["spills"]:
            key = next((k for k in SPILLED_SM90A if (name + arguments).startswith(k)), name + arguments)
            found[key] = report["spills"]
    assert found.keys() == {k for k in SPILLED_SM90A if built[1] or "half16" not in k}
    assert all(most <= SPILLED_SM90A[key] for key, most in found.items()), found


def test_registers_are_within_the_plan(figures):
    assert {name for name, _ in figures} == REGISTERS.keys()
    for (name, arguments), report in figures.items():
        narrow = "4bf16E" in arguments or "6half16E" in arguments
        most = REGISTERS_16_BIT.get(name, REGISTERS[name]) if narrow else REGISTERS[name]
        assert report["registers"] <= most, (name, arguments, report)
