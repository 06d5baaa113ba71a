"""`linmu plan`: what each GPU of a run will hold, and for how long, before anything is loaded.

Weights, gradients and moments are counted on the real modules of the whole teacher and student, on the meta device.
What lives while a micro-batch is worked on is counted while the same code works on tensors that have no bytes: in
models of a few layers, from which it is drawn out to all, as each layer adds the same. What FSDP2 and DDP add is
arithmetic.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from linmu_models.accumulated_attention import QUERIES_AT_ONCE, sum_attention
from linmu_models.config import auto_class, sees_images
from linmu_models.generate import check_model_name
from linmu_models.hooks import attention_modules, record_inputs, record_outputs
from linmu_models.layout import LinmuInputs
from linmu_models.parts import read_parts
from linmu_models.split_attention import split_attention, why_whole
from linmu_ops import TokenLayout
from linmu_ops.context_parallel import ContextParallel
from linmu_ops.nn import ExactConfig

from . import plan_tower
from .config import Config, RecordData
from .live import LiveBytes, storage_bytes
from .losses import answer_losses, hidden_loss, kept_positions
from .objective import Objective, Part, Teacher, learns_by_block
from .sources import build_source
from .stages import STAGES, Stage
from .student import add_lora, new_student, set_windows, store_parameters, trainable_parameters
from .teacher import model_inputs, shared_vision_features

GB = 10**9
_FEW = (2, 4)  # layers of the models that are run
_PLANNED = "linmu_planned"
_BUCKETS = 25 * 2**20  # of DDP's gradients; more than one is in flight


class PlanError(RuntimeError):
    """What a run will hold cannot be told; the text says why."""


@dataclass(frozen=True)
class Work:
    """A micro-batch of one process, in tokens."""

    rows: int
    length: int
    answers: int
    """Supervised tokens of the data."""
    layout: TokenLayout | None = None
    """Where its visual tokens are."""
    vision: dict[str, Tensor] = field(default_factory=dict)
    """What the vision tower is given, of whole rows: pixels on the meta device, and grids."""

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class StagePlan:
    """What one GPU holds in a stage, in bytes, and the work of the stage."""

    stage: Stage
    weights: int
    gradients: int
    optimiser: int
    activations: int
    """The most that lives while a micro-batch is worked on, beside the others."""
    buffers: int
    """What the processes send each other."""
    trained: int
    """Parameters."""
    step_tokens: int
    """Of all processes."""
    step_flops: float
    """Of all processes; what a checkpointed layer does twice counts twice."""

    @property
    def total(self) -> int:
        """What the GPU needs."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.buffers

    def hours(self, gpus: int, tflops: float, share: float) -> float:
        """The stage's, with GPUs of so many teraflops, of which it gets a share."""
        return self.stage.steps * self.step_flops / (gpus * tflops * 1e12 * share) / 3600


def plan(config: Config, gpus: int = 1, teacher_config: PreTrainedConfig | None = None) -> list[StagePlan]:
    """The plan of each stage that has steps.

    Args:
        gpus: processes, one on each.
        teacher_config: the teacher's; None reads it.

    Raises:
        PlanError: the teacher's configuration cannot be read, a batch has no size that is known beforehand, or the
            processes are no multiple of those that share a row.
    """
    if gpus % config.context:
        raise PlanError(f"gpus must be a multiple of the {config.context} that share a row, got {gpus}")
    if teacher_config is None:
        try:
            check_model_name(config.teacher)
            teacher_config = AutoConfig.from_pretrained(config.teacher)
        except (OSError, ValueError) as error:
            raise PlanError(f"teacher: {config.teacher} has no configuration: {str(error).splitlines()[0]}") from error
    numbers = [row.number for row in STAGES if config.stage(row.number).steps]
    return [_plan_stage(config, number, gpus, teacher_config) for number in numbers]


def _plan_stage(config: Config, number: int, gpus: int, teacher_config: PreTrainedConfig) -> StagePlan:
    stage, work = config.stage(number), _work(config, number, teacher_config)
    models = _Models(config, number, teacher_config)
    trained = sum(p.numel() for p in models.trainable.values())
    floats = 4 * trained
    layers = teacher_config.get_text_config(decoder=True).num_hidden_layers
    few = [n for n in _FEW if n < layers]
    measured = [_measure(config, number, _cut(teacher_config, n), work) for n in few or [layers]]
    (*peaks, flops), *more = measured
    if more:
        (*peaks_4, flops_4) = more[0]
        times = (layers - few[0]) / (few[1] - few[0])
        peaks = [round(low + (high - low) * times) for low, high in zip(peaks, peaks_4, strict=True)]
        flops += (flops_4 - flops) * times
    elif few:  # three layers
        *peaks, flops = _measure(config, number, _cut(teacher_config, layers), work)
    live = max(peaks)
    # AdamW works on one parameter after another, with two more of its size.
    live = max(live, 8 * max(p.numel() for p in models.trainable.values()))
    weights, gradients, optimiser, buffers = models.weights, floats, 2 * floats, 0
    if gpus > 1 and config.sharded:
        inside, widest = models.in_layers, models.widest_layer
        weights += (inside + 2 * models.teachers_layers) // gpus - inside - models.teachers_layers
        weights, gradients, optimiser = weights, gradients // gpus, optimiser // gpus
        # Two layers at a time, as the next one is gathered ahead; a layer's gradients, whole and as they are sent.
        buffers = 2 * widest + 2 * (floats // layers)
    elif gpus > 1:
        one_by_one = 4 * max(p.numel() for p in models.trainable.values())
        buffers = one_by_one if learns_by_block(stage) else gradients + 2 * _BUCKETS
    buffers += _from_others(config, models, work, layers)
    step_tokens = work.tokens * config.gradient_accumulation * gpus // config.context
    return StagePlan(
        stage, weights, gradients, optimiser, live, buffers, trained, step_tokens,
        (flops + _tower_flops(stage, teacher_config, work)) * config.gradient_accumulation * gpus,
    )  # fmt: skip


def _tower_flops(stage: Stage, teacher_config: PreTrainedConfig, work: Work) -> int:
    """Of the vision tower in a micro-batch. Each of those that share rows encodes all of their pixels."""
    if not work.vision:
        return 0
    total = 0
    for times, config in plan_tower.parts(teacher_config, _cut(teacher_config, 1)):
        with torch.device("meta"):
            model: Any = auto_class(config).from_config(config, dtype=torch.float32)
        with _fake(model):
            total += times * plan_tower.flops(model, plan_tower.on_device(work.vision))
    # The student has the teacher's features, but where its batch is another: with the teacher's answers behind it.
    return total * (3 if "sequence" in stage.losses and not learns_by_block(stage) else 1)


def _from_others(config: Config, models: "_Models", work: Work, layers: int) -> int:
    """Bytes of what a process gets from those that share its rows, of each layer whose graph lives: as it came, as a
    state, beside the slab's own, and as attention reads it."""
    if config.context == 1:
        return 0
    block: Any = next(iter(models.blocks.values()))
    shape, options, wide = block.shape, config.block, getattr(torch, config.precision).itemsize
    heads, groups, head = shape.num_heads, shape.num_kv_heads, shape.head_dim
    if isinstance(options, ExactConfig):
        frames = [] if work.layout is None else [min(t, options.window[0]) * h * w for _, t, h, w in work.layout.blocks]
        tokens = block.windows.state_tokens + max(frames, default=0)
        state = heads * (math.prod(block.scan.state_size) + 1)
    else:  # What an order of visits moves.
        tokens, state = _share(work, config.context).length, 2 * heads * (head * head + 1)
    each = 4 * tokens * groups * (2 * head * wide + 4 * heads // groups) + 4 * config.context * state
    stage = models.stage
    one_by_one = learns_by_block(stage) or config.gradient_checkpointing
    return work.rows * (2 if "sequence" in stage.losses else 1) * each * (1 if one_by_one else layers)


def _share(work: Work, context: int) -> Work:
    """What a process works on of rows that so many share: of images and videos as many frames as are in it."""
    if context == 1:
        return work
    length = -(-work.length // context)
    blocks: list[tuple[int, ...]] = []
    positions: list[int] = []
    at = dict.fromkeys(range(work.rows), 0)
    for row, frames, height, width in [] if work.layout is None else work.layout.blocks.tolist():
        some = min(frames, (length - at[row]) // (height * width))
        if some:
            blocks.append((row, some, height, width))
            positions += range(at[row], at[row] + some * height * width)
            at[row] += some * height * width
    layout = TokenLayout(blocks, positions, work.rows, length) if blocks else None
    return Work(work.rows, length, min(work.answers, work.rows * length), layout, work.vision)


class _Models:
    """The teacher and the student of a stage on the meta device, as training keeps them."""

    def __init__(self, config: Config, number: int, teacher_config: PreTrainedConfig) -> None:
        self.stage = stage = config.stage(number)
        dtype = getattr(torch, config.precision)
        with torch.device("meta"):
            made: Any = auto_class(teacher_config).from_config(teacher_config, dtype=dtype)
        self.teacher: PreTrainedModel = made.to(dtype).eval().requires_grad_(False)
        lora = (lambda model: add_lora(model, config.lora_rank, config.seed)) if config.has_lora(number) else None
        self.student, self.blocks, _ = new_student(self.teacher, config, lora)
        self.trainable = trainable_parameters(self.student, self.blocks, stage)
        store_parameters(self.blocks.values(), self.trainable, dtype)
        trained = {id(p) for p in self.trainable.values()}
        for parameter in self.student.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        set_windows(self.blocks.values(), stage.windows)
        if config.gradient_checkpointing and stage.block_input == "student":
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.student.train()

    @property
    def weights(self) -> int:
        """Bytes of both models on one device, what they share counted once."""
        return storage_bytes(_tensors(self.teacher, self.student))

    @property
    def in_layers(self) -> int:
        """Bytes of the student's decoder layers that are not the teacher's too."""
        theirs = {t.untyped_storage()._cdata for t in _tensors(self.teacher)}
        own = [t for t in _tensors(self.student.get_decoder().layers) if t.untyped_storage()._cdata not in theirs]
        return storage_bytes(own)

    @property
    def teachers_layers(self) -> int:
        """Bytes of the teacher's decoder layers."""
        return storage_bytes(_tensors(self.teacher.get_decoder().layers))

    @property
    def widest_layer(self) -> int:
        """Bytes of the largest decoder layer of the student."""
        return max(storage_bytes(_tensors(layer)) for layer in self.student.get_decoder().layers)


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The configuration of a model with the first layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    if hasattr(text, "max_window_layers"):
        text.max_window_layers = min(text.max_window_layers, layers)
    plan_tower.cut(config)
    return config


def _work(config: Config, number: int, teacher_config: PreTrainedConfig) -> Work:
    """The largest micro-batch of a stage."""
    data = config.stage_data(number)
    if not isinstance(data, RecordData):
        return _work_of_tasks(config, number, teacher_config)
    tokens = data.max_tokens
    if data.is_plain_text or not sees_images(teacher_config):
        return Work(1, tokens, tokens - 1 if data.is_plain_text else tokens // 4)
    # A video is most of it.
    height, width = plan_tower.frame(data.frame_pixels or 2**17, teacher_config)
    frames = max(1, 3 * tokens // 4 // (height * width))
    grid = (frames, height, width)
    visual = math.prod(grid)
    if visual >= tokens:
        raise PlanError(f"data.max_tokens must be more than a frame's {height * width} tokens, got {tokens}")
    layout = TokenLayout([[0, *grid]], list(range(tokens - visual - 1, tokens - 1)), 1, tokens)
    return Work(1, tokens, tokens // 8, layout, plan_tower.video(*grid, teacher_config))


def _work_of_tasks(config: Config, number: int, teacher_config: PreTrainedConfig) -> Work:
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.teacher)
        with torch.device("meta"):
            teacher: Any = auto_class(teacher_config).from_config(teacher_config)
        source = build_source(config.stage_data(number), config.teacher, teacher, tokenizer, config.seed * 4 + number)
        batches = [source.processor(source.samples(i)) for i in range(8)]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise PlanError(f"data.sets must be given: the teacher cannot be shown the built-in tasks: {error}") from error
    batch = max(batches, key=lambda b: b["input_ids"].numel())
    layout = new_student(teacher, config)[0].build_layout(model_inputs(batch))
    rows, length = batch["input_ids"].shape
    return Work(rows, length, len(kept_positions(batch["labels"])), layout, plan_tower.of_batch(batch))


def _planned_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What attention without an (L, L) matrix gives and needs, and nothing of what it computes."""
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    if (found := _received.get(module)) is not None:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        per_head = query.new_zeros(key.shape[:3], dtype=torch.float32)
        queries = torch.arange(min(QUERIES_AT_ONCE, query.shape[2]), device=query.device)
        for row in range(len(query)):
            per_head[row] += sum_attention(query[row], key[row], None, 1.0, queries)
        found.append(per_head)
    del lse
    return out, None


_received: dict[nn.Module, list[Tensor]] = {}
AttentionInterface.register(_PLANNED, _planned_attention)


@contextmanager
def _fake(*models: nn.Module) -> Iterator[None]:
    """While open, the models' meta tensors are fakes on the CPU, where autocast knows them; shared ones stay shared."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in made:
            made[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return made[key]

    with mode:
        for module in [m for model in models for m in model.modules()]:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device.type == "meta":
                    module._parameters[name] = nn.Parameter(like(parameter), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        yield


def _measure(config: Config, number: int, teacher_config: PreTrainedConfig, work: Work) -> tuple[int, int, float]:
    """(bytes that a micro-batch needs at most beside weights and gradients, and while the vision tower runs; FLOPs) of
    models so large."""
    models = _Models(config, number, teacher_config)
    stage, teacher, student = config.stage(number), models.teacher, models.student
    mine = _share(work, config.context)
    layers = sorted(models.blocks)
    frozen = Teacher(teacher, layers)
    objective = Objective(student, frozen, stage)
    with _fake(teacher, student):
        trained = [p for p in student.parameters() if p.requires_grad]
        accumulates = config.gradient_accumulation > 1
        if accumulates:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        known = [*_tensors(teacher, student), *(p.grad for p in trained if p.grad is not None)]
        dtype = getattr(torch, config.precision)
        cast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False)
        with LiveBytes(known) as live, shared_vision_features(teacher, student):
            before = live.now
            # The teacher's own answers come behind the true ones.
            times = 2 if "sequence" in stage.losses else 1
            asked = plan_tower.on_device(work.vision)
            batch = plan_tower.on_device(work.vision, times) if times > 1 else asked
            with cast:
                part = _assemble(teacher, layers, stage, work, mine, dtype, config.context, asked, live)
            del asked
            if objective.by_block:
                shared = LinmuInputs(mine.layout)
                weights = torch.empty(mine.rows, mine.length)
                for i in range(len(layers)):
                    with cast:
                        loss = objective._share(part, shared, weights, i)
                    loss.backward()
                    del loss
            else:
                # Each process embeds whole rows, and encodes their pixels.
                whole = [_embeddings(student, work, dtype, times)] if mine is not work else []
                with cast:
                    whole += plan_tower.encode(student, batch, live, _PLANNED)
                    loss = _whole_loss(objective, part, layers, stage, mine, times, dtype)
                del whole
                loss.backward()
                del loss
            del batch, part
        attention = _attention_flops(teacher, work, config.context)
        grads = 0 if accumulates else 4 * sum(p.numel() for p in trained)
        return live.peak - before - grads, live.peak_apart - before - grads, live.flops + attention


def _attention_flops(teacher: PreTrainedModel, work: Work, context: int) -> float:
    """Of the teacher's causal attention, whose products are not run here, on the process with the most heads."""
    parts = [read_parts(module) for module in attention_modules(teacher).values()]
    size = 1 if why_whole(teacher) else context
    return sum(2 * work.rows * work.length**2 * -(-part.heads // size) * part.head_dim for part in parts)


class _First(ContextParallel):
    """The first of so many processes, which has the most to do. Nothing is sent."""

    def __init__(self, size: int, length: int) -> None:
        super().__init__(SimpleNamespace(rank=lambda: 0, size=lambda: size), length)

    def exchange(self, rows: Tensor, to: list[int], of: list[int]) -> Tensor:
        return rows.new_empty(sum(of), *rows.shape[1:])


def _assemble(
    teacher: PreTrainedModel, layers: list[int], stage: Stage, work: Work, mine: Work, dtype: torch.dtype, context: int,
    vision: dict[str, Tensor], live: LiveBytes,
) -> Part:  # fmt: skip
    """A micro-batch as `assemble` makes it, of tensors without values. A process keeps `mine` of it; the teacher sees
    all of `work` where it cannot be shared."""
    shared = context > 1 and why_whole(teacher) is None
    split = split_attention(teacher, _First(context, work.length)) if shared else nullcontext()

    def kept_of(t: Tensor) -> Tensor:
        return t if mine is work or shared else t[:, : mine.length].clone()

    hidden = "hidden" in stage.losses
    modules = [attention_modules(teacher)[i] for i in layers]
    found: list[Tensor] = []
    if hidden and stage.average == "read":
        _received.update(dict.fromkeys(attention_modules(teacher).values(), found))
    decoder = teacher.get_decoder()
    before, decoder.config._attn_implementation = decoder.config._attn_implementation, _PLANNED
    try:
        with (
            torch.no_grad(),
            record_outputs(modules if hidden else [], kept_of) as outputs,
            record_inputs(modules if stage.block_input == "teacher" else [], kept_of) as inputs,
            split,
        ):
            embeddings = _embeddings(teacher, work, dtype)
            features = plan_tower.encode(teacher, vision, live, _PLANNED)
            states = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            del embeddings, features
    finally:
        decoder.config._attn_implementation = before
        _received.clear()
    kept = states.flatten(0, 1)[: mine.answers].clone()
    kinds: dict[str, Any] = {}
    if hidden:
        mask = torch.empty(mine.rows, mine.length, dtype=torch.bool)
        kinds = {"tokens": mask}
        if found:
            means = (per_head.mean(1)[:, : mine.length].clone() for per_head in found)
            read = dict(zip(attention_modules(teacher), means, strict=True))
            kinds = {"visual": mask, "text": ~mask, "read": [read[layer] for layer in layers]}
    return Part({}, work.rows, kept, outputs, inputs, kinds, torch.empty(work.rows, dtype=torch.bool), {})


def _embeddings(model: PreTrainedModel, work: Work, dtype: torch.dtype, times: int = 1) -> Tensor:
    embeddings: Any = model.get_input_embeddings()
    return torch.empty(work.rows * times, work.length, embeddings.weight.shape[1], dtype=dtype)


def _whole_loss(
    objective: Objective, part: Part, layers: list[int], stage: Stage, work: Work, times: int, dtype: torch.dtype
) -> Tensor:
    """As `Objective.forward` makes it of a student that sees its own stream."""
    student, teacher = objective.student, objective._teacher[0]
    blocks = objective.blocks if "hidden" in stage.losses else []
    shared = LinmuInputs(_repeated(work, times))
    with record_outputs(blocks) as outputs:
        embeddings = _embeddings(student, work, dtype, times)
        states = student.get_decoder()(inputs_embeds=embeddings, linmu=shared, use_cache=False).last_hidden_state
    total = torch.zeros(())
    if blocks:
        weights = [torch.empty(work.rows, work.length)] * len(layers)
        total = hidden_loss([o[: work.rows] for o in outputs], part.hidden, weights, num_tokens=1)
    number = work.answers * times
    chosen = torch.empty(number, dtype=torch.bool)
    answers = answer_losses(
        states.flatten(0, 1)[:number], student.lm_head, torch.empty(number, dtype=torch.int64),
        teacher_states=part.states, teacher_head=teacher.model.lm_head, in_sequence=chosen, in_supervised=chosen,
        num_token=1, num_sequence=1, num_supervised=1,
    )  # fmt: skip
    return total + answers.token + answers.sequence + answers.supervised


def _repeated(work: Work, times: int) -> TokenLayout | None:
    """The layout of so many copies of a micro-batch's rows, one below the other."""
    if work.layout is None or times == 1:
        return work.layout
    blocks = np.concatenate([work.layout.blocks + np.array([work.rows * i, 0, 0, 0]) for i in range(times)])
    positions = np.concatenate([work.layout.positions] * times)
    return TokenLayout(blocks, positions, work.rows * times, work.length)


def table(config: Config, stages: Sequence[StagePlan], gpus: int, memory: float, tflops: float, share: float) -> str:
    """The plan as text."""
    spread = f"{'fsdp' if config.sharded else 'ddp'} on {gpus} GPUs" if gpus > 1 else "one GPU"
    spread += f", {config.context} of which share each row," if config.context > 1 else ""
    names = ("weights", "gradients", "optimiser", "activations", "buffers", "total")
    lines = [
        f"{config.teacher}, {config.preset}, {config.precision}, {spread} of {memory:g} GB. GB on each:",
        f"{'stage':<28}" + "".join(f"{name:>13}" for name in names),
    ]
    for row in stages:
        sizes = "".join(f"{getattr(row, name) / GB:13.2f}" for name in names)
        lines.append(f"{row.stage.number} {row.stage.title:<26}{sizes}")
    lines += ["", f"{'stage':<28}{'trained':>13}{'steps':>13}{'tokens/step':>13}{'PFLOP/step':>13}{'hours':>13}"]
    for row in stages:
        hours = row.hours(gpus, tflops, share)
        lines.append(
            f"{row.stage.number} {row.stage.title:<26}{row.trained / 1e6:11,.1f} M{row.stage.steps:13,}"
            f"{row.step_tokens:13,}{row.step_flops / 1e15:13.3g}{hours:13.1f}"
        )
    total = sum(row.hours(gpus, tflops, share) for row in stages)
    lines.append(
        f"{total:.1f} hours in all, at {share:.0%} of {tflops:g} TFLOP/s a GPU. Not in it: reading, and the "
        "teacher's own answers (`linmu answers`)."
    )
    lines += [
        f"stage {row.stage.number} does not fit: it needs {row.total / GB:.1f} of {memory:g} GB"
        for row in stages
        if not fits(row, memory)
    ]
    return "\n".join(lines)


def fits(row: StagePlan, memory: float) -> bool:
    """Whether a stage leaves a tenth of a GPU's memory free, for libraries' scratch and for gaps between tensors."""
    return row.total <= 0.9 * memory * GB
