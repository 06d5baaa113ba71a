"""The TOML file of a distillation run. Unknown keys are errors; every error names its key."""

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from linmu_models.config import parse_options
from linmu_ops.nn import ExactConfig, MMATEConfig

from .data.tasks import GROUPS, MOST_CELLS, MOST_FRAMES, NEEDLE_FRAMES, TASKS
from .stages import PRESETS, Stage, alone

# As TOML writes them: a number or a switch that is quoted is a mistake, and so is a switch in a number's place. What is
# beyond the limits would end a run, at a place that does not name the key.
Positive = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
Few = Annotated[int, Field(gt=0, le=2**16, strict=True)]  # that are held in memory, or made of it, all at once
Frames = Annotated[int, Field(gt=0, le=MOST_FRAMES, strict=True)]
Tokens = Annotated[int, Field(gt=0, le=2**24, strict=True)]  # of a batch
Cells = Annotated[int, Field(gt=0, le=MOST_CELLS, strict=True)]
Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Weight = Annotated[float, Field(ge=0, lt=1e30, strict=True)]
Rate = Annotated[float, Field(gt=0, lt=1e30, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Spread = Literal["ddp", "fsdp"]
EVALUATION_SEED = 2024  # fixed, so that runs are asked the same questions
_LARGEST = 2**20  # bytes of a file
_BLOCK = 8  # samples; so many are cheap, and a share of so few means little


class ConfigError(ValueError):
    """The configuration file is wrong; the text says where, one line for each mistake.

    Attributes:
        lines: of the text.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# pydantic names the chosen kind of a value among the keys of an error; no key of a file is so called.
_ALONE, _SEVERAL, _TASKS, _RECORDS = _KINDS = ("\0alone", "\0several", "\0tasks", "\0records")


def _alone_or_several(value: Any) -> str:
    return _SEVERAL if isinstance(value, list | tuple | dict) else _ALONE


# A value, or a list or table of such: which of them is meant is seen before it is checked, so a mistake has one line.
One = TypeVar("One")
Many = TypeVar("Many")
AloneOrSeveral = Annotated[
    Annotated[One, Tag(_ALONE)] | Annotated[Many, Tag(_SEVERAL)], Discriminator(_alone_or_several)
]


def _check_groups(name: str, groups: Iterable[str]) -> None:
    if unknown := [group for group in groups if group not in TASKS]:
        raise ValueError(f"{name} must be of the groups {', '.join(TASKS)}, got {unknown[0]}")


class TaskData(_Table):
    """Training on the built-in tasks. They are for the shipped teacher; `distill/data/README.md` describes them."""

    mixture: Annotated[dict[str, Rate], Field(min_length=1)] = dict.fromkeys(GROUPS, 1.0)
    """How often each task group is drawn, against the others."""
    batch_size: AloneOrSeveral[Few, dict[str, Few]] = 16
    """Samples of a batch: one number for all groups, or one for each group. A batch of needles has fewer where their
    videos are long."""
    needle_frames: tuple[Frames, Frames] = NEEDLE_FRAMES
    """The least and the most frames of a long video: of `needle`, `needles`, `tracking`. All videos of a batch are
    equally long."""

    @model_validator(mode="before")
    @classmethod
    def _check_packing(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("packing"):
            raise ValueError(f"packing is for data sets, the built-in tasks are not packed; got {values['packing']!r}")
        return values

    @model_validator(mode="after")
    def _check_values(self) -> "TaskData":
        _check_groups("mixture", self.mixture)
        if isinstance(self.batch_size, dict):
            _check_groups("batch_size", self.batch_size)
            if missing := [group for group in self.mixture if group not in self.batch_size]:
                raise ValueError(f"batch_size must be given for every group of mixture, got none for {missing[0]}")
        least, most = self.needle_frames
        if not 2 <= least <= most:
            raise ValueError(f"needle_frames must be [least, most] with 2 <= least <= most, got {[least, most]}")
        return self


class SetConfig(_Table):
    """One data set in the format in which it is published. "Data sets" in `distill/README.md` describes the formats."""

    format: Literal["onevision", "llava_video", "activitynet_qa", "text"]
    files: Annotated[list[str], Field(min_length=1)]
    """Glob patterns of the parquet, JSON or text files. `**` reaches into folders."""
    folder: str | None = None
    """The folder of the images or videos that the files name."""
    weight: AloneOrSeveral[Rate, tuple[Weight, Weight, Weight]] = 1.0
    """How often a batch is of this set, against the other sets. Three numbers are the weights in stages 1 to 3; 0
    leaves the set out of a stage."""


class RecordData(_Table):
    """Training on data sets on disk."""

    sets: Annotated[dict[str, SetConfig], Field(min_length=1)]
    """The data sets, by names of your own."""
    max_tokens: Tokens = 8192
    """The most tokens of a batch, padding included. A longer sample is left out and counted. Plain text is cut into
    pieces of this length."""
    packing: Switch = False
    """A batch is one row of several samples, without padding. Each sample trains as if it were alone. Otherwise each
    sample is a row, padded to the longest. `[evaluation.held_out]` is never packed."""
    frames: Positive = 64
    """The most frames that are taken of a video."""
    fps: Rate = 1.0
    """Frames that are taken of a second of video."""
    image_pixels: Positive | None = None
    """The most pixels of an image. A larger image is made smaller."""
    frame_pixels: Positive | None = None
    """The most pixels of a video frame. A larger frame is made smaller."""

    def weights(self) -> list[float]:
        """The weight of each set, where each has one for all stages.

        Raises:
            ValueError: a set has three.
        """
        found: list[float] = []
        for name, given in self.sets.items():
            if isinstance(given.weight, tuple):
                rule = "must be one number, as no stage sees it"
                raise ValueError(f"held_out.sets.{name}.weight {rule}, got {given.weight}")
            found.append(given.weight)
        return found

    @property
    def is_plain_text(self) -> bool:
        """Whether no set has questions or pictures."""
        return {chosen.format for chosen in self.sets.values()} == {"text"}

    def in_stage(self, number: int) -> "RecordData":
        """The sets of stage 1, 2 or 3 alone, with their weights in it."""
        chosen = {
            name: given.model_copy(update={"weight": weight})
            for name, given in self.sets.items()
            if (weight := given.weight[number - 1] if isinstance(given.weight, tuple) else given.weight)
        }
        return self.model_copy(update={"sets": chosen})


def _kind(value: Any) -> str:
    return _RECORDS if isinstance(value, RecordData) or (isinstance(value, dict) and "sets" in value) else _TASKS


DataConfig = Annotated[Annotated[TaskData, Tag(_TASKS)] | Annotated[RecordData, Tag(_RECORDS)], Discriminator(_kind)]


class EvaluationConfig(_Table):
    """What is measured: exact match on the built-in tasks, distance to the teacher on held-out data, and speed."""

    samples: AloneOrSeveral[Count, dict[str, Count]] = 200
    """Questions of each task group that the teacher and the finished student are asked. A table gives a number for each
    group that it names, and leaves out the others; a number alone is of the five groups that the shipped teacher knows.
    0 turns this off. Before training and between stages about a quarter of them is asked."""
    speed_lengths: list[Cells] = [512, 1024, 2048, 4096]
    """Numbers of visual tokens at which time to first token, decode speed and cache size are measured at the end. An
    empty list turns this off."""
    held_out: RecordData | None = None
    """Data sets that no stage sees. Perplexity, agreement with the teacher and distance to it are measured on them."""

    @model_validator(mode="after")
    def _check_values(self) -> "EvaluationConfig":
        if isinstance(self.samples, dict):
            _check_groups("samples", self.samples)
        if self.held_out is not None and self.held_out.packing:
            raise ValueError("held_out.packing must be false: what is only measured is not packed, got true")
        if self.held_out is not None:
            self.held_out.weights()
        return self

    def counts(self, *, final: bool) -> dict[str, int]:
        """Samples of each group that is evaluated: of the teacher and the finished student, or in between."""
        given = self.samples if isinstance(self.samples, dict) else dict.fromkeys(GROUPS, self.samples)
        every = {group: given.get(group, 0) for group in TASKS}
        return {group: count if final else _fewer(count) for group, count in every.items() if count}

    @property
    def groups(self) -> list[str]:
        """The task groups that are evaluated at all."""
        return list(self.counts(final=True))


def _fewer(count: int) -> int:
    """A quarter, in whole eights, at least eight of them: enough to see a stage fail."""
    return min(count, max(_BLOCK, count // 4 // _BLOCK * _BLOCK))


class StageConfig(_Table):
    """What differs from a row of the stage table, `STAGES` in `stages.py`."""

    steps: Count | None = None
    """0 skips the stage. The next one goes on from the stage before."""
    learning_rate: Rate | None = None
    """The highest. It is reached after the first twentieth of the steps, and then falls by half a cosine."""
    losses: dict[Literal["hidden", "block", "token", "sequence", "supervised"], Weight] | None = None
    """The weight of each loss. It replaces all losses of the table; a loss that is not named is not used. `block`
    stands alone: it is L_hid where each block gets what the teacher's attention got, not what the layers below made.
    `hidden` counts all tokens alike; `block` weighs them by what answers read."""
    data: DataConfig | None = None
    """Other data in this stage."""

    @model_validator(mode="after")
    def _check_losses(self) -> "StageConfig":
        used = [name for name, weight in (self.losses or {}).items() if weight]
        if "block" in used and len(used) > 1:
            raise ValueError(f"losses must have none beside `block`, got {used}")
        return self


class Config(_Table):
    """A whole run."""

    output: str
    """The run's folder, as `runs/demo`. All results go there. Its last part is the run's name."""
    teacher: str
    """The model to imitate: a folder that transformers can load, or a name on the hub. A relative folder starts from
    the working directory."""
    preset: Literal["exact", "paper", "literal"] = "exact"
    """Where all other options start: what the tables in `bench/reports` chose, the paper's structure, or the paper to
    the letter. It sets the block's options, the stages' losses, and what stays frozen. `literal` calibrates nothing, so
    its L_hid is absolute."""
    student: dict[str, Any] = Field({}, validate_default=True)
    """Options of the block that differ from the preset's: fields of `linmu_ops.nn.ExactConfig`, or of `MMATEConfig`.
    `keep_attention` is a list of decoder layers that stay quadratic; negative numbers count from the end. Once read,
    this holds every option: a run is not resumed when the library's defaults have changed."""
    seed: Seed = 0
    """Sets the new parameters and the training data."""
    data: DataConfig = TaskData()
    """Training data: built-in tasks, or data sets."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the teacher's weights and of matrix products. What is trained is always float32."""
    gradient_accumulation: Few = 1
    """Batches of each process in a step."""
    gradient_checkpointing: Switch = False
    """Saves memory in stages whose blocks get the student's own inputs: the backward pass runs each layer again."""
    parallel: AloneOrSeveral[Spread, tuple[Spread, Positive]] = "ddp"
    """With several processes: a whole student in each (`ddp`), or a part in each (`fsdp`, FSDP2). `["fsdp", 4]`: and 4
    processes share each row, of which each works on a part of the tokens."""
    max_new_tokens: Few = 64
    """The most tokens of the teacher's own answers (L_seq). An answer that does not end in time is left out."""
    lora_rank: Few = 8
    """Rank of the low-rank updates of the decoder's FFNs in stage 3."""
    checkpoint_every: Positive = 200
    """Steps between checkpoints. The last two are kept."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured."""
    stage1: StageConfig = StageConfig()
    stage2: StageConfig = StageConfig()
    stage3: StageConfig = StageConfig()

    @field_validator("teacher", mode="before")
    @classmethod
    def _check_teacher(cls, teacher: Any) -> Any:
        if isinstance(teacher, dict):
            raise ValueError(
                'must be a folder or a name, as in teacher = "..."; `max_new_tokens` stands above all tables; '
                f"got a table of {', '.join(map(str, teacher)) or 'nothing'}"
            )
        return teacher

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: str) -> str:
        if Path(output).name.strip() in ("", "..") or "\0" in output:
            raise ValueError(f"must be the run's own folder, as in runs/demo, got {output!r}")
        return output

    @field_validator("student")
    @classmethod
    def _write_out_student(cls, student: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "preset" in student:
            raise ValueError(f"preset must stand above all tables, got it in [student]: {student['preset']!r}")
        options = {"preset": info.data.get("preset", "exact"), **student}
        layers = options.get("keep_attention", [])
        if not isinstance(layers, list | tuple) or not all(type(layer) is int for layer in layers):
            raise ValueError(f"keep_attention must be a list of layers, got {layers!r}")
        kept = {"keep_attention": options.pop("keep_attention")} if "keep_attention" in options else {}
        return {**dataclasses.asdict(parse_options(options)), **kept}

    @model_validator(mode="after")
    def _check_stages(self) -> "Config":
        for number in (1, 2, 3):
            data = self.stage_data(number)
            if isinstance(data, RecordData) and not data.sets:
                raise ValueError(f"data.sets: none of them is for stage {number}")
            stage = self.stage(number)
            if not stage.losses:
                raise ValueError(f"stage{number}.losses must have a weight over 0, got none")
            if stage.steps and "sequence" in stage.losses and isinstance(data, RecordData) and data.is_plain_text:
                raise ValueError(
                    f"stage{number}.losses must not have `sequence` where all data is plain text: it asks nothing that "
                    "the teacher could answer"
                )
        trained = [number for number in (1, 2, 3) if self.stage(number).steps]
        if trained == [1] and isinstance(self.block, MMATEConfig) and self.block.swin:
            raise ValueError(
                "student.branches must be 'flex' where only stage 1 has steps: it trains without Local-Swin, got "
                f"{self.block.branches!r}"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(self.output)

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.folder.name

    @property
    def sharded(self) -> bool:
        """Whether each of several processes holds a part of the student."""
        return "fsdp" in (self.parallel, self.parallel[0])

    @property
    def context(self) -> int:
        """So many processes share each row."""
        return 1 if isinstance(self.parallel, str) else self.parallel[1]

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """`precision` in the words of accelerate."""
        words: dict[str, Literal["no", "bf16", "fp16"]] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
        return words[self.precision]

    @property
    def block(self) -> MMATEConfig | ExactConfig:
        """Options of the student's block."""
        options = {name: value for name, value in self.student.items() if name != "keep_attention"}
        return parse_options({"preset": self.preset, **options})

    @property
    def is_calibrated(self) -> bool:
        """Whether sizes are set before training, and L_hid is relative to the teacher's own size. The paper says
        neither."""
        return self.preset != "literal"

    def overrides(self, number: int) -> StageConfig:
        """The overrides of stage 1, 2 or 3."""
        return {1: self.stage1, 2: self.stage2, 3: self.stage3}[number]

    def stage(self, number: int) -> Stage:
        """The preset's row of the stage table, with this run's overrides."""
        stage, changes = PRESETS[self.preset][number - 1], self.overrides(number)
        if changes.losses is not None:
            losses = {str(name): weight for name, weight in changes.losses.items() if weight}
            stage = dataclasses.replace(stage, losses=losses, block_input="student", average="tokens")
            if "block" in losses:
                stage = alone(stage, losses["block"])
        data = self.stage_data(number)
        if isinstance(data, RecordData) and data.is_plain_text:  # Every token of it is an answer.
            stage = dataclasses.replace(stage, average="tokens")
        return dataclasses.replace(
            stage,
            learning_rate=changes.learning_rate or stage.learning_rate,
            steps=stage.steps if changes.steps is None else changes.steps,
        )

    @property
    def averages(self) -> list[Literal["tokens", "read"]]:
        """The averages of L_hid that stages of this run use."""
        used = {stage.average for stage in map(self.stage, (1, 2, 3)) if stage.steps and "hidden" in stage.losses}
        return sorted(used)

    def has_lora(self, number: int) -> bool:
        """Whether the student has LoRA in stage `number`: from the first stage on that trains it."""
        return any("lora" in self.stage(i).trainable for i in range(1, number + 1))

    def stage_data(self, number: int) -> TaskData | RecordData:
        """The data of a stage; a table with sets has those of this stage only."""
        data = self.overrides(number).data or self.data
        return data if isinstance(data, TaskData) else data.in_stage(number)

    def fingerprint(self, number: int) -> str:
        """Hash of everything in this file that the result of stage `number` depends on, stages before it excepted.

        0: the calibrated student.
        """
        facts: dict[str, Any] = {
            **self.model_dump(include={"seed", "student", "precision"}, mode="json"),
            "data": self.stage_data(number or 1).model_dump(mode="json"),
            "is_calibrated": self.is_calibrated,
        }
        if not number:
            return hash_of({**facts, "averages": self.averages})
        stage = self.stage(number)
        facts |= {
            "stage": dataclasses.asdict(stage),
            "gradient_accumulation": self.gradient_accumulation,
            "lora_rank": self.lora_rank if self.has_lora(number) else None,
            "max_new_tokens": self.max_new_tokens if "sequence" in stage.losses else None,
        }
        return hash_of(facts)


def hash_of(facts: Any) -> str:
    """SHA-256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path) -> Config:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing, is no TOML, or has a wrong or unknown key.
    """
    return parse_config(load_values(path), str(path))


def load_values(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file, unchecked.

    Raises:
        ConfigError: the file is missing, or is no TOML.
        TypeError: `path` is none.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"a configuration must be the path of a TOML file, got {path!r}")
    try:
        with Path(path).open("rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:  # a device has no end
            raise ConfigError(f"{path}: must be a TOML file of at most {_LARGEST} bytes, got a larger one")
        return tomllib.loads(text.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ConfigError:
        raise
    except ValueError as error:  # TOML that is none, other bytes than UTF-8, a number of thousands of digits, a path
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: lists and tables must not nest so deep") from error


def parse_config(values: dict[str, Any], source: str = "config") -> Config:
    """Check the values of a configuration; `source` names it in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*describe(error, source)) from error


# What became of keys that once were.
_GONE = {
    r"name": "`output` is the run's folder, as in runs/demo",
    r"(teacher\.)?(dtype|mixed_precision)": "`precision` above all tables sets the teacher's and that of products",
    r"(.*\.)?(turns|window|workers|max_samples)": "chosen by the program",
    r"(.*\.)?text_length": "a piece of plain text has `max_tokens`",
    r"(.*\.)?stages": "`weight` may be a list, the weights in stages 1 to 3",
    r"(.*\.)?instruction": "ActivityNet-QA asks for a word or a short phrase",
    r"evaluation\.options": "a needle's video has 64 frames; `needle_frames` in [data] sets those of training",
    r"(.*\.)?options": "`needle_frames = [least, most]` sets the frames of a needle's video",
    r"hidden_average|losses": "L_hid of `block` weighs tokens by what answers read, that of `hidden` counts all alike",
    r"warmup|optimizer": "the learning rate rises for the first twentieth of a stage; AdamW is fixed",
    r"lora": "`lora_rank` stands above all tables; LoRA is on the decoder's FFNs",
    r"checkpoints": "`checkpoint_every` stands above all tables; the last two are kept",
    r"evaluation\.groups": "name the groups in `samples`",
    r"evaluation\.final_samples": "`samples` are those of teacher and finished student; in between it is a quarter",
    r"evaluation\.(seed|speed_new_tokens|held_out_batches)": "fixed, so that runs compare",
    r"calibrate(_step_sizes)?|calibration_batches": "the preset decides; `literal` does not calibrate",
    r"threads": "set OMP_NUM_THREADS",
    r"stage\d\.(train|freeze)": "the preset says what is trained",
    r"stage\d\.block_input": "`losses = {block = 1.0}` gives each block the teacher's inputs",
}


def describe(error: ValidationError, source: str) -> list[str]:
    """A line for each mistake, with its key."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if part not in _KINDS)
        unknown = problem["type"] == "extra_forbidden"
        said = problem["msg"].removeprefix("Value error, ")
        if unknown:
            known_once = next((told for pattern, told in _GONE.items() if re.fullmatch(pattern, key)), None)
            said = "unknown key" if known_once is None else f"no key any more: {known_once}"
        lines.append(": ".join(filter(None, (source, key, said))))
    return lines
