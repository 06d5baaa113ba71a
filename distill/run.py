"""A whole run: convert, calibrate, three stages, evaluation after each, report. A run that was cut short resumes."""

import dataclasses
import hashlib
import json
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import AutocastKwargs
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

import linmu_models
from linmu_models.attention import IN_FLOAT32
from linmu_models.config import sees_images
from linmu_models.generate import copy_processor
from linmu_models.modeling import LinmuModel
from linmu_models.report import TransferReport
from linmu_models.saving import locked, whole_folder
from linmu_models.split_rows import check_splits
from linmu_ops.nn import ExactConfig, MMATEConfig

from . import handoff, held_out
from .checkpoint import CheckpointStore, write_atomically
from .config import EVALUATION_SEED, Config, ConfigError, RecordData, TaskData, hash_of
from .files import read_json
from .limited import EQUAL_MEMORY, equal_tokens, limited
from .objective import Objective, Teacher
from .packing import check_packable
from .parallel import check_sharing, from_first, is_sharded, loaded_by_first, receive
from .progress import telling
from .sources import UNFIT, build_source, fits_tasks
from .stages import STAGES, Stage
from .student import (
    ALONE,
    Block,
    add_lora,
    exact_alone,
    hidden_kinds,
    load_own_state,
    mean_squares,
    merge_lora,
    new_student,
    own_state,
    plain,
    set_windows,
    store_parameters,
    trainable_parameters,
    what_is_read,
)
from .teacher import (
    AnswerCache,
    Batch,
    Transcripts,
    fingerprint,
    load_teacher,
    load_tokenizer,
    shared_vision_features,
)
from .train import StageTrainer, work_of

TEACHER = "teacher"
CALIBRATION_BATCHES = 4


class RunError(RuntimeError):
    """The run cannot start as asked; the text says what to do."""


@dataclasses.dataclass
class Student:
    """A student as some stage left it."""

    model: LinmuModel
    blocks: dict[int, Block]
    lora: Any = None
    """peft's handle, once stage 3 has begun."""


class Run:
    """One configuration, its folder and its teacher.

    Attributes:
        objective: the class of what is minimised; a subclass of the run may have its own.
    """

    objective: type[Objective] = Objective

    def __init__(self, config: Config, accelerator: Accelerator | None = None, *, whole: bool = False) -> None:
        """Load the teacher.

        Args:
            whole: on every process, also where training will divide it.

        Raises:
            RunError: it cannot be loaded.
        """
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # One process evaluates, the others wait.
        # The copies in half precision of all that is trained would live until the forward pass has ended.
        uncached = AutocastKwargs(cache_enabled=False)
        self.accelerator = accelerator or Accelerator(
            mixed_precision=config.mixed_precision, kwargs_handlers=[patience, uncached]
        )
        self.config, self.folder = config, config.folder
        self._divided = config.sharded and self.accelerator.num_processes > 1 and not whole
        self._load_teacher()
        self.teacher_hash = from_first(self._hash)
        self._held_out: list[Batch] | None = None

    def _load_teacher(self) -> None:
        """The first process reads it, and sends the others all of it now, or their parts when it is divided."""
        path = self.config.teacher

        def load() -> PreTrainedModel:
            try:
                model, self.tokenizer = load_teacher(path, self.config.precision)
            except (ValueError, SafetensorError) as error:
                raise RunError(f"teacher: {path} cannot be loaded: {error}") from error
            return model.to(self.accelerator.device)

        self.teacher = loaded_by_first(load)
        if self.teacher.device.type == "meta":
            self.tokenizer = load_tokenizer(path)
        if not self._divided:
            receive((self.teacher,), self.accelerator)

    def _hash(self) -> str:
        return fingerprint(self.teacher)

    def result(
        self, number: int, *, same_config: bool = False, weights: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `handoff.load_result`. All processes call this: the first one checks, and the others raise its error.

        Without `weights`, and where the first one will send them their parts of a model, the others get none.
        """
        what = self.folder, number, self.teacher_hash, self.config
        found: list[dict[str, Tensor]] = []

        def read() -> dict[str, Any]:
            state, facts = handoff.load_result(*what, same_config=same_config)
            found.append(state)
            return facts

        facts = from_first(read)
        if not found and weights and self.teacher.device.type != "meta":
            found.append(handoff.load_result(*what, verified=True)[0])
        return (found[0] if found else {}), facts

    def stage(self, number: int) -> Stage:
        """What stage 1, 2 or 3 does."""
        return self.config.stage(number)

    def add_lora(self, student: PreTrainedModel) -> Any:
        """Put LoRA on a student of this run, in place; returns peft's handle."""
        return add_lora(student, self.config.lora_rank, self.config.seed)

    # -- students ------------------------------------------------------------------------------------------------

    def fresh_student(self, *, lora: bool = False) -> Student:
        """A new student with the teacher's weights; random numbers depend on the seed alone."""
        return Student(*new_student(self.teacher, self.config, self.add_lora if lora else None))

    def student_after(self, number: int, *, lora: bool | None = None) -> Student:
        """The student that stage `number` left; 0: calibrated, untrained."""
        state, _ = handoff.load_result(self.folder, number, self.teacher_hash, self.config)
        return self._student_of(state, number, lora=self.config.has_lora(number) if lora is None else lora)

    def _student_of(self, state: dict[str, Tensor], number: int, *, lora: bool) -> Student:
        student = self.fresh_student(lora=lora)
        load_own_state(student.model, state)
        set_windows(student.blocks.values(), number == 0 or STAGES[number - 1].windows)
        return student

    # -- steps of a run ------------------------------------------------------------------------------------------

    def is_finished(self, number: int) -> bool:
        """Whether a stage has its result. All processes use what the main process finds.

        A process that lags behind could find a newer result. Processes that go different ways would wait for each other
        for ever.
        """
        return from_first(lambda: handoff.is_finished(self.folder, number))

    def check_stages(self) -> None:
        """Check the options against this teacher, before hours have gone by.

        Raises:
            RunError: no layer would be replaced; a part of the block would never be used; or the teacher cannot be
                shown the built-in tasks that are asked of it.
            ConfigError: a stage has nothing to train.
        """
        counts = self.config.evaluation.counts(final=True)
        tasks = [i for i in (1, 2, 3) if isinstance(self.config.stage_data(i), TaskData) and self.config.stage(i).steps]
        if (counts or tasks) and not fits_tasks(self.teacher, self.tokenizer):
            wanted = "data.sets must be given" if tasks else "evaluation.samples must be 0"
            raise RunError(f"{wanted}: {self.config.teacher} cannot be shown the built-in tasks; {UNFIT}")
        stages = [i for i in (1, 2, 3) if self.config.stage(i).steps]
        if any(getattr(self.config.stage_data(i), "packing", False) for i in stages):
            try:
                check_packable(self.teacher.config)
            except ValueError as error:
                raise RunError(str(error)) from error
        if not sees_images(self.teacher.config):
            options, why = self.config.block, f"{self.config.teacher} is text only"
            paper = options if isinstance(options, MMATEConfig) and options.swin and not options.text_window else None
            if isinstance(options, MMATEConfig) and options.reverse and (paper is None or paper.flex):
                raise RunError(f"student.reverse must be false: {why}, got true")
            if paper is not None:
                raise RunError(f"student.branches must be 'flex' without text_window: {why}, got {paper.branches!r}")
        try:
            student = self.fresh_student(lora=self.config.has_lora(len(STAGES)))
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise RunError(str(error)) from error
        if self.config.context > 1:
            self._check_splits(student.model)
        if not student.blocks:
            raise RunError("the student has no M-MATE block: every layer keeps its attention")
        for row in STAGES:
            if (stage := self.stage(row.number)).steps:
                trainable_parameters(student.model, student.blocks, stage)

    def _check_splits(self, student: LinmuModel) -> None:
        try:
            check_sharing(self.accelerator.num_processes, self.config.context)
        except ValueError as error:
            raise RunError(str(error)) from error
        try:
            check_splits(student)
        except ValueError as error:
            raise RunError(f"parallel must not share rows for this student: {error}") from error

    def _has_start(self) -> bool:
        try:
            if not handoff.is_finished(self.folder, 0):
                return False
            handoff.load_result(self.folder, 0, self.teacher_hash, self.config, same_config=True)
        except handoff.HandoffError:
            if handoff.has_begun(self.folder, 1):
                raise
            return False
        return True

    def prepare(self) -> None:
        """Convert and calibrate: this is "stage 0".

        A stage 0 that is there stays. It is made anew if it is damaged or of other settings, as long as no stage has
        begun.
        """
        if from_first(self._has_start):
            return
        if self.accelerator.is_main_process:
            began = time.perf_counter()
            student = self.fresh_student()
            self.folder.mkdir(parents=True, exist_ok=True)
            _report(student).save(self.folder / "transfer.json")
            data, path = self.config.stage_data(1), self.config.teacher
            if isinstance(data, RecordData):  # What is measured is the same in rows of one sequence.
                data = data.model_copy(update={"packing": False})
            source = build_source(data, path, self.teacher, self.tokenizer, self.config.seed * 4)
            batches = []
            for i in range(CALIBRATION_BATCHES if self.config.is_calibrated else 0):
                batch = source.processor(source.samples(i))
                batches.append({name: value.to(self.accelerator.device) for name, value in batch.items()})
            with self.accelerator.autocast():
                squares = self._calibrate(student, batches) if batches else None
            handoff.save_result(
                self.folder, 0, own_state(student.model, student.blocks), self.teacher_hash, self.config,
                layers=list(student.blocks), mean_squares=squares,
                seconds=time.perf_counter() - began,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _calibrate(self, student: Student, batches: list[Batch]) -> dict[str, list[float]]:
        """Set the sizes of the blocks. Returns the teacher's mean squares, which L_hid is relative to."""
        layers, exact = list(student.blocks), isinstance(self.config.block, ExactConfig)
        linmu_models.calibrate(student.model, self.teacher, batches, step_sizes=exact)
        squares: dict[str, list[float]] = {}
        for average in self.config.averages:
            reads = average == "read"
            reading = [what_is_read(self.teacher, layers, batch) if reads else None for batch in batches]
            kinds = [hidden_kinds(student.model, batch, read) for batch, read in zip(batches, reading, strict=True)]
            squares |= mean_squares(self.teacher, layers, batches, kinds)
        return squares

    def train(self, number: int) -> None:
        """Train stage `number` from the result of the stage before. Without steps, hand that result on."""
        config, stage = self.config, self.stage(number)
        if not stage.steps:
            state, facts = self.result(number - 1)
            kept = {name: facts[name] for name in ("processes", "gradient_accumulation") if name in facts}
            if self.accelerator.is_main_process:
                handoff.save_result(
                    self.folder, number, state, self.teacher_hash, config,
                    title=stage.title, steps=0, trained=0, means={}, seconds=0.0, **kept,
                )  # fmt: skip
            self.accelerator.wait_for_everyone()
            return
        before, facts = self.result(number - 1)
        student = self._student_of(before, number - 1, lora=config.has_lora(number))
        _, start = self.result(0, weights=False)
        set_windows(student.blocks.values(), stage.windows)
        if config.gradient_checkpointing and stage.block_input == "student":
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        source = build_source(
            config.stage_data(number), config.teacher, self.teacher, self.tokenizer, config.seed * 4 + number,
            self.accelerator.process_index // config.context,
            self.accelerator.num_processes // config.context,
        )  # fmt: skip
        transcripts = None
        if "sequence" in stage.losses:
            cache = AnswerCache(self.folder / "answers.sqlite", self.teacher_hash)
            transcripts = Transcripts(self.teacher, self.tokenizer, source, cache, config.max_new_tokens)
        trainable = trainable_parameters(student.model, student.blocks, stage)
        store_parameters(student.blocks.values(), trainable, self.teacher.dtype)
        trainer = StageTrainer(
            config,
            stage,
            student.model,
            Teacher(self.teacher, start["layers"], start["mean_squares"]),
            source,
            trainable,
            handoff.stage_folder(self.folder, number),
            self.accelerator,
            transcripts,
            objective=self.objective,
            before=from_first(lambda: handoff.weights_hash(self.folder, number - 1)),
            processes=work_of(
                facts, config, self.accelerator.num_processes // config.context, self.accelerator.is_main_process
            ),
        )
        trained = {plain(name) for name in trainable}
        del trainable  # The trainer drops what it divides.
        with shared_vision_features(self.teacher, student.model):
            means = trainer.run()
        counts, unfinished, speed = trainer.counts(), trainer.unfinished(), trainer.throughput()
        if speed:
            self.accelerator.print(
                f"stage {number}  {speed['tokens']:,} tokens, {speed['tokens_per_second']:,.0f} a second; "
                f"{speed['padding']:.1%} of what the models were given was padding"
            )
        if told := ", ".join(f"{share:.1%} {part}" for part, share in speed.get("shares", {}).items()):
            self.accelerator.print(f"stage {number}  time: {told}")
        for name, found in (counts or {}).items():
            told = ", ".join(f"{count} {what}" for what, count in found.items())
            self.accelerator.print(f"stage {number}  data set {name}: {told}")
        if unfinished:
            self.accelerator.print(
                f"stage {number}  L_seq left out {unfinished} samples: the teacher's answer had no end within "
                f"max_new_tokens = {config.max_new_tokens}"
            )
        # What is frozen goes on as it came, not as it was rounded to the teacher's dtype.
        state = {
            name: tensor if name in trained or name not in before else before[name]
            for name, tensor in own_state(student.model, student.blocks).items()
        }
        if self.accelerator.is_main_process:
            handoff.save_result(
                self.folder, number, state, self.teacher_hash, config,
                title=stage.title, steps=stage.steps, learning_rate=stage.learning_rate, losses=dict(stage.losses),
                trained=sum(p.numel() for p in trainer.trainable.values()), means=means, seconds=trainer.seconds,
                unfinished_answers=unfinished, data=counts, processes=trainer.processes,
                gradient_accumulation=config.gradient_accumulation, **speed,
            )  # fmt: skip
            trainer.store.clear()
        self.accelerator.free_memory()
        if is_sharded(self.teacher):  # What comes next, one process does alone.
            del student, trainer
            self._load_teacher()
        self.accelerator.wait_for_everyone()

    def _measured(self, after: int | None, alone: str | None = None, **options: Any) -> str:
        """Hash of all that a measurement depends on: one of the teacher (None), or of what stage `after` left."""
        weights = self.teacher_hash if after is None else handoff.weights_hash(self.folder, after)
        return hash_of([self.teacher_hash, weights, options, *([alone] if alone else [])])[:16]

    def evaluate(
        self,
        after: int | None,
        model: PreTrainedModel,
        counts: dict[str, int],
        alone: str | None = None,
        tokens: int | None = None,
    ) -> None:
        """Measure exact match on samples of `val`: of the teacher (None), or of what stage `after` left, or of a part
        of it, as `ALONE` calls it, or with keys and values of so many `tokens` alone.

        The results are kept in `evaluation.json`.
        """
        from .evaluation import evaluate

        label, path = alone or _label(after), self.folder / "evaluation.json"
        table = _measurements(path)
        known = table.setdefault(label, {})
        for group, samples in counts.items():
            of = self._measured(after, alone, n=samples, seed=EVALUATION_SEED, **({"tokens": tokens} if tokens else {}))
            row = known.get(group)
            if isinstance(row, dict) and row.get("of") == of:
                continue
            with self.accelerator.autocast(), limited(model, tokens) if tokens else nullcontext(), telling() as tell:
                told = tell(f"{label}: {group}")
                result = evaluate(model, self.tokenizer, group, samples, EVALUATION_SEED, told=told)
            known[group] = {
                "of": of, "n": result.n, "correct": result.correct, "accuracy": result.accuracy,
                "interval": result.interval, "right": "".join(str(int(hit)) for hit in result.hits),
                "seconds": result.seconds, "by_question": result.by_question, **({"tokens": tokens} if tokens else {}),
            }  # fmt: skip
            write_atomically(path, json.dumps(_in_order(table), indent=1))
            self.accelerator.print(f"{label:<21} {result}")

    def measure_held_out(
        self, after: int | None, model: PreTrainedModel, alone: str | None = None, tokens: int | None = None
    ) -> dict[str, Any] | None:
        """Measure perplexity and agreement on held-out data: of the teacher (None), or of what stage `after` left, or
        of a part of it, or with keys and values of so many `tokens` alone.

        The results are kept in `held_out.json`. None where the run has no held-out data.
        """
        options, label, path = self.config.evaluation, alone or _label(after), self.folder / "held_out.json"
        if options.held_out is None:
            return None
        table = _measurements(path)
        if self._held_out is None:
            source = build_source(options.held_out, self.config.teacher, self.teacher, self.tokenizer, EVALUATION_SEED)
            self._held_out = held_out.some(source)
        digest = hashlib.sha256()
        for batch in self._held_out:
            for value in batch.values():
                digest.update(value.contiguous().numpy().tobytes())
        of = self._measured(after, alone, data=digest.hexdigest(), **({"tokens": tokens} if tokens else {}))
        known = dict(table.get(label, {}))
        if known.pop("of", None) == of:
            return known
        with self.accelerator.autocast():
            found = held_out.measure(model, self.teacher, self._held_out, tokens=tokens)
        table[label] = {"of": of, **found}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(_in_order(table), indent=1))
        self.accelerator.print(
            f"{label:<21} perplexity {found['perplexity']:.2f}  KL to the teacher {found['kl']:.4f}  "
            f"same next token {found['agreement']:.1%}  n={found['tokens']}"
        )
        return found

    def evaluate_stage(self, number: int) -> None:
        """Evaluate what stage `number` left; 0 is the untrained student. The teacher is evaluated once, before it."""
        options = self.config.evaluation
        if 0 < number < len(STAGES) and not self.config.stage(number).steps:
            return
        counts = options.counts(final=number in (0, len(STAGES)))
        if self.accelerator.is_main_process:
            if not number and (of_teacher := options.counts(final=True)):
                self.evaluate(None, self.teacher, of_teacher)
            if not number:
                self.measure_held_out(None, self.teacher)
                self._evaluate_untrained()
            if counts or options.held_out is not None:
                student = self.student_after(number).model
                self.evaluate(number, student, counts)
                self.measure_held_out(number, student)
        self.accelerator.wait_for_everyone()

    def _evaluate_untrained(self) -> None:
        """Measure what takes no training: a teacher that forgets until its memory is the student's, and a student
        without its scan."""
        options, block = self.config.evaluation, self.config.block
        counts = options.counts(final=True)
        if not (counts or options.held_out is not None):
            return
        student = self.student_after(0)
        tokens = equal_tokens(self.teacher, student.model, self.tokenizer)
        self.evaluate(None, self.teacher, counts, EQUAL_MEMORY, tokens)
        self.measure_held_out(None, self.teacher, EQUAL_MEMORY, tokens)
        if not isinstance(block, ExactConfig):
            return
        for label, kept in ALONE.items():
            if not kept or block.kept_tokens:
                with exact_alone(student.blocks.values(), kept):
                    self.evaluate(0, student.model, counts, label)
                    self.measure_held_out(0, student.model, label)

    def export(self) -> Path:
        """Write the finished student as a transformers model, with LoRA merged. It loads where `linmu` is installed."""
        target = self.folder / "student"
        if self.accelerator.is_main_process:
            student = self.student_after(len(STAGES))
            model = student.model if student.lora is None else merge_lora(student.lora)
            for block in student.blocks.values():
                for name, parameter in block.named_parameters():
                    if not IN_FLOAT32.search(f"self_attn.{name}"):
                        parameter.data = parameter.data.to(self.teacher.dtype)
            try:
                with whole_folder(target) as made:
                    model.save_pretrained(made)
                    copy_processor(self.config.teacher, made)
            except SafetensorError as error:
                raise OSError(f"{target} could not be written: {error}") from error
        self.accelerator.wait_for_everyone()
        return target

    def finish(self) -> Path | None:
        """Export the student, measure speed, write the report. Returns the report's path on the first process."""
        folder = self.export()
        if not self.accelerator.is_main_process:
            return None
        from .report import write_report
        from .speed import NEW_TOKENS, measure_speed

        student, _ = load_teacher(str(folder), self.config.precision)
        student.to(self.accelerator.device)
        path, options = self.folder / "transfer.json", self.config.evaluation
        if "rows" not in read_json(path):
            _report(self.fresh_student()).save(path)
        path = self.folder / "speed.json"
        if options.speed_lengths:
            of = self._measured(len(STAGES), lengths=options.speed_lengths, new_tokens=NEW_TOKENS)
            if {row.get("of") if isinstance(row, dict) else None for row in read_json(path, list)} != {of}:
                rows = measure_speed({"teacher": self.teacher, "student": student}, self.tokenizer, options)
                write_atomically(path, json.dumps([{"of": of, **row} for row in rows], indent=1))
        return write_report(self.folder, self.config, self.teacher, student, self.tokenizer)


def _report(student: Student) -> TransferReport:
    """What conversion copied from the teacher."""
    report = student.model.linmu_report
    if report is None:
        raise ValueError("the student must be fresh from conversion, got one without a report")
    return report


def _label(after: int | None) -> str:
    """The name of a row of measurements."""
    return TEACHER if after is None else f"stage {after}" if after else "initial"


def _measurements(path: Path) -> dict[str, Any]:
    """What has been measured, by label. What is no row is left out."""
    return {label: row for label, row in read_json(path).items() if isinstance(row, dict)}


def _in_order(table: dict[str, Any]) -> dict[str, Any]:
    """Measurements in the order of a run's stages."""
    labels = [TEACHER, EQUAL_MEMORY, *ALONE, *(_label(after) for after in range(len(STAGES) + 1))]
    return {label: table[label] for label in labels if label in table}


def distill(config: Config, stage: int | None = None, resume: bool = False) -> Path | None:
    """Run all stages, or one. Returns the path of the report when the last stage is done.

    Raises:
        RunError: the folder holds a run and `resume` is False, or another process is at work in it.
        HandoffError, TrainingError, Interrupted: see there.
    """
    if not isinstance(config, Config):
        raise TypeError(f"distill: config must be a Config, as load_config gives it, got {type(config).__name__}")
    if stage is not None and stage not in [row.number for row in STAGES]:
        raise RunError(f"--stage must be 1 to {len(STAGES)}, got {stage}")
    there = next((place for place in (config.folder, *config.folder.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        raise RunError(f"output must be a folder, or the name of a new one, got the file {there}")
    wanted = [row.number for row in STAGES] if stage is None else [stage]
    for number in wanted:
        if handoff.has_begun(config.folder, number) and not resume:
            raise RunError(f"{config.folder} already has stage {number}: go on with --resume, or choose another output")
    run = Run(config)
    with locked(config.folder, wait=False) if run.accelerator.is_main_process else nullcontext(True) as mine:
        if not from_first(lambda: mine):
            raise RunError(f"another process is at work in {config.folder}")
        return _run(run, wanted)


def _run(run: Run, wanted: list[int]) -> Path | None:
    config = run.config
    if wanted[0] > 1:
        for number in reversed(range(wanted[0])):
            run.result(number, same_config=True, weights=False)
    if not all(run.is_finished(number) for number in wanted):
        run.check_stages()
    if wanted[0] == 1:
        run.prepare()
        run.evaluate_stage(0)
    for number in wanted:
        if run.is_finished(number):
            run.result(number, same_config=True, weights=False)
            if run.accelerator.is_main_process:  # what a kill at its very end has left
                CheckpointStore(handoff.stage_folder(config.folder, number) / "checkpoints").clear()
        else:
            run.train(number)
        run.evaluate_stage(number)
    return run.finish() if wanted[-1] == len(STAGES) else None
