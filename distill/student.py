"""The student: what its parameters are, how its branches are switched, and what LoRA adds."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import linmu_models
from linmu_models.accumulated_attention import read_later, record_attention
from linmu_models.attention import IN_FLOAT32
from linmu_models.hooks import attention_modules, record_outputs
from linmu_models.modeling import LinmuModel
from linmu_ops.context_parallel import ContextParallel
from linmu_ops.nn import MMATE, ExactConfig, ExactMMATE

from .config import Config, ConfigError
from .losses import kept_positions, num_weighed
from .packing import real_tokens
from .parallel import gathered
from .stages import Stage
from .teacher import Batch, model_inputs

# Parts of a block that belong to the windows, or weigh them against the scan.
_WINDOWS = re.compile(r"(windows|mix|share\.)")
# Parts that act on visual tokens alone; so do the others of the window branch where text has no window.
_REVERSE = re.compile(r"scan\.(reverse_|gate)")

# Linear maps that make step sizes (and with them decays), gates, or the weights of the branches.
_CONTROLS = re.compile(r"(reverse_)?dt_proj|gate_proj|z_proj|mix_proj|share")

Block = MMATE | ExactMMATE

# Rows of a student that is not trained, without its scan: whether it has kept tokens.
ALONE = {"windows alone": False, "near + kept": True}
_NEVER = -1e4  # nats that leave nothing to what is far

# The linear layers of a decoder layer's FFN; of a mixture, those of the expert that all tokens share.
_FFN = r".*layers\.\d+\.(mlp\.(shared_expert\.)?(gate|up|down|gate_up)_proj|feed_forward\.w[123])"


def mixers(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[int, Block]:
    """Decoder layer -> the block in the place of its attention. Layers that kept their attention are left out."""
    theirs, pairs = attention_modules(teacher), attention_modules(student).items()
    new = {i: ours for i, ours in pairs if hasattr(ours, "scan") and not hasattr(theirs[i], "scan")}
    return cast(dict[int, Block], new)


def new_student(
    teacher: PreTrainedModel, config: Config, lora: Callable[[LinmuModel], Any] | None = None
) -> tuple[LinmuModel, dict[int, Block], Any]:
    """A student with the teacher's weights, its blocks, and what `lora` gives: it puts LoRA on a model.

    Random numbers depend on the seed alone.

    Raises:
        ConfigError: training cannot read the teacher.
    """
    _check_parts(teacher)
    torch.manual_seed(config.seed)
    kept = config.student.get("keep_attention", ())
    model = linmu_models.convert(teacher, config.block, kept, share_frozen=True)
    blocks = mixers(model, teacher)
    handle = lora(model) if lora else None
    # In half precision, small updates would be rounded away.
    for block in blocks.values():
        block.float()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return model.eval(), blocks, handle


def _check_parts(teacher: PreTrainedModel) -> None:
    """The losses read hidden states off `model`, which takes pictures too, and predictions off `lm_head`."""
    for part in ("model", "lm_head"):
        if not hasattr(teacher, part):
            raise ConfigError(
                f"teacher must have its decoder and vision tower in `model` and its output layer in `lm_head`, got a "
                f"{type(teacher).__name__} without `{part}`, which linmu convert takes and linmu distill does not"
            )


def set_windows(blocks: Iterable[Block], on: bool) -> None:
    """Switch the windows of the paper's blocks (`MMATE`) on or off. Without windows a block gives Norm(y_flex).

    The windows of an `ExactMMATE` stay on, as its scan stands for what they leave out.
    """
    for block in blocks:
        if not isinstance(block.config, ExactConfig):
            block.windows_enabled = block.windows is not None and on


@contextmanager
def exact_alone(blocks: Iterable[Block], kept: bool) -> Iterator[None]:
    """While open, an `ExactMMATE` makes nothing of what is far, nor of what is kept unless `kept`."""
    exact = [block for block in blocks if isinstance(block, ExactMMATE)]
    before = [(block.windows.sizes, block.share.bias.detach().clone()) for block in exact]
    for block in exact:
        block.share.bias.data.fill_(_NEVER)
        if not kept:
            block.windows.sizes = block.windows.sizes._replace(kept=0)
    try:
        yield
    finally:
        for block, (sizes, bias) in zip(exact, before, strict=True):
            block.windows.sizes = sizes
            block.share.bias.data.copy_(bias)


def trainable_parameters(student: PreTrainedModel, blocks: dict[int, Block], stage: Stage) -> dict[str, nn.Parameter]:
    """Name -> parameter that a stage trains.

    Without L_hid, a layer's visual tokens matter only where a layer above shows them to text. From the last layer that
    does so on, the parts that act on visual tokens alone stay as they are.

    Raises:
        ConfigError: nothing is left to train.
    """
    layers = range(len(student.get_decoder().layers))
    last = max((i for i in layers if i not in blocks or _shows_text(blocks[i])), default=-1)
    kinds: dict[int, str] = {}
    unreached: set[int] = set()
    for layer, block in blocks.items():
        for name, parameter in block.named_parameters():
            in_windows = bool(_WINDOWS.match(name))
            on_visual = _REVERSE.match(name) or (in_windows and not block.config.text_window)
            if on_visual and layer >= last and "hidden" not in stage.losses:
                unreached.add(id(parameter))
            else:
                kinds[id(parameter)] = "windows" if in_windows else "scan"
    chosen = {}
    for name, parameter in student.named_parameters():
        kind = "lora" if ".lora_" in name else kinds.get(id(parameter))
        if kind in stage.trainable and id(parameter) not in unreached:
            chosen[name] = parameter
    chosen = {n: p for n, p in chosen.items() if not any(re.search(pattern, n) for pattern in stage.freeze)}
    if not chosen:
        raise ConfigError(f"stage{stage.number} trains nothing: it has no trainable parameter")
    return chosen


def _shows_text(block: Block) -> bool:
    """Whether text tokens see visual tokens in this block."""
    return bool(block.config.text_window or getattr(block.config, "flex", True))


def reach_all(blocks: Iterable[nn.Module]) -> None:
    """Let each block's output depend on all its trainable parameters, also in a batch without visual tokens.

    Parameters that act on visual tokens alone then have a gradient of 0. Otherwise they would have none, and DDP and
    FSDP2 would wait for it in vain.
    """

    def add_nothing(block: nn.Module, args: Any, kwargs: dict[str, Any], out: tuple[Tensor, None]) -> Any:
        linmu = kwargs.get("linmu")
        visual = linmu is not None and linmu.layout is not None and linmu.layout.has_visual
        if linmu is None or visual or not torch.is_grad_enabled():
            return out
        return out[0] + sum(0 * p.sum() for p in block.parameters() if p.requires_grad), *out[1:]

    for block in blocks:
        block.register_forward_hook(add_nothing, with_kwargs=True)


def beyond_windows(student: nn.Module) -> set[str]:
    """Names of parameters that act only where something lies beyond a token's window.

    These are the scans that `ExactMMATE` mixes with its windows as one softmax would.
    """
    return {
        f"{path}.{name}"
        for path, block in student.named_modules()
        if isinstance(block, ExactMMATE)
        for name, _ in block.named_parameters()
        if name.startswith(("scan.", "share."))
    }


def decaying(student: nn.Module) -> set[str]:
    """Names of parameters that weight decay may pull to 0: the weights of linear maps from channels to channels.

    Decays, step sizes, gates, norms and biases are left out, as pulling them to 0 would shorten the memory. So are
    learned feature maps, which start as the identity: 0 is far from it.
    """
    return {
        f"{path}.weight"
        for path, module in student.named_modules()
        if isinstance(module, nn.Linear) and not _CONTROLS.fullmatch(path.rpartition(".")[2])
    }


def add_lora(student: PreTrainedModel, rank: int, seed: int, target: str = _FFN) -> Any:
    """Put low-rank updates on linear layers of the decoder, in place.

    Args:
        rank: of the updates. They are scaled by 2, whatever the rank.
        target: a regular expression over the names of the decoder's modules. The vision tower is never touched.

    Returns:
        peft's handle, for `merge_lora`.

    Raises:
        ConfigError: `target` matches no linear layer of the decoder.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    decoder = student.get_decoder()
    prefix = next(name for name, module in student.named_modules() if module is decoder)
    targets = [
        f"{prefix}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(target, name)
    ]
    if not targets:
        raise ConfigError(f"LoRA has nothing to update: {target!r} matches no linear layer of the decoder")
    # A list of full names would be matched by suffix, and a vision tower has layers of the same names.
    pattern = "|".join(re.escape(name) for name in targets)
    torch.manual_seed(seed)
    return LoraModel(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"({pattern})"), "default")


@torch.no_grad()
def merge_lora(handle: Any) -> PreTrainedModel:
    """Fold the updates into weights of the student's own, and remove peft's modules."""
    for module in handle.model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            # The base weight may be the teacher's too; it must stay as it is.
            base.weight = nn.Parameter(base.weight.clone(), requires_grad=False)
    return handle.merge_and_unload()


def plain(name: str) -> str:
    """A tensor's name without LoRA. peft keeps a layer that it updates one level further down."""
    return name.replace(".base_layer.", ".")


def own_state(student: PreTrainedModel, blocks: dict[int, Block]) -> dict[str, Tensor]:
    """What the student has and its teacher has not: the blocks, and LoRA where it is on. All processes must call it."""
    own = {id(tensor) for block in blocks.values() for tensor in (*block.parameters(), *block.buffers())}
    return {
        plain(name): gathered(tensor)
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]
        if id(tensor) in own or ".lora_" in name
    }


@torch.no_grad()
def load_own_state(student: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Put back what `own_state` gave. The student must have LoRA where the state has it.

    Raises:
        ValueError: a tensor of the state is not in the student, or has another shape.
    """
    ours = {plain(name): tensor for name, tensor in [*student.named_parameters(), *student.named_buffers()]}
    for name, tensor in state.items():
        if name not in ours or ours[name].shape != tensor.shape:
            got = "nothing" if name not in ours else str(tuple(ours[name].shape))
            raise ValueError(f"the saved stage has {name} of {tuple(tensor.shape)}, this student has {got}")
        ours[name].copy_(tensor)


def store_parameters(blocks: Iterable[Block], trainable: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
    """Keep what is trained in float32, where small updates are not rounded away, and the rest of the blocks in `dtype`,
    as conversion would."""
    trained = {id(parameter) for parameter in trainable.values()}
    for block in blocks:
        for name, parameter in block.named_parameters():
            if id(parameter) not in trained and not IN_FLOAT32.search(f"self_attn.{name}"):
                parameter.data = parameter.data.to(dtype)
    for parameter in trainable.values():
        parameter.data = parameter.data.float()


@contextmanager
def record_reading(
    teacher: PreTrainedModel, layers: Sequence[int], batch: Batch, context: ContextParallel | None = None
) -> Iterator[list[Tensor]]:
    """Record what answers read, while `teacher` runs once on a batch.

    Args:
        context: how `split_attention` splits the rows meanwhile: the weights are then of this process's slab.

    Yields:
        A list that is filled when the context ends. For each of `layers` it then holds weights of tokens, (B, L)
        float32: what `read_later` makes of the attention from the positions that predict answers. The sum of the
        weights is the number of these positions.
    """
    supervised = kept_positions(batch["labels"])
    answers = torch.zeros_like(batch["labels"], dtype=torch.bool)
    answers[supervised.rows, supervised.positions] = True
    weights: list[Tensor] = []
    attentions = attention_modules(teacher)
    with record_attention(teacher, list(attentions.values()), answers) as received:
        yield weights
    asking = answers if context is None else context.shard(answers)
    every = dict(zip(attentions, read_later(received, asking), strict=True))
    weights.extend(every[layer] for layer in layers)


@torch.no_grad()
def what_is_read(teacher: PreTrainedModel, layers: Sequence[int], batch: Batch) -> list[Tensor]:
    """Run the teacher once, and return what `record_reading` finds."""
    with record_reading(teacher, layers, batch) as reading:
        teacher.model(**model_inputs(batch), use_cache=False)
    return reading


def hidden_kinds(
    student: LinmuModel, batch: Batch, reading: list[Tensor] | None = None
) -> dict[str, Tensor | list[Tensor]]:
    """The weights of tokens for each mean in L_hid, as `hidden_loss` takes them.

    Without `reading` there is one mean, over all tokens. With it there are three: over visual tokens, over text, and
    over what answers read.
    """
    mask = real_tokens(batch)
    if reading is None:
        return {"tokens": mask}
    layout = student.build_layout(model_inputs(batch))
    visual = torch.zeros_like(mask) if layout is None else layout.visual_mask(mask.device)
    return {"visual": mask & visual, "text": mask & ~visual, "read": reading}


def hidden_counts(student: LinmuModel, batch: Batch, average: str) -> dict[str, int]:
    """The sum of each of the weights that `hidden_kinds` will give, with `average` as a stage has it."""
    mask = real_tokens(batch)
    if average == "tokens":
        return {"tokens": int(mask.sum())}
    layout = student.build_layout(model_inputs(batch))
    visual = 0 if layout is None else int((mask & layout.visual_mask(mask.device)).sum())
    return {"visual": visual, "text": int(mask.sum()) - visual, "read": len(kept_positions(batch["labels"]))}


@torch.no_grad()
def mean_squares(model: PreTrainedModel, layers: Sequence[int], batches: Sequence[Batch],
                 kinds: Sequence[dict[str, Tensor | list[Tensor]]]) -> dict[str, list[float]]:  # fmt: skip
    """For each kind of token and each layer, the mean of ||attention output||^2.

    A kind without a token gets the mean over the tokens of all kinds.

    Args:
        kinds: what `hidden_kinds` gives for each batch.
    """
    sums = {kind: torch.zeros(len(layers), dtype=torch.float64) for kind in kinds[0]}
    counts = dict.fromkeys(sums, 0)
    modules = attention_modules(model)
    for batch, found in zip(batches, kinds, strict=True):
        with record_outputs([modules[i] for i in layers]) as outputs:
            model.model(**model_inputs(batch), use_cache=False)
        for kind, weights in found.items():
            each = [weights] * len(layers) if isinstance(weights, Tensor) else weights
            squares = [(w * o.double().square().sum(-1))[w > 0].sum().cpu() for w, o in zip(each, outputs, strict=True)]
            sums[kind] += torch.stack(squares)
            counts[kind] += num_weighed(weights)
    every = torch.stack(list(sums.values())).sum(0) / max(sum(counts.values()), 1)
    return {kind: (sums[kind] / counts[kind] if counts[kind] else every).tolist() for kind in sums}
