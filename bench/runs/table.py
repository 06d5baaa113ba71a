"""A table of runs: its TOML file, the configuration of each run, and the file of its results."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from linmu_distill.checkpoint import write_atomically
from linmu_distill.config import Config, ConfigError, describe, hash_of, load_values, parse_config
from linmu_distill.files import read_lines
from linmu_distill.run import TEACHER, RunError
from linmu_distill.stages import STAGES
from linmu_models.saving import locked
from linmu_ops.nn import ExactConfig

# Of a folder, which must not be the one above.
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Strict):
    """One line of a table: a run for each seed, or a run of another line looked at after an earlier stage."""

    name: Name
    about: str = ""
    """For the page: what the line is."""
    set: dict[str, Any] = {}
    """Options of `Config` that differ from the base; tables are merged, all else is replaced."""
    of: Name | None = None
    """Score the runs of this line..."""
    after: Annotated[int, Field(ge=0, lt=len(STAGES))] | None = None
    """...as they were after this stage; 0: as converted and calibrated (zero steps)."""
    alone: Literal["windows", "near-kept", "equal-memory"] | None = None
    """...without their scan, or without kept tokens too (of an `ExactMMATE`); or score the teacher in their place, with
    a cache as large as what they keep."""
    base: str | None = None
    """A base of its own, in place of the table's."""
    lora_alone: str | None = None
    """A recipe of another project: nothing is trained but LoRA, on modules of the decoder with such a name. LoRA may be
    on the new blocks."""
    convolution: Annotated[int, Field(ge=2, le=8)] | None = None
    """A recipe of another project: a causal convolution of so many taps is before each scan, and no rotary embedding
    reaches it. Its blocks are `MMATE` with `reverse = false` and `major_scan = false`."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """A recipe of another project: the temperature of L_tok."""
    freeze: dict[Literal["stage1", "stage2", "stage3"], list[str]] | None = None
    """A recipe of another project: regular expressions of parameters that stay frozen in a stage."""

    @property
    def own(self) -> dict[str, Any]:
        """Its options for a recipe of another project, as far as they are given."""
        names = ("lora_alone", "convolution", "temperature", "freeze")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _a_run_or_a_look_at_one(self) -> "Row":
        if (self.of is None) != (self.after is None) or (self.of and (self.set or self.own or self.base)):
            raise ValueError("of and after belong together, without set")
        if self.alone and self.of is None:
            raise ValueError(f"alone must stand beside of and after, got {self.alone!r} alone")
        frozen = [pattern for patterns in (self.freeze or {}).values() for pattern in patterns]
        for name, patterns in {"lora_alone": [self.lora_alone or ""], "freeze": frozen}.items():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name} must be a regular expression, got {pattern!r}: {error}") from error
        return self


class Curve(_Strict):
    """Accuracy of one task group against one option of its generator."""

    group: str
    option: str
    values: Annotated[list[Any], Field(min_length=1)]
    samples: Annotated[int, Field(gt=0)] = 100
    label: str = ""
    """The axis."""
    trained: Any = None
    """The largest value that training shows; drawn in."""


class TableConfig(_Strict):
    """The TOML file of a table. Its name is the file's."""

    title: str
    about: str = ""
    base: str
    """A configuration of `linmu distill`, relative to the table's folder. Its `seed` is not used, and of its
    `output` only the folder that it lies in: runs are in `<table>/<row>/<seed>` there."""
    seeds: Annotated[int, Field(gt=0)] = 3
    set: dict[str, Any] = {}
    """Options that all rows share."""
    rows: Annotated[list[Row], Field(min_length=1)]
    """The first is what the others are compared with."""
    unequal_compute: str = ""
    """Why rows may differ in their number of steps; without it, they may not."""
    held_out: Annotated[int, Field(ge=0)] = 64
    """Test samples of each group on which the distance to the teacher is measured."""
    needle_frames: Annotated[int, Field(ge=2)] = 64
    """Frames of the videos in which needles are asked about."""
    curves: dict[Name, Curve] = {}
    results: str = "bench/results/ablations"
    reports: str = "bench/reports"


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` in it; tables are merged, all else is replaced."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


class Table:
    """A table file with the configuration of each of its runs."""

    def __init__(self, path: Path) -> None:
        """Read the file and check every row.

        Raises:
            ConfigError: the file, its base or a row is wrong, or rows differ in their number of steps.
        """
        values = load_values(path)
        try:
            self.config = TableConfig.model_validate(values)
        except ValidationError as error:
            raise ConfigError(*describe(error, str(path))) from error
        self.name = path.stem
        self.source = str(path)
        bases = {row.base or self.config.base for row in self.config.rows}
        self._bases = {base: load_values(path.parent / base) for base in bases | {self.config.base}}
        names = [row.name for row in self.config.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or TEACHER in names:
            raise ConfigError(
                f"{path}: rows: a name must occur once and not be {TEACHER!r}, got {[*twice, TEACHER][0]}"
            )
        self.runs = [row for row in self.config.rows if row.of is None]
        for row in self.config.rows:
            if row.of is not None and row.of not in {other.name for other in self.runs}:
                raise ConfigError(f"{path}: rows.{row.name}.of must name a row that is run, got {row.of}")
        self.first = self.run_config(self.runs[0], 0)
        self._check_compute()
        self._check_scoring()
        self._check_parts()

    def _check_compute(self) -> None:
        steps = {row.name: sum(self.run_config(row, 0).stage(i).steps for i in (1, 2, 3)) for row in self.runs}
        if len(set(steps.values())) > 1 and not self.config.unequal_compute:
            told = ", ".join(f"{name} {count}" for name, count in steps.items())
            raise ConfigError(
                f"{self.source}: rows must have as many steps in all, got {told}; or say why not in unequal_compute"
            )

    def _check_parts(self) -> None:
        for row in self.config.rows:
            if row.of is None or row.alone in (None, "equal-memory"):
                continue
            if not isinstance(self.run_config(self.row(row.of), 0).block, ExactConfig):
                raise ConfigError(f"{self.source}: rows.{row.name}.of must be of preset `exact`, got {row.of}")

    def _check_scoring(self) -> None:
        for row in self.runs:
            if self.scoring(self.run_config(row, 0)) != self.scoring(self.first):
                raise ConfigError(f"{self.source}: rows.{row.name} must be scored as the first: teacher, evaluation")

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            RunError: there is none.
        """
        for row in self.config.rows:
            if row.name == name:
                return row
        names = ", ".join(row.name for row in self.config.rows)
        raise RunError(f"--row must be among {names}, got {name}")

    def run_config(self, row: Row, seed: int) -> Config:
        """The configuration of one run: base, then the table's `set`, then the row's."""
        values = merged(merged(self._bases[row.base or self.config.base], self.config.set), row.set)
        output = Path(values.get("output", "runs/base")).parent / self.name / row.name / str(seed)
        return parse_config({**values, "output": str(output), "seed": seed}, f"{self.source}: {row.name}")

    def scoring(self, config: Config) -> dict[str, Any]:
        """Everything but the model that scores depend on."""
        return {
            "evaluation": config.evaluation.model_dump(mode="json", exclude={"speed_lengths"}),
            "held_out": self.config.held_out,
            "needle_frames": self.config.needle_frames,
            "curves": {name: curve.model_dump(mode="json") for name, curve in self.config.curves.items()},
            "teacher": config.teacher,
        }

    def key(self, row: Row, seed: int) -> str:
        """Hash of all that the result of a row depends on, the code excepted."""
        run = row if row.of is None else self.row(row.of)
        config = self.run_config(run, seed)
        stages = [config.fingerprint(number) for number in range(len(STAGES) + 1)]
        alone = {"alone": row.alone} if row.alone else {}
        return hash_of({"stages": stages, "after": row.after, **alone, **run.own, **self.scoring(config)})[:16]

    @property
    def teacher_key(self) -> str:
        """As `key`, of the teacher's scores."""
        return hash_of(self.scoring(self.first))[:16]


class Results:
    """A JSONL file: a line for each row and seed, and one for the teacher."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(row, key) -> its last line. Lines of rows as they once were stay in the file and match no key."""
        return {(record["row"], record["key"]): record for record in read_lines(self.path, ("row", "key"))}

    def of_other_tables(self, key: str) -> dict[str, Any] | None:
        """What a table beside this one measured under the same key, with that table's name in "from"."""
        for path in sorted(self.path.parent.glob("*.jsonl")):
            for record in Results(path).read().values() if path != self.path else ():
                if record["key"] == key:
                    return {"from": path.stem, **record}
        return None

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, whole or not at all; several processes may."""
        with locked(self.path.parent):
            # A line that is damaged must not swallow the next one.
            lines = [*read_lines(self.path), record]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))
