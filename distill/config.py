"""The TOML file of a distillation run. Unknown keys are errors; every error names its key."""

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
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

from .data.tasks import GROUPS, check_options
from .stages import PRESETS, STAGES, Stage

Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Mixture = Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
EVALUATION_SEED = 2024  # fixed, so that runs are asked the same questions
# Of a folder, which must not be the one above.
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]


def _regular(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"must be a regular expression, got {text!r}: {error}") from error
    return text


Pattern = Annotated[str, AfterValidator(_regular)]


class ConfigError(ValueError):
    """The configuration file is wrong; the text says where, one line for each mistake."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherConfig(_Table):
    """The model to imitate."""

    path: str
    """A folder that transformers can load, or a hub name. Relative folders are looked up from the working directory."""
    max_new_tokens: Positive = 64
    """Length limit of the teacher's own answers (L_seq)."""


def _among_groups(name: str, groups: Iterable[str]) -> None:
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"{name} must be of the groups {', '.join(GROUPS)}, got {unknown[0]}")


class TaskData(_Table):
    """What to train on: the built-in tasks, see `distill/data/README.md`."""

    mixture: Mixture = {"read": 1, "line": 1, "where": 1, "video": 1, "needle": 1}
    """How often each task group is drawn."""
    batch_size: Positive | dict[str, Positive] = 16
    """Samples in a batch, for all groups or for each."""
    options: dict[str, dict[str, Any]] = {}
    """More arguments of a group's generator: `options.needle = {frames = [16, 64]}`; and `batch_frames`, see
    `linmu_distill.data.TaskStream`."""

    @model_validator(mode="before")
    @classmethod
    def _check_packing(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("packing"):
            raise ValueError(f"packing is for data sets, the built-in tasks are not packed; got {values['packing']!r}")
        return values

    @model_validator(mode="after")
    def _check_groups(self) -> "TaskData":
        _among_groups("mixture", self.mixture)
        _among_groups("options", self.options)
        if isinstance(self.batch_size, dict):
            _among_groups("batch_size", self.batch_size)
            if missing := [group for group in self.mixture if group not in self.batch_size]:
                raise ValueError(f"batch_size must be given for every group of mixture, got none for {missing[0]}")
        return self

    @model_validator(mode="after")
    def _check_options(self) -> "TaskData":
        for group, options in self.options.items():
            check_options(group, {name: value for name, value in options.items() if name != "batch_frames"})
            total = options.get("batch_frames", 1)
            if type(total) is not int or total < 1:
                raise ValueError(f"options.{group}.batch_frames must be a number of frames, got {total!r}")
            frames = options.get("frames")
            if "batch_frames" in options and not (isinstance(frames, list | tuple) and len(frames) == 2):
                raise ValueError(f"options.{group}.frames must be [least, most] beside batch_frames, got {frames}")
        return self


class SetConfig(_Table):
    """One data set in its published format; see "Data sets" in `distill/README.md`."""

    format: Literal["onevision", "llava_video", "activitynet_qa", "text"]
    files: Annotated[list[str], Field(min_length=1)]
    """Glob patterns of the parquet, JSON or text files; `**` reaches into folders."""
    folder: str | None = None
    """Where the images or videos are that the files name."""
    weight: Annotated[float, Field(gt=0)] | tuple[Weight, Weight, Weight] = 1.0
    """How often a batch is of this set, against the others: in every stage, or in each of the three, 0 for never."""


class RecordData(_Table):
    """What to train on: data sets on disk."""

    sets: Annotated[dict[str, SetConfig], Field(min_length=1)]
    max_tokens: Positive = 8192
    """Tokens of a batch, padding included; a longer sample is left out, and counted."""
    packing: bool = False
    """A batch is one row of several samples, each of which trains as if it were alone, without padding; else each is a
    row, padded to the longest. Not in `[evaluation.held_out]`."""
    text_length: Positive = 1024
    """Tokens of a piece of plain text."""
    frames: Positive = 64
    """Frames of a video, at most."""
    fps: Annotated[float, Field(gt=0)] = 1.0
    """Frames that are taken of a second of video."""
    image_pixels: Positive | None = None
    """Larger images are made smaller."""
    frame_pixels: Positive | None = None
    """Larger video frames are made smaller."""
    window: Positive = 512
    """Records that are read, sorted by length and packed together."""

    def in_stage(self, number: int) -> "RecordData":
        """With the sets of stage 1, 2 or 3 alone, and their weights in it."""
        chosen = {
            name: given.model_copy(update={"weight": weight})
            for name, given in self.sets.items()
            if (weight := given.weight[number - 1] if isinstance(given.weight, tuple) else given.weight)
        }
        return self.model_copy(update={"sets": chosen})


def _kind(value: Any) -> str:
    return "records" if isinstance(value, RecordData) or (isinstance(value, dict) and "sets" in value) else "tasks"


DataConfig = Annotated[Annotated[TaskData, Tag("tasks")] | Annotated[RecordData, Tag("records")], Discriminator(_kind)]


class LoraConfig(_Table):
    """Low-rank updates of the decoder's FFNs in stage 3."""

    rank: Positive = 8
    target: Pattern = r".*layers\.\d+\.mlp\.(gate|up|down)_proj"
    """Regular expression over the names of the language model's modules; the vision tower is never touched."""


class EvaluationConfig(_Table):
    """Exact match on held-out samples after initialisation and each stage, and speed at the end."""

    samples: Count | dict[str, Count] = 200
    """Samples of each task group, or of those that are named; 0 turns evaluation off."""
    final_samples: Count | dict[str, Count] | None = None
    """Samples for the teacher and the final student, when other than `samples`."""
    options: dict[str, dict[str, Any]] = {}
    speed_lengths: list[Positive] = [512, 1024, 2048, 4096]
    """Visual tokens at which time to first token, decode speed and cache size are measured; empty: not at all."""
    held_out: RecordData | None = None
    """Data sets that no stage sees: perplexity, agreement with the teacher and distance to it are measured on them."""
    held_out_batches: Positive = 16

    @model_validator(mode="after")
    def _check_groups(self) -> "EvaluationConfig":
        for name in ("samples", "final_samples", "options"):
            if isinstance(given := getattr(self, name), dict):
                _among_groups(name, given)
        for group, options in self.options.items():
            check_options(group, options)
        return self

    @model_validator(mode="after")
    def _check_packing(self) -> "EvaluationConfig":
        if self.held_out is not None and self.held_out.packing:
            raise ValueError("held_out.packing must be false: what is only measured is not packed, got true")
        return self

    def counts(self, *, final: bool) -> dict[str, int]:
        """Samples of each group that is evaluated: of the teacher and the finished student, or in between."""
        chosen = self.final_samples if final and self.final_samples is not None else self.samples
        every = {group: chosen if isinstance(chosen, int) else chosen.get(group, 0) for group in GROUPS}
        return {group: count for group, count in every.items() if count}

    @property
    def groups(self) -> list[str]:
        """The task groups that are evaluated at all."""
        counted = self.counts(final=False) | self.counts(final=True)
        return [group for group in GROUPS if group in counted]


class StageConfig(_Table):
    """Overrides of one row of the stage table."""

    steps: Count | None = None
    """0 skips the stage: the next one goes on from the one before."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    losses: dict[Literal["hidden", "block", "token", "sequence", "supervised"], Weight] | None = None
    """Weight of each loss, in the place of the table's; one that is not named is not used. `block`, which stands alone,
    is L_hid of blocks that are each given what the teacher's attention was given, not what the layers below made."""
    freeze: list[Pattern] = []
    """Regular expressions: trainable parameters with such a name stay frozen in this stage. All but LoRA:
    `'^(?!.*\\.lora_)'`."""

    @model_validator(mode="after")
    def _check_losses(self) -> "StageConfig":
        used = [name for name, weight in (self.losses or {}).items() if weight]
        if "block" in used and len(used) > 1:
            raise ValueError(f"losses must have none beside `block`, got {used}")
        return self

    data: DataConfig | None = None
    """Other data in this stage."""


class Config(_Table):
    """A whole run."""

    name: Name
    output: str = "runs"
    """Results go to `output/name`."""
    seed: Count = 0
    teacher: TeacherConfig
    preset: Literal["exact", "paper", "literal"] = "exact"
    """Where all other options start: what the tables in `bench/reports` chose, the paper's structure, or the paper to
    the letter; see `linmu_distill.stages.PRESETS`."""
    student: dict[str, Any] = Field({}, validate_default=True)
    """Options of the block that differ from the preset's: the fields of `linmu_ops.nn.ExactConfig`, or of
    `MMATEConfig`; and `keep_attention`, a list of decoder layers that stay quadratic, negative ones counted from the
    end. Once read, it holds every option, so that a run is not gone on with when the library's have changed."""
    data: DataConfig = TaskData()
    hidden_average: Literal["tokens", "read"] = "tokens"
    """L_hid as the mean over all tokens, as in the paper. `read`: a third each of the mean over visual tokens, of that
    over text, and of that over what answers read: a token's error at a layer counts by the attention that later layers
    give it from where answers are predicted, and these positions count themselves."""
    warmup: Share = 0.03
    """Share of a stage's steps in which the learning rate rises; then it falls by half a cosine."""
    lora: LoraConfig = LoraConfig()
    checkpoint_every: Positive = 200
    """Steps; the last two are kept."""
    evaluation: EvaluationConfig = EvaluationConfig()
    calibration_batches: Count = 4
    """Batches on which, before stage 1, the sizes of the blocks' outputs are fitted, with `exact` also step sizes of
    the scans (see `linmu_models.calibrate`), and the teacher's mean squares measured, which L_hid is relative to. 0:
    blocks start with whatever size they have, and L_hid is absolute."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the teacher's weights and of matrix products; what is trained is float32 always."""
    gradient_accumulation: Positive = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With more than one process: a whole student in each, or FSDP2, a part in each."""
    gradient_checkpointing: bool = False
    """In stages whose blocks are given the student's inputs: it runs a layer twice, the second time without the
    teacher's."""
    stage1: StageConfig = StageConfig()
    stage2: StageConfig = StageConfig()
    stage3: StageConfig = StageConfig()

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name, start in PRESETS.get(str(values.get("preset", "exact")), {}).items():
            given = values.get(name, start)
            if isinstance(given, BaseModel):
                given = given.model_dump(exclude_unset=True)
            tables = isinstance(start, dict) and isinstance(given, dict)
            values = {**values, name: {**start, **given} if tables else given}
        return values

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
    def _check_skipped(self) -> "Config":
        trained = [number for number in (1, 2, 3) if self.stage(number).steps]
        if trained == [1] and isinstance(self.block, MMATEConfig) and self.block.swin:
            raise ValueError(
                "student.branches must be 'flex' where only stage 1 has steps: it trains without Local-Swin, got "
                f"{self.block.branches!r}"
            )
        return self

    @property
    def mixed_precision(self) -> str:
        """`precision` in the words of accelerate."""
        return {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[self.precision]

    @property
    def block(self) -> MMATEConfig | ExactConfig:
        """Options of the student's block."""
        options = {name: value for name, value in self.student.items() if name != "keep_attention"}
        return parse_options({"preset": self.preset, **options})

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(self.output) / self.name

    @model_validator(mode="after")
    def _every_stage_has_data(self) -> "Config":
        for number in (1, 2, 3):
            data = self.stage_data(number)
            if isinstance(data, RecordData) and not data.sets:
                raise ValueError(f"data.sets: none of them is for stage {number}")
        return self

    @model_validator(mode="after")
    def _check_losses(self) -> "Config":
        for number in (1, 2, 3):
            stage, data = self.stage(number), self.stage_data(number)
            if not stage.losses:
                raise ValueError(f"stage{number}.losses must have a weight over 0, got none")
            formats = {chosen.format for chosen in data.sets.values()} if isinstance(data, RecordData) else set()
            if stage.steps and "sequence" in stage.losses and formats == {"text"}:
                raise ValueError(
                    f"stage{number}.losses must not have `sequence` where all data is plain text: it asks nothing that "
                    "the teacher could answer"
                )
        return self

    def overrides(self, number: int) -> StageConfig:
        """The overrides of stage 1, 2 or 3."""
        return {1: self.stage1, 2: self.stage2, 3: self.stage3}[number]

    def stage(self, number: int) -> Stage:
        """The row of the stage table with this run's overrides."""
        row, changes = STAGES[number - 1], self.overrides(number)
        losses = row.losses if changes.losses is None else {name: w for name, w in changes.losses.items() if w}
        alone = "block" in losses
        return dataclasses.replace(
            row,
            losses={"hidden": losses["block"]} if alone else losses,
            learning_rate=changes.learning_rate or row.learning_rate,
            steps=row.steps if changes.steps is None else changes.steps,
            block_input="teacher" if alone else "student",
            freeze=tuple(changes.freeze),
        )

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
        data = self.stage_data(number or 1).model_dump(mode="json")
        if not number:
            parts = {"seed", "student", "precision", "calibration_batches", "hidden_average"}
            return hash_of({**self.model_dump(include=parts, mode="json"), "data": data})
        stage = self.stage(number)
        parts = {"seed", "student", "hidden_average", "warmup", "precision", "gradient_accumulation"}
        facts = {
            **self.model_dump(include=parts, mode="json"),
            "stage": [number, dict(stage.losses), stage.learning_rate, stage.steps, stage.freeze, stage.block_input],
            "data": data,
            "lora": self.lora.model_dump(mode="json") if self.has_lora(number) else None,
            "calibration_batches": self.calibration_batches if number == 1 else None,
            "max_new_tokens": self.teacher.max_new_tokens if "sequence" in stage.losses else None,
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
    """
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(values: dict[str, Any], source: str = "config") -> Config:
    """Check the values of a configuration; `source` names it in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, source)) from error


# What became of keys that once were.
_GONE = {
    r"(teacher\.)?(dtype|mixed_precision)": "`precision` above all tables sets the teacher's and that of products",
    r"teacher\.inside": "the student shares the teacher's frozen weights",
    r"(.*\.)?turns": "up to four questions are asked about a picture or video",
    r"(.*\.)?(workers|max_samples)": "chosen by the program",
    r"(.*\.)?stages": "`weight` may be a list, the weights in stages 1 to 3",
    r"(.*\.)?instruction": "ActivityNet-QA asks for a word or a short phrase",
    r"losses": "`hidden_average` stands above all tables; L_hid is absolute where `calibration_batches` is 0",
    r"optimizer": "`warmup` stands above all tables; the rest of AdamW is fixed",
    r"lora\.alpha": "twice the rank",
    r"checkpoints": "`checkpoint_every` stands above all tables; the last two are kept",
    r"evaluation\.groups": "name the groups in `samples`",
    r"evaluation\.(seed|speed_new_tokens)": "fixed, so that runs compare",
    r"calibrate(_step_sizes)?": "`calibration_batches = 0` turns calibration off; preset `exact` fits step sizes",
    r"threads": "set OMP_NUM_THREADS",
    r"stage\d\.train": "`freeze` what is not to be trained",
    r"stage\d\.block_input": "`losses = {block = 1.0}` gives each block the teacher's inputs",
}


def describe(error: ValidationError, source: str) -> str:
    """A line for each mistake, with its key."""
    lines = []
    for problem in error.errors():
        # pydantic names the kind of a data table among the keys.
        key = ".".join(str(part) for part in problem["loc"] if part not in ("tasks", "records"))
        unknown = problem["type"] == "extra_forbidden"
        said = problem["msg"].removeprefix("Value error, ")
        if unknown:
            known_once = next((told for pattern, told in _GONE.items() if re.fullmatch(pattern, key)), None)
            said = "unknown key" if known_once is None else f"no key any more: {known_once}"
        lines.append(": ".join(filter(None, (source, key, said))))
    return "\n".join(lines)
