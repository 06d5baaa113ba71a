"""The training loop of one stage."""

import json
import math
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from linmu_models.generate import peak_memory
from linmu_models.hooks import attention_modules
from linmu_models.modeling import LinmuModel
from linmu_models.split_attention import why_whole
from linmu_ops import LinmuWarning

from .checkpoint import CheckpointError, CheckpointStore, random_states, set_random_states, write_atomically
from .clock import PARTS, Clock, as_record, of_record, shares, spent
from .config import Config
from .files import read_lines
from .objective import MicroBatch, Objective, Teacher, TrainingError, assemble, learns_by_block, read_batch
from .parallel import (
    checkpoint_tensors,
    from_first,
    gradients_stay_local,
    is_sharded,
    local_part,
    shard,
    sharing,
    total_norm,
    whole,
)
from .progress import Progress
from .stages import Stage
from .student import beyond_windows, decaying, reach_all
from .teacher import Source, Stream, Transcripts

T = TypeVar("T")

# A parameter may get a zero gradient for a while (LoRA's A matrix does until B has moved), but not for as long as this.
# Steps in which no parameter gets any do not count: a student may be equal to its teacher on a whole batch.
ZERO_GRADIENT_STEPS = 10
WEIGHT_DECAY = 0.01  # of AdamW, on weights of linear maps
_BETAS = (0.9, 0.95)
_LAST_RATE = 0.05  # the last learning rate, as a share of the highest
_LARGEST_NORM = 1.0  # of a step's gradient
_WARMUP = 0.05  # the share of a stage's steps in which the learning rate rises
_RECENT = 50  # steps whose mean stands for the end of a stage


class Interrupted(RuntimeError):
    """Ctrl-C or a termination signal arrived. Everything is saved."""


def learning_rate(stage: Stage, step: int) -> float:
    """The learning rate of a step; the first is 0. It rises linearly, then falls by half a cosine."""
    warmup = math.ceil(_WARMUP * stage.steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, stage.steps - warmup)
    return stage.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def checksums(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """A number for each tensor. It changes when a byte of the tensor does, but for a freak coincidence."""
    sums = {}
    for name, tensor in parameters.items():
        flat = local_part(tensor).detach().contiguous().flatten()
        words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        sums[name] = int(words.sum(dtype=torch.int64)) if words.numel() else 0
    return sums


def work_of(facts: Mapping[str, Any], config: Config, groups: int, tell: bool = True) -> int:
    """In the place of how many processes a stage begins, of which those that share rows are one: of as many as the
    stage before, so that a step keeps its batches where a run goes on in others.

    Args:
        facts: the manifest of the stage before.
        groups: processes that there are. Where they cannot take the others' place, or somebody has changed
            `gradient_accumulation` since, it is as many.
        tell: warn where they cannot.
    """
    before, accumulation = facts.get("processes", groups), config.gradient_accumulation
    if before == groups or facts.get("gradient_accumulation") != accumulation:
        return groups
    if before % groups and (groups % before or before * accumulation % groups):
        if tell:
            warnings.warn(
                f"the step's batches were {before * accumulation}, which {groups} processes cannot share; they are now "
                f"{groups * accumulation}", LinmuWarning, stacklevel=2,
            )  # fmt: skip
        return groups
    return int(before)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and termination signals, so that a step can end first. A second Ctrl-C stops at once."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Only the main thread may do this.
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class StageTrainer:
    """Trains one stage, from its last checkpoint if there is one."""

    config: Config
    stage: Stage
    student: LinmuModel
    teacher: Teacher
    source: Source
    trainable: dict[str, nn.Parameter]
    folder: Path
    accelerator: Accelerator
    transcripts: Transcripts | None = None
    on_step: Callable[[int], None] | None = None
    """Called with the number of finished steps after each; for tests."""
    objective: type[Objective] = Objective
    before: str | None = None
    """Hash of what the stage begins from. A checkpoint that began from something else is refused."""
    processes: int | None = None
    """Of so many processes it does the work of a step, and reads their data; None: as many as there are. Those that
    share rows count as one."""
    store: CheckpointStore = field(init=False)

    def __post_init__(self) -> None:
        trainable = {id(p) for p in self.trainable.values()}
        for parameter in self.student.parameters():
            parameter.requires_grad_(id(parameter) in trainable)
        reach_all(attention_modules(self.student)[i] for i in self.teacher.layers)
        self.store = CheckpointStore(self.folder / "checkpoints", keep=2)
        self._moved: set[str] = set()
        self._may_rest = beyond_windows(self.student)
        self._live_steps = 0
        self._seconds = 0.0
        self._last_lap = dict.fromkeys(PARTS, 0.0)
        self._sharing = sharing(self.accelerator, self.config.context)
        if self._sharing.size > 1 and (why := why_whole(self.teacher.model)) and self.accelerator.is_main_process:
            warnings.warn(
                f"stage {self.stage.number}: each process that shares rows runs the teacher on all of them: {why}",
                LinmuWarning, stacklevel=2,
            )  # fmt: skip
        # Micro-batches of a step, of all processes: a training that goes on in another number of them keeps it.
        self.processes = self.processes or self._sharing.groups
        self._batches = self.config.gradient_accumulation * self.processes

    @property
    def seconds(self) -> float:
        """Time spent in steps, over all attempts."""
        return self._seconds

    @property
    def metrics_path(self) -> Path:
        """One JSON line a step."""
        return self.folder / "metrics.jsonl"

    def run(self) -> dict[str, float]:
        """Train to the end of the stage. Returns the mean of each loss over the last steps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        objective = self._spread(self.objective(self.student, self.teacher, self.stage))
        self.student.train()
        optimizer = torch.optim.AdamW(self._groups(), lr=self.stage.learning_rate, betas=_BETAS, foreach=False)
        optimizer = self.accelerator.prepare(optimizer)
        frozen = {n: p for n, p in self.student.named_parameters() if not p.requires_grad}
        before = checksums(frozen)
        step = self._restore(optimizer)
        progress = Progress(self.stage, step, self.folder, self.accelerator.is_main_process)
        settled, clock = self.store.settled(), Clock(self.accelerator.device)
        with caught_signals() as signals, progress, self._log(step) as log, settled, clock:
            recent = self._last_records()
            while step < self.stage.steps:
                record = self._step(objective, optimizer, step)
                step += 1
                record |= as_record(clock.lap())
                recent = [*recent, record][-_RECENT:]
                log(record)
                progress.update(record)
                if self.on_step is not None:
                    self.on_step(step)
                stop = self._agree(bool(signals))
                if stop or step % self.config.checkpoint_every == 0 or step == self.stage.steps:
                    with spent("saving"):
                        self._check_frozen(frozen, before, step)
                        self._save(step, optimizer)
                if stop:
                    break
            with spent("saving"):
                self.store.wait()
            self._last_lap = clock.lap(wait=True)
        # A signal may also have come while the last checkpoint was on its way.
        if self._agree(bool(signals)):
            raise Interrupted(f"stopped at step {step} of stage {self.stage.number}; all is saved, go on with --resume")
        never = set(self.trainable) - self._moved
        broken, resting = sorted(never - self._may_rest), sorted(never & self._may_rest)
        if broken and self.stage.steps > 1:  # LoRA's A gets none in the first step.
            raise TrainingError(f"stage {self.stage.number}: no step gave a gradient to {_list(broken)}")
        if resting:
            warnings.warn(
                f"stage {self.stage.number}: nothing that was looked at lay beyond the windows, so that these learnt "
                f"nothing: {_list(resting)}", LinmuWarning, stacklevel=2,
            )  # fmt: skip
        self.student.eval()
        means = {}
        for name in (*self.stage.losses, "supervised", "loss"):
            if values := [record[name] for record in recent if name in record]:
                means[name] = sum(values) / len(values)
        return means

    def _spread(self, objective: Objective) -> nn.Module:
        if self.accelerator.num_processes == 1:
            return objective
        if not self.config.sharded:
            # It is placed already: to move it to where it is copies what it shares with the teacher, on a CPU.
            return objective if objective.by_block else self.accelerator.prepare(objective, device_placement=[False])
        shard(objective, self.student, self.teacher.model, self.accelerator)
        now = dict(self.student.named_parameters())
        self.trainable = {name: now[name] for name in self.trainable}
        return objective

    def _groups(self) -> list[dict[str, Any]]:
        decayed = decaying(self.student)
        weights = [p for name, p in self.trainable.items() if name in decayed]
        others = [p for name, p in self.trainable.items() if name not in decayed]
        groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def _step(self, objective: nn.Module, optimizer: Any, step: int) -> dict[str, float]:
        began = time.perf_counter()
        accelerator = self.accelerator
        rate = learning_rate(self.stage, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        micros: list[MicroBatch | None] = [*self._read(step)]
        names = list(micros[0].counts) if micros[0] else []
        summed = torch.tensor([sum(m.counts[n] for m in micros if m) for n in names], device=accelerator.device)
        if self._sharing.rank:  # The first of those that share rows counts for them.
            summed.zero_()
        counts = dict(zip(names, accelerator.reduce(summed, "sum").tolist(), strict=True))
        optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        for i, micro in enumerate(micros):
            micros[i] = None  # One at a time.
            assert micro is not None
            with gradients_stay_local(objective, accelerator, local=i < len(micros) - 1):
                for name, value in self._derive(objective, micro, counts).items():
                    totals[name] = totals.get(name, 0) + value
        self._join_gradients()
        values = accelerator.reduce(torch.stack(list(totals.values())), "sum").tolist()
        # A mean over no token is not told as 0.
        told = {name: value for name, value in zip(totals, values, strict=True) if counts.get(name, 1)}
        record: dict[str, Any] = {"step": step + 1, **told, "learning_rate": rate}
        self._check_finite(record, told)
        self._check_gradients(step)
        with spent("optimiser"):
            norm = self._clip(optimizer, step)
            self._live_steps += norm != 0
            optimizer.step()
        seconds = time.perf_counter() - began
        self._seconds += seconds
        return {
            **record,
            "gradient_norm": norm,
            "tokens": counts["input"],
            "tokens_per_second": counts["input"] / seconds,
            "padding": counts["padding"] / (counts["input"] + counts["padding"]),
            "peak_memory_mb": peak_memory() / 2**20,
            "seconds": self._seconds,
        }

    def _read(self, step: int) -> list[MicroBatch]:
        accelerator, first = self.accelerator, step * self._batches
        numbers = range(first + self._sharing.number, first + self._batches, self._sharing.groups)
        with spent("loader"):
            samples = [self.source.samples(number) for number in numbers]
            self._check_same(samples, step)
        sharded, missing = is_sharded(self.teacher.model), False
        if sharded and self.transcripts is not None and "sequence" in self.stage.losses:
            with spent("loader"):
                lacks = any(self.transcripts.lack(each) for each in samples)
            # One process may have more to decode than others, which would wait for it in vain.
            missing = self._agree(lacks)
        gathered = whole(self.teacher.model.get_decoder().layers if missing else ())
        with accelerator.autocast(), gathered, spent("loader"):
            micros = [
                read_batch(self.source, each, self.teacher, self.student, self.stage, self.transcripts,
                           accelerator.device, self._agreed)
                for each in samples
            ]  # fmt: skip
        # All must run the teacher as often, also where one of them had to ask it here.
        if sharded or self._sharing.size > 1:
            micros = [replace(micro, states=None) for micro in micros]
        return micros

    def _check_same(self, samples: list[list[Any]], step: int) -> None:
        """Those who share rows each read them. Of other rows they would send each other other numbers of tokens, and
        wait for ever."""
        if self._sharing.size > 1:
            mine = [[_outline(sample) for sample in each] for each in samples]
            if self._agreed(lambda: mine) != mine:
                raise TrainingError(
                    self._where(step, "processes that share a row have read other records for it: the same files must "
                                      "be there for all, and readable")
                )  # fmt: skip

    def _agreed(self, work: Callable[[], T]) -> T:
        """What the first of those that share rows finds."""
        return from_first(work, self._sharing.group.get_group()) if self._sharing.size > 1 else work()

    def _derive(self, objective: nn.Module, micro: MicroBatch, counts: dict[str, int]) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch. Returns its share of each loss."""
        accelerator, weights, group = self.accelerator, self.stage.losses, self._sharing.group
        if micro.asked["input_ids"].shape[1] < self._sharing.size:
            # Layers take no slab without a token. So each works on all of a row of so few, for its share of the mean.
            group, counts = None, {name: count * self._sharing.size for name, count in counts.items()}
        with accelerator.autocast():
            part = assemble(micro, self.teacher, self.student, self.stage, accelerator.device, group)
        # Processes are averaged, but each holds a share of one mean.
        processes = accelerator.num_processes
        with spent("student"):
            if not (isinstance(objective, Objective) and objective.by_block):
                with accelerator.autocast():
                    losses = objective(part, counts)
                loss = sum(weights[name] * losses[name] for name in weights)
                accelerator.backward(loss * processes)
                return {name: value.detach() for name, value in {**losses, "loss": loss}.items()}
            # The graph of one block at a time.
            total = torch.zeros((), device=accelerator.device)
            for share in objective.each_block(part, counts):
                with accelerator.autocast():
                    loss = share()
                accelerator.backward(loss * (weights["hidden"] * processes))
                total += loss.detach()
            return {"hidden": total, "loss": weights["hidden"] * total}

    @spent("student")
    def _join_gradients(self) -> None:
        """Average what the processes have derived on their own: DDP knows of one forward pass and one backward pass."""
        if self.accelerator.num_processes > 1 and not self.config.sharded and learns_by_block(self.stage):
            for parameter in self.trainable.values():
                if parameter.grad is not None:
                    parameter.grad.copy_(self.accelerator.reduce(parameter.grad, "mean"))

    def _where(self, step: int, what: str) -> str:
        with suppress(CheckpointError):
            self.store.wait()
        steps = self.store.steps()
        good = f"the last good checkpoint is at step {steps[-1]}" if steps else "there is no checkpoint yet"
        return f"stage {self.stage.number}, step {step + 1}: {what}; {good}"

    def _check_finite(self, record: dict[str, float], losses: Iterable[str]) -> None:
        bad = [f"{name} = {record[name]}" for name in losses if not math.isfinite(record[name])]
        if bad:
            raise TrainingError(self._where(int(record["step"]) - 1, "the loss is not finite: " + ", ".join(bad)))

    def _clip(self, optimizer: Any, step: int) -> float:
        self.accelerator.unscale_gradients(optimizer)
        parameters = list(self.trainable.values())
        norm = total_norm(parameters)
        value = float(norm)
        if math.isfinite(value):
            nn.utils.clip_grads_with_norm_(parameters, _LARGEST_NORM, norm, foreach=False)
        elif self.accelerator.scaler is None:  # With one, an overflow is expected now and then, and skipped.
            grads = {n: local_part(p.grad) for n, p in self.trainable.items() if p.grad is not None}
            bad = [n for n, grad in grads.items() if not bool(torch.isfinite(grad).all())]
            raise TrainingError(self._where(step, f"the gradient's norm is {value}; it is not finite in {_list(bad)}"))
        return value

    def _check_gradients(self, step: int) -> None:
        if len(self._moved) == len(self.trainable):
            return
        missing, names, counts = [], [], []
        for name, parameter in self.trainable.items():
            if parameter.grad is None:
                missing.append(name)
            elif name not in self._moved:
                counts.append(torch.count_nonzero(local_part(parameter.grad)))
                names.append(name)
        if missing:
            raise TrainingError(self._where(step, f"trainable, but no gradient reaches {_list(missing)}"))
        seen = self.accelerator.reduce(torch.stack(counts), "sum").tolist()
        self._moved.update(name for name, count in zip(names, seen, strict=True) if count)
        still = sorted(set(self.trainable) - self._moved - self._may_rest)
        if not self._moved and not self._may_rest and step + 1 >= 10 * ZERO_GRADIENT_STEPS:
            raise TrainingError(self._where(step, "no step has given a gradient to anything"))
        if still and self._live_steps + 1 >= ZERO_GRADIENT_STEPS:
            raise TrainingError(self._where(step, f"the gradient has been 0 in every step for {_list(still)}"))

    def _check_frozen(self, frozen: Mapping[str, Tensor], before: dict[str, int], step: int) -> None:
        after = checksums(frozen)
        changed = [name for name in before if before[name] != after[name]]
        if changed:
            raise TrainingError(self._where(step - 1, f"frozen, but changed: {_list(changed)}"))

    def _agree(self, stop: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return stop
        return bool(self.accelerator.reduce(torch.tensor(int(stop), device=self.accelerator.device), "sum"))

    def _of_all(self, value: Any) -> list[Any]:
        """A value of each process, in their order."""
        return [value] if self.accelerator.num_processes == 1 else gather_object([value])

    def _of_all_data(self, value: Any) -> list[Any]:
        """The same, of processes that share rows one."""
        return self._of_all(value)[:: self._sharing.size]

    def counts(self) -> dict[str, dict[str, int]] | None:
        """For each data set, what all processes have read, used and left out. None for the built-in tasks."""
        if not isinstance(self.source, Stream):
            return None
        every = self._of_all_data(self.source.counts)
        return {name: dict(sum((counts[name] for counts in every), Counter())) for name in every[0]}

    def throughput(self) -> dict[str, Any]:
        """How fast all steps were, over all attempts. Empty on all processes but the first.

        Returns:
            `tokens` without padding, `tokens_per_second`, `padding`: its share of what the models were given; and
            `shares` of all time, the first process's, by part (see `Clock`); empty where no line has any.
        """
        records = read_lines(self.metrics_path) if self.accelerator.is_main_process else []
        if not records:
            return {}
        tokens = sum(record["tokens"] for record in records)
        # A line of an older release says nothing of padding.
        given = sum(record["tokens"] / (1 - record.get("padding", 0.0)) for record in records)
        laps = [*map(of_record, records), self._last_lap]
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / max(self.seconds, 1e-9),
            "padding": 1 - tokens / max(given, 1),
            "shares": shares({part: sum(lap[part] for lap in laps) for part in PARTS}),
        }

    def unfinished(self) -> int:
        """Samples that all processes left out of L_seq, because the teacher's answer did not end in time."""
        return 0 if self.transcripts is None else sum(self._of_all_data(self.transcripts.unfinished))

    def _save(self, step: int, optimizer: Any) -> None:
        progress = {
            "step": step,
            "seconds": self._seconds,
            "moved": sorted(self._moved),
            "live_steps": self._live_steps,
            "unfinished": self.unfinished(),
            "fingerprint": self.config.fingerprint(self.stage.number),
            "before": self.before,
            "random": random_states(),
            "batches": self._batches,
            "data": self._lanes(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        self.store.save(step, {"progress.pt": progress}, checkpoint_tensors(self.trainable, optimizer))

    def _lanes(self) -> list[Any] | None:
        """Where the data sets are, for each process that began the training. None for the built-in tasks."""
        if not isinstance(self.source, Stream):
            return None
        state = self.source.state_dict()
        every = self._of_all_data(state.get("lanes", [state]))
        number = getattr(self.source, "number", len(every))  # where there are more processes, some share a lane
        return [every[lane % len(every)][lane // len(every)] for lane in range(number)]

    def _restore(self, optimizer: Any) -> int:
        step, files, passed_over = self.store.load()
        for line in passed_over:
            self.accelerator.print(f"passed over: {line}")
        if not step:
            self._take_lanes([None] * (self.processes or 1))
            return 0
        progress = files["progress.pt"]
        if "weights.pt" in files:
            raise TrainingError(
                f"stage {self.stage.number} has a checkpoint of an older release, in {self.store.folder}; finish the "
                "stage with that release, or delete the folder"
            )
        if progress["fingerprint"] != self.config.fingerprint(self.stage.number):
            raise TrainingError(
                f"stage {self.stage.number} has a checkpoint made with another configuration, in {self.store.folder}; "
                "restore the configuration, or choose another output"
            )
        if progress.get("before", self.before) != self.before:
            raise TrainingError(
                f"stage {self.stage.number} has a checkpoint that began from another stage {self.stage.number - 1} "
                f"than the one that is there now; delete {self.store.folder}, and run the stage again"
            )
        self._restore_place(progress)
        self.store.fill(step, checkpoint_tensors(self.trainable, optimizer))
        set_random_states(progress["random"])
        if progress["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self._moved, self._seconds = set(progress["moved"]), progress["seconds"]
        self._live_steps = progress["live_steps"]
        if self.transcripts is not None and not self._sharing.number:
            self.transcripts.unfinished = progress["unfinished"]
        return step

    def _restore_place(self, progress: Mapping[str, Any]) -> None:
        """Go to where the data were, in as many processes as then or in others."""
        processes = self._sharing.groups
        self._batches = progress.get("batches", self._batches)
        self.processes = self._batches // self.config.gradient_accumulation
        if self._batches % processes:
            raise TrainingError(
                f"stage {self.stage.number} was at work on {self._batches} batches a step; go on in a number of "
                f"processes that divides it, got {processes}"
            )
        if not isinstance(self.source, Stream):
            return
        states = progress["data"]
        if len(states) % processes and processes % len(states):
            raise TrainingError(
                f"stage {self.stage.number} was at work in {len(states)} processes, each with a part of the data; go "
                f"on in a number that divides theirs, or that theirs divides, got {processes}"
            )
        self._take_lanes(states)

    def _take_lanes(self, states: list[Any]) -> None:
        """Read on for as many processes as there are states, each from its own; None: from the start."""
        processes, rank = self._sharing.groups, self._sharing.number
        if not isinstance(self.source, Stream):
            return
        if len(states) != processes:
            from .data.lanes import Lanes

            self.source = Lanes(self.source, states, rank, processes)  # type: ignore[arg-type]
        elif states[rank] is not None:
            self.source.load_state_dict(states[rank])

    def _last_records(self) -> list[dict[str, float]]:
        """What the main process has logged of the last steps, over all attempts."""
        if not self.accelerator.is_main_process:
            return []
        return read_lines(self.metrics_path)[-_RECENT:]

    @contextmanager
    def _log(self, step: int) -> Iterator[Callable[[dict[str, float]], None]]:
        """Append to the metrics. What was written after the checkpoint of `step` is dropped first."""
        if not self.accelerator.is_main_process:
            yield lambda record: None
            return
        kept = []
        if step:
            for record in read_lines(self.metrics_path, ("step",)):
                if record["step"] > step:
                    break
                kept.append(json.dumps(record) + "\n")
        write_atomically(self.metrics_path, "".join(kept))
        with self.metrics_path.open("a", encoding="utf-8") as file:

            def write(record: dict[str, float]) -> None:
                file.write(json.dumps(record) + "\n")
                file.flush()

            yield write


def _outline(sample: Any) -> tuple[Any, ...]:
    """All of a sample that its number of tokens depends on."""
    return sample.turns, [clip.frames.shape for clip in getattr(sample, "media", ())]


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
