"""What a library must be to load with any Python, any torch from 2.11 on, and any glibc from 2.28 on, or from the one
that its wheel is named for.

`python -m wheels.check FILE.whl|FILE.so ...` prints a line for each library, and exits with 1 where one is wrong.
"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
from elftools.elf.sections import SymbolTableSection

# The newest versions that manylinux_2_28 allows.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
# Libraries that every such system, or torch, has.
MAY_NEED = re.compile(r"(libtorch_cpu|libtorch_cuda|libc10|libstdc\+\+|libm|libgcc_s|libc|ld-linux-[\w-]+)\.so(\.\d+)?")
# Of LibTorch, the stable C interface alone.
STABLE = re.compile(r"(aoti_)?torch_\w+")
# A torch that was linked has symbols of its own of the C++ library, which a wheel's build does not see.
STANDARD = re.compile(r"_Z(N?K?[RO]?|T[VIST])St\w+")
MOST = {"linmu": 3, "linmu_teacher": 7, "linmu_cuda": 12}  # MB of a wheel
PROCESSORS = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}


def faults(data: bytes, wheel: bool = True, glibc: tuple[int, ...] | None = None) -> list[str]:
    """What is wrong with a library, one line each. One that is for no wheel may be of this system's glibc and C++.

    glibc: the newest that it may need; None: that of manylinux_2_28.
    """
    elf = ELFFile(io.BytesIO(data))
    dynamic = next(s for s in elf.iter_sections() if isinstance(s, DynamicSection))
    newest, found = NEWEST if glibc is None else NEWEST | {"GLIBC": glibc}, []
    for tag in dynamic.iter_tags():
        kind = tag.entry.d_tag
        needed, path = getattr(tag, "needed", ""), getattr(tag, "rpath", None) or getattr(tag, "runpath", "")
        if kind == "DT_NEEDED" and not MAY_NEED.fullmatch(needed):
            found.append(f"it needs {needed}")
        if wheel and kind in ("DT_RPATH", "DT_RUNPATH") and path != "$ORIGIN/../torch/lib":
            found.append(f"it looks for libraries in {path}")
    for name, version in versions(elf):
        if wheel and (name not in newest or version > newest[name]):
            platform = "manylinux_" + "_".join(map(str, newest["GLIBC"]))
            found.append(f"it needs {name}_{'.'.join(map(str, version))}, newer than {platform}")
    for symbol in unversioned(elf):
        if not STABLE.fullmatch(symbol) and (wheel or not STANDARD.fullmatch(symbol)):
            found.append(f"it needs the symbol {symbol}")
    return found


def versions(elf: ELFFile) -> Iterator[tuple[str, tuple[int, ...]]]:
    for section in elf.iter_sections():
        if isinstance(section, GNUVerNeedSection):
            for _, needed in section.iter_versions():
                for entry in needed:
                    name, _, version = entry.name.rpartition("_")
                    yield name, tuple(int(v) for v in version.split("."))


def unversioned(elf: ELFFile) -> Iterator[str]:
    """Undefined symbols of no library's version: those that torch must have."""
    table = elf.get_section_by_name(".dynsym")
    numbers = next((s for s in elf.iter_sections() if isinstance(s, GNUVerSymSection)), None)
    assert isinstance(table, SymbolTableSection)
    for index, symbol in enumerate(table.iter_symbols()):
        if symbol.name and symbol.entry.st_shndx == "SHN_UNDEF" and symbol.entry.st_info.bind == "STB_GLOBAL":
            version = numbers.get_symbol(index).entry.ndx if numbers else "VER_NDX_GLOBAL"
            if version in ("VER_NDX_GLOBAL", "VER_NDX_LOCAL"):
                yield symbol.name


def torch_symbols(data: bytes) -> set[str]:
    return {name for name in unversioned(ELFFile(io.BytesIO(data))) if STABLE.fullmatch(name)}


def libraries(file: Path) -> Iterator[tuple[str, bytes]]:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            for name in wheel.namelist():
                if re.search(r"\.so(\.|$)", name):
                    yield name, wheel.read(name)
    else:
        yield file.name, file.read_bytes()


def check(file: Path) -> list[str]:
    """The faults of all libraries of a wheel, or of a library; and of a wheel's name and size."""
    found, held = [], []
    platform = re.search(r"-py3-none-manylinux_(2)_(\d+)_(\w+)$", file.stem)
    glibc = (int(platform[1]), int(platform[2])) if platform else None
    for name, data in libraries(file):
        held.append(name)
        processor = PROCESSORS.get(ELFFile(io.BytesIO(data))["e_machine"])
        found += [f"{name}: {fault}" for fault in faults(data, glibc=glibc)]
        if file.suffix == ".whl" and (platform is None or platform[3] != processor):
            found.append(f"{name} is for {processor}")
    if file.suffix == ".whl" and not held and not file.stem.endswith("-py3-none-any"):
        found.append("it holds no library")
    most = MOST.get(file.name.partition("-")[0])
    if file.suffix == ".whl" and most and file.stat().st_size > most * 2**20:
        found.append(f"it has more than {most} MB")
    return found


def main(files: list[str]) -> int:
    wrong = 0
    for file in map(Path, files):
        found = check(file)
        wrong += bool(found)
        print(f"{file.name}: {file.stat().st_size / 2**20:.2f} MB, {'; '.join(found) or 'ok'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
