"""What can be read from a kernel's machine code (SASS) without a GPU: its loops, what is in them, and about how long
one warp takes for a round of one.

ptxas encodes in each instruction for how many cycles the next one waits, and on which of six scoreboards instructions
of varying latency signal. `Kernel.cycles` follows a path with these and the usual latencies (shared memory 30 cycles,
global 550, a taken branch 8). It leaves out what warps do to each other, the caches, and the time of wgmma, of which a
warp only waits for the end. So it is no time, but a figure that shows when code has become slower.
"""

from __future__ import annotations

import bisect
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LATENCY = {
    "LDS": 30, "LDSM": 33, "LDG": 550, "LD": 550, "LDC": 40, "ULDC": 40, "LDL": 60, "MUFU": 22, "F2F": 22, "I2F": 22,
    "F2I": 22, "SHFL": 28, "S2R": 30, "S2UR": 30, "R2UR": 14, "HMMA": 33, "HGMMA": 0, "WARPGROUP": 2, "F2FP": 8,
    "DADD": 16, "DMUL": 16, "DFMA": 16, "BAR": 30, "SYNCS": 30, "ELECT": 14, "VOTEU": 14, "IMAD": 6,
}  # fmt: skip
OTHER_LATENCY, TAKEN, BARRIER = 20, 8, 20


def cuobjdump() -> str | None:
    """CUDA's disassembler: on the path, or of the package nvidia-cuda-cuobjdump."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for tool in sorted(Path(folder).glob("cu*/bin/cuobjdump")):
            return str(tool)
    return None


@dataclass
class Instruction:
    address: int
    text: str
    stall: int  # cycles until the next one
    sets: int  # the scoreboard that its result signals on; 7: none
    frees: int  # and that its operands' reading does
    waits: int  # scoreboards to wait for, a bit each

    @property
    def words(self) -> list[str]:
        words = self.text.split()
        return words[1:] if words[0].startswith("@") else words

    @property
    def name(self) -> str:
        return self.words[0].split(".")[0]

    @property
    def target(self) -> int | None:
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        return self.text.startswith("@") or re.search(r"BRA(\.\w+)* !?U?P\d", self.text) is not None


@dataclass
class Kernel:
    name: str
    code: list[Instruction] = field(default_factory=list)

    def index(self, address: int) -> int:
        return bisect.bisect_left(self.code, address, key=lambda i: i.address)

    def loop(self, name: str, *others: str, some: bool = False) -> list[Instruction]:
        """The smallest loop that holds all instructions of a name that the kernel has, or some, and some of each
        other."""
        wanted = [i.address for i in self.code if i.name == name]
        found = []
        for i in self.code:
            held = [i.target is not None and i.target <= w < i.address for w in wanted]
            if i.target is not None and (any(held) if some else all(held)):
                code = self.code[self.index(i.target) : self.index(i.address) + 1]
                if {*others} <= {j.name for j in code}:
                    found.append(code)
        return min(found, key=len)

    def cycles(self, loop: list[Instruction], through: str, avoid: str = r"^$") -> tuple[int, int]:
        """Cycles and instructions of the cheapest round, of those that pass the most instructions like `through`, and
        the fewest like `avoid`."""
        return self._time(self._path(loop, re.compile(through), re.compile(avoid)))

    @staticmethod
    def _path(loop: list[Instruction], through: re.Pattern[str], avoid: re.Pattern[str]) -> list[Instruction]:
        place = {i.address: k for k, i in enumerate(loop)}
        best: list[tuple[float, int, int]] = [(-1e9, 0, -1)] * len(loop)  # score, -cost, next; from here to the end
        for k in reversed(range(len(loop))):
            i = loop[k]
            if k == len(loop) - 1:
                ways = [(0.0, 0, -1)]
            else:
                after = [k + 1] if i.target is None or i.conditional else []
                if i.name in ("EXIT", "RET"):
                    after = [k + 1] if i.conditional else []
                if i.target is not None and place.get(i.target, -1) > k:
                    after.append(place[i.target])
                ways = [(best[a][0], best[a][1], a) for a in after]
            if not ways:
                continue
            score, cost, following = max(ways)
            score += (1.0 if through.search(i.text) else 0.0) - (100.0 if avoid.search(i.text) else 0.0)
            best[k] = (score, cost - max(1, i.stall), following)
        path, k = [], 0
        while k >= 0:
            path.append(loop[k])
            k = best[k][2]
        return path

    @staticmethod
    def _time(path: list[Instruction]) -> tuple[int, int]:
        now, ready = 0, [0] * 6
        for i, following in zip(path, [*path[1:], None], strict=True):
            now = max([now, *(ready[k] for k in range(6) if i.waits >> k & 1)])
            latency = LATENCY.get(i.name, OTHER_LATENCY)
            if i.sets < 6:
                ready[i.sets] = max(ready[i.sets], now + latency)
            if i.frees < 6:
                ready[i.frees] = max(ready[i.frees], now + min(latency, OTHER_LATENCY))
            now += max(1, i.stall) + (BARRIER if i.name == "BAR" else 0)
            if following is not None and following.address == i.target:
                now += TAKEN
        return now, len(path)


def count(code: list[Instruction]) -> Counter[str]:
    """By name, and by name and size where a 2-byte access to shared memory is one."""
    found = Counter(i.name for i in code)
    found.update(f"{i.name}.U16" for i in code if re.match(r"(LDS|STS)\S*\.U16", i.words[0]))
    found.update("wait" for i in code if i.words[0].startswith("WARPGROUP.DEPBAR"))
    return found


def kernels(library: Path, tool: str, names: list[str]) -> dict[str, Kernel]:
    """Of a library for one architecture, those of these mangled names: all of them would take three times as long."""
    path = f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # nvdisasm lies beside it
    command = [tool, "-sass", "-fun", ",".join(names), str(library)]
    text = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True).stdout
    found: dict[str, Kernel] = {}
    kernel = pending = None
    for line in text.splitlines():
        if name := re.match(r"\s*Function : (\S+)", line):
            kernel = found.setdefault(name[1], Kernel(name[1]))
        elif kernel and (first := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/", line)):
            pending = int(first[1], 16), first[2].strip()
        elif kernel and pending and (second := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
            bits = int(second[1], 16) >> 41
            control = bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
            kernel.code.append(Instruction(*pending, *control))
            pending = None
    return found
