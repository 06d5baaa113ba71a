"""The TOML file of a distillation run. Unknown keys are errors; every error names its key."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.stages import STAGES, Stage

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]


class ConfigError(ValueError):
    """The configuration file is wrong; the text says where, one line for each mistake."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherConfig(_Table):
    """The model to imitate."""

    path: str
    """A folder that transformers can load, or a hub name. Relative folders are looked up from the working directory."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    inside: bool = True
    """The teacher shares its frozen weights with the student: one copy in memory. False: a model beside the student."""
    max_new_tokens: Positive = 64
    """Length limit of the teacher's own answers (L_seq)."""


class DataConfig(_Table):
    """What to train on: the built-in tasks, see `distill/data/README.md`."""

    mixture: dict[str, Annotated[float, Field(gt=0)]] = {"read": 1, "line": 1, "where": 1, "video": 1, "needle": 1}
    """How often each task group is drawn."""
    batch_size: Positive | dict[str, Positive] = 16
    """Samples in a batch, for all groups or for each."""
    turns: Positive = 4
    """Questions about one picture or video, at most."""
    options: dict[str, dict[str, Any]] = {}
    """More arguments of a group's generator: `options.needle = {frames = [16, 64]}`."""


class LossConfig(_Table):
    """How the losses are taken; their weights are in the stage table."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """tau of L_tok."""
    relative_hidden: bool = True
    """Divide each layer's L_hid by the mean of ||teacher output||^2, measured before stage 1."""
    chunk_size: Positive = 1024
    """Logits of so many positions are held at a time."""


class OptimizerConfig(_Table):
    """AdamW with a linear warm-up and half a cosine."""

    weight_decay: Weight = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises."""
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The last learning rate, as a share of the highest."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""


class LoraConfig(_Table):
    """Low-rank updates of the decoder's FFNs in stage 3."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    target: str = r".*layers\.\d+\.mlp\.(gate|up|down)_proj"
    """Regular expression over the names of the language model's modules; the vision tower is never touched."""


class CheckpointConfig(_Table):
    """How often to save and how much to keep."""

    every: Positive = 200
    """Steps."""
    keep: Positive = 2


class EvaluationConfig(_Table):
    """Exact match on held-out samples after initialisation and each stage, and speed at the end."""

    groups: list[str] = ["read", "line", "where", "video", "needle"]
    samples: Count | dict[str, Count] = 200
    """Samples of each group, for all groups or for each; 0 turns evaluation off."""
    final_samples: Count | dict[str, Count] | None = None
    """Samples for the teacher and the final student, when other than `samples`."""
    seed: int = 2024
    options: dict[str, dict[str, Any]] = {}
    speed_lengths: list[Positive] = [512, 1024, 2048, 4096]
    """Visual tokens at which time to first token, decode speed and cache size are measured; empty: not at all."""
    speed_new_tokens: Positive = 16

    def counts(self, *, final: bool) -> dict[str, int]:
        """Samples of each group that is evaluated: of the teacher and the finished student, or in between."""
        chosen = self.final_samples if final and self.final_samples is not None else self.samples
        every = {group: chosen if isinstance(chosen, int) else chosen.get(group, 0) for group in self.groups}
        return {group: count for group, count in every.items() if count}


class StageConfig(_Table):
    """Overrides of one row of the stage table."""

    steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    losses: dict[Literal["hidden", "token", "sequence", "supervised"], Weight] | None = None
    freeze: list[str] = []
    """Regular expressions: trainable parameters with such a name stay frozen in this stage."""
    data: DataConfig | None = None
    """Other data in this stage."""


class Config(_Table):
    """A whole run."""

    name: str = Field(pattern=r"^[\w.-]+$")
    output: str = "runs"
    """Results go to `output/name`."""
    seed: int = 0
    teacher: TeacherConfig
    student: dict[str, Any] = {}
    """Options of the M-MATE block: the fields of `linmu_ops.nn.MMATEConfig`."""
    data: DataConfig = DataConfig()
    losses: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    calibration_batches: Annotated[int, Field(ge=1)] = 4
    """Batches on which the mixers' norms and the scales of L_hid are set before stage 1."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_accumulation: Positive = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With more than one process: a whole student in each, or FSDP2, a part in each."""
    gradient_checkpointing: bool = False
    threads: Positive | None = None
    """CPU threads; None: torch's choice."""
    stage1: StageConfig = StageConfig()
    stage2: StageConfig = StageConfig()
    stage3: StageConfig = StageConfig()

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(self.output) / self.name

    def overrides(self, number: int) -> StageConfig:
        """The overrides of stage 1, 2 or 3."""
        return {1: self.stage1, 2: self.stage2, 3: self.stage3}[number]

    def stage(self, number: int) -> Stage:
        """The row of the stage table with this run's overrides."""
        row, changes = STAGES[number - 1], self.overrides(number)
        return Stage(
            row.number,
            row.title,
            row.trainable,
            row.local_swin,
            row.losses if changes.losses is None else {k: w for k, w in changes.losses.items() if w},
            changes.learning_rate or row.learning_rate,
            changes.steps or row.steps,
        )

    def stage_data(self, number: int) -> DataConfig:
        """The data of a stage."""
        return self.overrides(number).data or self.data

    def fingerprint(self, number: int) -> str:
        """Hash of everything in this file that the result of stage `number` depends on, stages before it excepted."""
        stage = self.stage(number)
        facts = {
            **self.model_dump(include={"seed", "student", "losses", "optimizer", "mixed_precision"}, mode="json"),
            "stage": [number, dict(stage.losses), stage.learning_rate, stage.steps, self.overrides(number).freeze],
            "data": self.stage_data(number).model_dump(mode="json"),
            "lora": self.lora.model_dump(mode="json") if "lora" in stage.trainable else None,
            "calibration": self.calibration_batches if number == 1 else None,
            "batches": self.gradient_accumulation,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path) -> Config:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing, is no TOML, or has a wrong or unknown key.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], source: str = "config") -> Config:
    """Check the values of a configuration; `source` names it in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            unknown = problem["type"] == "extra_forbidden"
            lines.append(f"{source}: {key}: {'unknown key' if unknown else problem['msg']}")
        raise ConfigError("\n".join(lines)) from error
