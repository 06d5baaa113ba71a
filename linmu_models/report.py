"""What a conversion took from the teacher, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from linmu_ops._tables import plain


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the student.

    Attributes:
        tensor: its name.
        source: the teacher's tensor that it comes from; "" if none.
        how: "copied"; "shared" (same memory); "new" (initialised); "absent" (a tensor of the teacher without a place).
        numel: how many numbers it has.
    """

    tensor: str
    source: str
    how: str
    numel: int


@dataclass
class TransferReport:
    """Where each tensor of a student comes from.

    Print it for a table in which layers are counted together. `save` writes every row as JSON.
    """

    teacher: str
    model_type: str
    kept_layers: list[int]
    linear_layers: list[int]
    rows: list[TensorRow] = field(default_factory=list)

    def count(self, how: str) -> int:
        """How many numbers (tensor elements) have this `how`."""
        return sum(row.numel for row in self.rows if row.how == how)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every row as JSON; a file that is there stays whole until the new one is."""
        new = Path(f"{os.fspath(path)}.new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        new.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TransferReport:
        values = json.loads(Path(path).read_text("utf-8"))
        return cls(**{**values, "rows": [TensorRow(**row) for row in values["rows"]]})

    def __str__(self) -> str:
        lines = [
            f"{self.teacher} -> {self.model_type}: {len(self.linear_layers)} linear layers, "
            f"{len(self.kept_layers)} with attention {self.kept_layers or ''}".rstrip(),
            *plain(["tensor", "from", "how", "tensors", "numbers"], self._grouped()),
        ]
        for how in ("copied", "shared", "new", "absent"):
            if self.count(how):
                lines.append(f"{how}: {self.count(how):,} numbers in {sum(r.how == how for r in self.rows)} tensors")
        return "\n".join(lines)

    def _grouped(self) -> Iterable[list[str]]:
        groups: dict[tuple[str, str, str], list[TensorRow]] = {}
        for row in self.rows:
            same_name = row.tensor == row.source
            # What is copied under its own name is uninteresting: one line per part of the model.
            name = ".".join(row.tensor.split(".")[:2]) + ".*" if same_name else re.sub(r"\.\d+\.", ".*.", row.tensor)
            source = "same name" if same_name else re.sub(r"\.\d+\.", ".*.", row.source)
            groups.setdefault((name, source, row.how), []).append(row)
        for (name, source, how), rows in groups.items():
            yield [name, source or "-", how, str(len(rows)), f"{sum(r.numel for r in rows):,}"]
