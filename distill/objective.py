"""What a micro-batch is to the teacher, to the student, and to the losses."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linmu_models.accumulated_attention import each_alone
from linmu_models.hooks import attention_modules, record_inputs, record_outputs, replace_inputs
from linmu_models.layout import LinmuInputs
from linmu_models.modeling import LinmuModel
from linmu_models.split_attention import split_attention, why_whole
from linmu_models.split_rows import split_inputs, split_rows
from linmu_ops.context_parallel import ContextParallel

from .clock import spent
from .losses import answer_losses, hidden_loss, joint_weights, kept_positions
from .packing import pack, real_tokens
from .stages import Stage
from .student import hidden_counts, hidden_kinds, record_reading
from .teacher import Batch, Source, Transcripts, model_inputs, predicts_targets


class TrainingError(RuntimeError):
    """Training stopped, as its result would be worth nothing. The last good checkpoint is untouched."""


@dataclass
class Teacher:
    """What a stage needs of the frozen model."""

    model: PreTrainedModel
    layers: Sequence[int]
    """The decoder layers whose attention the student has replaced."""
    scales: Mapping[str, Sequence[float]] | None = None
    """For each kind of token, the mean of ||attention output||^2 at these layers; None: L_hid in absolute units."""

    @spent("teacher")
    @torch.no_grad()
    def __call__(
        self, batch: Batch, hidden: bool, inputs: bool, reading: bool, context: ContextParallel | None = None
    ) -> tuple[Tensor, list[Tensor], list[Batch], list[Tensor] | None]:
        """Run the teacher on a batch.

        Args:
            context: how rows are split. All that is returned is then of this process's slab, and so is the work, unless
                there is a reason why the teacher cannot share it (`why_whole`).

        Returns:
            The final hidden states `(B, L, D)`. The outputs and the inputs of attention at `layers`, where asked for.
            What answers read (see `record_reading`), where asked for.
        """
        modules = [attention_modules(self.model)[i] for i in self.layers]
        packed = batch.get("seq_idx")
        shared = context if context is not None and why_whole(self.model) is None else None

        def slab(t: Tensor) -> Tensor:
            """A copy: a view would hold the whole."""
            return t if context is None or shared is not None else t[:, context.start : context.stop].clone()

        with (
            nullcontext() if packed is None else each_alone(self.model, packed),
            record_outputs(modules if hidden else [], slab) as outputs,
            record_inputs(modules if inputs else [], slab) as seen,
            record_reading(self.model, self.layers, batch, shared) if reading else nullcontext() as read,
            nullcontext() if shared is None else split_attention(self.model, shared),
        ):
            states = self.model.model(**model_inputs(batch), use_cache=False).last_hidden_state
        return slab(states), outputs, seen, None if read is None else [slab(weights) for weights in read]


@dataclass
class MicroBatch:
    """Samples as a batch, on the host, and how many tokens each loss has of it: a step needs these numbers of all its
    micro-batches before it works on the first.

    Each sample is a row; or the batch is packed, and one row holds all samples.
    """

    asked: Batch
    """The samples with their true answers."""
    batch: Batch
    """The same, and behind them those to which the teacher answered something else, with its answers (L_seq)."""
    same: Tensor
    """(num_samples,) bool: samples whose true answers are the teacher's own answers too."""
    counts: dict[str, int]
    """Tokens in the mean of each loss."""
    states: Tensor | None = None
    """(n, D): the teacher's hidden states at the kept positions of `asked`, where it was asked already."""


@dataclass
class Part:
    """A micro-batch on the device, with all that its losses need of the teacher."""

    batch: Batch
    num_samples: int
    states: Tensor
    """(n, D): the teacher's hidden states at the kept positions of the first `num_samples` samples."""
    hidden: list[Tensor]
    inputs: list[Batch]
    """What the teacher's attention saw at each layer. Empty where the student's blocks see their own stream."""
    kinds: dict[str, Tensor | list[Tensor]]
    """For each mean in L_hid, the weights (B, L) of the tokens: one tensor for all layers, or one for each."""
    same: Tensor
    """As in `MicroBatch`."""
    counts: dict[str, int]
    """As in `MicroBatch`."""
    context: ContextParallel | None = None
    """How the rows of `batch` are split over processes. `states`, `hidden`, `inputs` and `kinds` are then of this one's
    slab alone."""

    @property
    def slab(self) -> tuple[int, int]:
        """The tokens of each row that this process works on, from and to."""
        length = self.batch["input_ids"].shape[1]
        return (0, length) if self.context is None else (self.context.start, self.context.stop)


class Objective(nn.Module):
    """The student and its losses in one forward pass. So DDP and FSDP see one module and one loss.

    Attributes:
        temperature: of L_tok. 1 in the paper; a subclass may have another.
    """

    temperature: float = 1.0

    def __init__(self, student: LinmuModel, teacher: Teacher, stage: Stage) -> None:
        """The teacher stays out of the module tree, as it is frozen and nobody wraps it."""
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self.stage = stage

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the places of the teacher's attention."""
        (teacher,) = self._teacher
        modules = attention_modules(self.student)
        return [modules[i] for i in teacher.layers]

    @property
    def by_block(self) -> bool:
        """Whether blocks learn one by one: from the teacher's inputs, by L_hid alone. Nothing between them is run,
        which would be most of a step's work, and `each_block` can be derived block by block."""
        return learns_by_block(self.stage)

    def each_block(self, part: Part, counts: dict[str, int]) -> list[Callable[[], Tensor]]:
        """For each block, a function that makes its share of L_hid, once: it then drops what it needs of `part`.

        `counts` are the tokens of the whole step.
        """
        (teacher,) = self._teacher
        rows, length = part.batch["input_ids"].shape
        shared = self.student.block_inputs(model_inputs(part.batch), length)
        if part.context is not None:
            shared = split_inputs(shared, rows, part.context)
        weights = joint_weights(part.kinds, teacher.scales, counts, len(teacher.layers))
        return [partial(self._share, part, shared, weights[i], i) for i in range(len(weights))]

    def _share(self, part: Part, shared: LinmuInputs, weights: Tensor, index: int) -> Tensor:
        given, theirs = part.inputs[index], part.hidden[index]
        part.inputs[index], part.hidden[index] = {}, theirs.new_empty(0)
        output = self.blocks[index](**given, linmu=shared)[0]
        return hidden_loss([output], [theirs], [weights], num_tokens=1) / len(part.hidden)

    def forward(self, part: Part, counts: dict[str, int]) -> dict[str, Tensor]:
        """This micro-batch's share of the mean of each loss. `counts` are the tokens of the whole step."""
        (teacher,) = self._teacher
        if self.by_block:
            return {"hidden": torch.stack([share() for share in self.each_block(part, counts)]).sum()}
        hidden, blocks = "hidden" in self.stage.losses, self.blocks
        with (
            record_outputs(blocks if hidden else []) as outputs,
            replace_inputs(blocks if part.inputs else [], part.inputs),
            nullcontext() if part.context is None else split_rows(self.student, part.context),
        ):
            states = self.student.model(**model_inputs(part.batch), use_cache=False).last_hidden_state
        losses = {}
        if hidden:
            rows, length = part.hidden[0].shape[:2]
            ours = [output[:rows, :length] for output in outputs]
            weights = joint_weights(part.kinds, teacher.scales, counts, len(blocks))
            losses["hidden"] = hidden_loss(ours, part.hidden, weights, num_tokens=1)
        kept = kept_positions(part.batch["labels"], part.batch.get("seq_idx")).slab(*part.slab)
        own = torch.cat([part.same, part.same.new_ones(num_samples(part.batch) - part.num_samples)])
        answers = answer_losses(
            kept.select(states),
            self.student.lm_head,
            kept.targets,
            teacher_states=part.states,
            teacher_head=teacher.model.lm_head,
            temperature=self.temperature,
            in_sequence=own[kept.samples],
            in_supervised=kept.samples < part.num_samples,
            num_token=counts["token"],
            num_sequence=counts["sequence"],
            num_supervised=counts["supervised"],
        )
        every = {"token": answers.token, "sequence": answers.sequence, "supervised": answers.supervised}
        if part.context is not None:
            # A slab may have no answer. Its process must take part in the others' backward pass all the same.
            every = {name: value + states[:, :0].sum() for name, value in every.items()}
        # In stages 1 and 2 the distance to the true answers is shown where it is known, not trained on.
        shown = {**self.stage.losses, "supervised": 0.0}
        return {**losses, **{name: value for name, value in every.items() if name in shown}}


def learns_by_block(stage: Stage) -> bool:
    """Whether a stage's blocks learn one by one: see `Objective.by_block`."""
    return stage.block_input == "teacher" and set(stage.losses) == {"hidden"}


def num_samples(batch: Batch) -> int:
    """Rows, or the sequences of the one row."""
    return len(batch["labels"]) if "seq_idx" not in batch else int(batch["seq_idx"][0, -1]) + 1


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on a device."""
    return {name: value.to(device) for name, value in batch.items()}


class _Said(NamedTuple):
    """What the teacher answers to samples: for each, whether the true answers are its own; and of others that ended
    in time, its answers, by the sample's number."""

    same: list[bool]
    others: dict[int, list[str]]


def read_batch(source: Source, samples: list[Any], teacher: Teacher, student: LinmuModel, stage: Stage,
               transcripts: Transcripts | None, device: torch.device,
               agreed: Callable[[Callable[[], _Said]], _Said] = lambda work: work()) -> MicroBatch:  # fmt: skip
    """Make a micro-batch of samples. The teacher runs only where `stage` uses L_seq and an answer of its is not known.

    Args:
        student: says where its visual tokens are.
        transcripts: the teacher's own answers, where `stage` uses L_seq.
        device: the teacher's.
        agreed: among processes that share rows, what one of them finds. What each decodes for itself may differ, where
            one has found on the disk what another had to decode; then their rows would.
    """

    def made(samples: list[Any]) -> Batch:
        batch = source.processor(samples)
        return pack(batch, teacher.model.model) if getattr(source, "packing", False) else batch

    asked = batch = made(samples)
    kept = kept_positions(asked["labels"], asked.get("seq_idx"))
    if not len(kept):
        raise TrainingError("a batch has no supervised position: every answer in it is empty")
    same, states = torch.zeros(len(samples), dtype=torch.bool), None

    def answers() -> _Said:
        nonlocal states
        if transcripts is None:
            raise ValueError("read_batch: transcripts must be given where L_seq is used, got None")
        said = _Said([False] * len(samples), {})
        # Plain text asks nothing that could be answered.
        asks = [any(question for question, _ in sample.turns) for sample in samples]
        known = transcripts.known(samples)
        if any(ask and answers is None for ask, answers in zip(asks, known, strict=True)):
            # Greedy decoding gives the true answer exactly where the teacher, fed it, predicts each token of it.
            there = on_device(asked, device)
            where = kept_positions(there["labels"], there.get("seq_idx"))
            states = where.select(teacher(there, False, False, False)[0])
            said.same[:] = predicts_targets(states, teacher.model.lm_head, where, len(samples)).tolist()
        for i, (sample, ask, found) in enumerate(zip(samples, asks, known, strict=True)):
            said.same[i] = ask and (said.same[i] if found is None else says(sample) == found)
        wanted = [i for i, ask in enumerate(asks) if ask and not said.same[i]]
        for i, theirs in zip(wanted, transcripts([samples[i] for i in wanted]) if wanted else [], strict=True):
            said.same[i] = theirs is not None and says(theirs) == says(samples[i])
            if theirs is not None and not said.same[i]:
                said.others[i] = says(theirs)
        return said

    if "sequence" in stage.losses:
        said = agreed(answers)
        same = torch.tensor(said.same)
        if said.others:
            batch = made([*samples, *(saying(samples[i], theirs) for i, theirs in said.others.items())])
    all_kept = kept_positions(batch["labels"], batch.get("seq_idx"))
    of_teacher = torch.cat([same, same.new_ones(num_samples(batch) - len(samples))])
    real = int(real_tokens(batch).sum())
    counts = {
        **(hidden_counts(student, asked, stage.average) if "hidden" in stage.losses else {}),
        "token": len(kept),
        "sequence": int(of_teacher[all_kept.samples].sum()),
        "supervised": len(kept),
        "input": real,
        "padding": batch["input_ids"].numel() - real,
    }
    return MicroBatch(asked, batch, same, counts, states)


def says(sample: Any) -> list[str]:
    """A sample's answers."""
    return [answer for _, answer in sample.turns]


def saying(sample: Any, answers: Sequence[str]) -> Any:
    """A sample with other answers."""
    turns = tuple((question, said) for (question, _), said in zip(sample.turns, answers, strict=True))
    return replace(sample, turns=turns)


def assemble(micro: MicroBatch, teacher: Teacher, student: LinmuModel, stage: Stage, device: torch.device,
             group: Any = None) -> Part:  # fmt: skip
    """Run the teacher on a micro-batch, and collect what the losses need.

    Args:
        student: says where its visual tokens are.
        group: the processes that share each row, as `ContextParallel` takes them.
    """
    asked = on_device(micro.asked, device)
    batch = asked if micro.batch is micro.asked else on_device(micro.batch, device)
    same = micro.same.to(device)
    learns_hidden = "hidden" in stage.losses
    context = None if group is None else ContextParallel(group, batch["input_ids"].shape[1])
    kept = kept_positions(asked["labels"], asked.get("seq_idx"))
    if micro.states is not None and not learns_hidden:
        known = micro.states if context is None else micro.states[kept.within(context.start, context.stop)]
        return Part(batch, len(same), known, [], [], {}, same, micro.counts, context)
    reads = learns_hidden and stage.average == "read"
    by_teacher = stage.block_input == "teacher"
    # With the teacher's own answers behind it, a batch may be longer than what was asked, and its slabs too.
    longer = context is not None and context.length != asked["input_ids"].shape[1]
    split = ContextParallel(group, asked["input_ids"].shape[1]) if longer else context
    states, hidden, inputs, reading = teacher(asked, learns_hidden, by_teacher, reads, split)
    if context is not None and split is not None and longer:
        move = partial(split.resplit, other=context)
        states, hidden, reading = move(states), list(map(move, hidden)), reading and list(map(move, reading))
        inputs = [{"hidden_states": move(given["hidden_states"])} for given in inputs]
    kinds = hidden_kinds(student, asked, reading) if hidden else {}
    if context is not None:
        here = slice(context.start, context.stop)
        kept = kept.slab(context.start, context.stop)
        # What is read is of the slab already.
        kinds = {kind: w[:, here].clone() if isinstance(w, Tensor) else w for kind, w in kinds.items()}
    return Part(batch, len(same), kept.select(states), hidden, inputs, kinds, same, micro.counts, context)
