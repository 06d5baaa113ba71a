"""What ptxas makes of the kernels that matter on sm_90a: counts in their hot loops, and modelled cycles of a round.

The figures are of one release of nvcc. Cycles are no time (see sass.py): a change that raises them by over a tenth has
to say why, and to give the new figure here and on the kernel's page.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

from tests.cuda import sass
from tests.cuda.conftest import by_nvcc

NVCC = "release 13.0"


@dataclass
class Hot:
    kernel: str  # its mangled name has it
    loop: tuple[str, ...]  # holds all instructions of the first name, and some of the others
    through: str  # the path that is modelled passes the most of these,
    avoid: str  # and the fewest of these
    tensor: int  # wgmma or mma in the loop
    waits: int  # for wgmma
    static: int  # instructions of the loop, at most
    cycles: int
    some: bool = False  # the loop holds some instructions of the first name, not all of them
    narrow: int = 0  # accesses of shared memory by two bytes, in the loop


def slices(panels: int, make: int, reverse: int, parts: int, tensor: int, waits: int, static: int, cycles: int) -> Hot:
    """A walk by slices, `make` as in ssd_scan_slice.cuh. Its path: what there is of a chunk, nothing is spoiled."""
    name = f"slice_kernelINS_4bf16ELi{panels}ELNS_4MakeE{make}ELb{reverse}ELi{parts}E"
    return Hot(name, ("HGMMA",), r"[SL](TG|DG)\.E\.128|HGMMA|EX2", r"^$", tensor, waits, static, cycles)


def gradients(of: str, plain: int, tensor: int, static: int, cycles: int) -> Hot:
    """A window's, of 64 queries by 64 keys."""
    name = f"warpgroup_{of}_kernelINS_4bf16ELi128ELb{plain}E"
    return Hot(name, ("HGMMA",), "HGMMA|EX2", "LDG", tensor, 3, static, cycles, some=True)


HOT = {
    "slice, added": slices(2, 0, 0, 1, tensor=8, waits=1, static=260, cycles=369),
    "slice, entering": slices(2, 1, 1, 1, tensor=8, waits=1, static=360, cycles=651),
    "slice": slices(2, 2, 0, 1, tensor=28, waits=4, static=1360, cycles=2345),
    "slice, exact": slices(2, 2, 0, 3, tensor=44, waits=6, static=1810, cycles=2901),
    "slice, 64 of N": slices(1, 2, 0, 1, tensor=16, waits=4, static=1220, cycles=2088),
    "slice, reverse": slices(2, 2, 1, 1, tensor=28, waits=4, static=1360, cycles=2375),
    "slice, part": slices(2, 3, 1, 1, tensor=28, waits=4, static=1040, cycles=1855),
    "slice, rest": slices(2, 4, 0, 1, tensor=28, waits=4, static=1390, cycles=2867),
    "slice, both": slices(2, 5, 0, 1, tensor=84, waits=11, static=3850, cycles=7185),  # of two chunks
    "slice, both, 64 of N": slices(1, 5, 0, 1, tensor=48, waits=11, static=3560, cycles=5822),
    "slice, both, exact": slices(2, 5, 0, 3, tensor=116, waits=15, static=4830, cycles=8421),
    "states": Hot(
        "states_kernelINS_4bf16ELi64E", ("HMMA", "LDGSTS"), "LDGSTS|HMMA|STS", r"STG|U16",
        tensor=32, waits=0, static=2900, cycles=3575, narrow=24,
    ),
    "window": Hot(
        "warpgroup_forward_kernelINS_4bf16ELi128ELb1E", ("HGMMA",), "HGMMA|EX2", "LDG",
        tensor=16, waits=2, static=390, cycles=909, some=True,
    ),
    "window, biased or causal": Hot(
        "warpgroup_forward_kernelINS_4bf16ELi128ELb0E", ("HGMMA",), "HGMMA|EX2", "LDG",
        tensor=16, waits=2, static=1450, cycles=1785,
    ),
    "window, dq": gradients("dq", plain=1, tensor=24, static=360, cycles=810),
    "window, dq, biased or causal": gradients("dq", plain=0, tensor=24, static=1300, cycles=1640),
    "window, dk and dv": gradients("dkv", plain=1, tensor=32, static=520, cycles=1190),
    "window, dk and dv, biased or causal": gradients("dkv", plain=0, tensor=32, static=1620, cycles=2830),
}  # fmt: skip


@pytest.fixture(scope="module")
def code():
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    if NVCC not in subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout:
        pytest.skip(f"the figures are of nvcc {NVCC}")
    tool = sass.cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump (package nvidia-cuda-cuobjdump)")
    library, log = by_nvcc("90a", float16=False)
    names = re.findall(r"Compiling entry function '(\w+)'", log)
    return sass.kernels(library, tool, [n for n in names if any(hot.kernel in n for hot in HOT.values())])


@pytest.mark.parametrize("name", HOT)
def test_hot_loop(name, code):
    hot = HOT[name]
    (kernel,) = (k for n, k in code.items() if hot.kernel in n)
    loop = kernel.loop(*hot.loop, some=hot.some)
    found = sass.count(loop)
    assert found["HGMMA"] + found["HMMA"] == hot.tensor
    assert found["wait"] == hot.waits  # one for each product would be one after another
    assert found["LDL"] == found["STL"] == 0
    assert found["I2F"] == 0  # a division
    assert found["LDS.U16"] + found["STS.U16"] == hot.narrow
    assert len(loop) <= hot.static
    cycles, instructions = kernel.cycles(loop, hot.through, hot.avoid)
    print(f"{name}: {instructions} of {len(loop)} instructions, {cycles} cycles")
    assert cycles <= 1.1 * hot.cycles


@pytest.mark.parametrize("name", [n for n in HOT if n.startswith("slice")])
def test_slices_touch_no_two_bytes_of_shared_memory_and_spill_nothing(name, code):
    (kernel,) = (k for n, k in code.items() if HOT[name].kernel in n)
    found = sass.count(kernel.code)
    assert not any(re.fullmatch(r"(LDS|STS)\.U16|LDL|STL", k) for k in found)


def test_the_loading_warpgroup_keeps_to_its_registers(code):
    """It gave the others away. Behind its code lie the loops in which any warp waits, of the others' registers."""
    for kernel in code.values():
        begin = [k for k, i in enumerate(kernel.code) if i.name == "USETMAXREG" and "DEALLOC" in i.text]
        for first in begin:
            end = next(k for k in range(first, len(kernel.code)) if kernel.code[k].text.startswith("EXIT"))
            text = " ".join(i.text for i in kernel.code[first:end])
            assert max(map(int, re.findall(r"\bR(\d+)\b", text))) < int(kernel.code[first].text.split("0x")[1], 16)


def instructions(*lines):
    return [sass.Instruction(16 * k, text, *control) for k, (text, *control) in enumerate(lines)]


def test_the_model_waits_for_what_an_instruction_waits_for():
    kernel = sass.Kernel(
        "",
        instructions(
            ("LDS R0, [R1]", 1, 0, 7, 0),  # signals on scoreboard 0 after 30 cycles
            ("IADD3 R2, R2, R3, RZ", 4, 7, 7, 0),
            ("IADD3 R0, R0, R2, RZ", 5, 7, 7, 1),  # waits for it
            ("@P0 BRA 0x0", 2, 7, 7, 0),
        ),
    )
    assert kernel.cycles(kernel.loop("LDS"), "$^") == (30 + 5 + 2, 4)


def test_the_model_takes_the_path_that_is_asked_for():
    kernel = sass.Kernel(
        "",
        instructions(
            ("@P0 BRA 0x30", 2, 7, 7, 0),
            ("MUFU.EX2 R0, R0", 9, 7, 7, 0),
            ("MUFU.EX2 R1, R1", 9, 7, 7, 0),
            ("FADD R0, R0, R1", 4, 7, 7, 0),
            ("@P1 BRA 0x0", 1, 7, 7, 0),
        ),
    )
    loop = kernel.loop("MUFU")
    assert kernel.cycles(loop, "EX2") == (2 + 9 + 9 + 4 + 1, 5)
    assert kernel.cycles(loop, "FADD") == (2 + 8 + 4 + 1, 3)
