"""`convert`: a loaded transformers model in, a linear one out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from linmu_ops.nn import EXACT, ExactConfig, MMATEConfig

from .adapters import generic
from .adapters.generic import LinmuGeneric
from .attention import IN_FLOAT32, LinmuAttention, linmu_attention
from .calibration import as_batches, calibrate
from .config import linmu_field, parse_options
from .hooks import attention_modules
from .int8 import is_int8
from .modeling import FAMILIES, LinmuModel
from .parts import read_parts
from .report import TensorRow, TransferReport
from .self_check import WIDE, self_check
from .teachers import check_teacher, find_facts


def convert(
    teacher: PreTrainedModel,
    config: MMATEConfig | ExactConfig | Mapping[str, Any] = EXACT,
    keep_attention: Iterable[int] = (),
    *,
    calibration: Iterable[Mapping[str, Any]] = (),
    share_frozen: bool = False,
) -> Any:
    """Make a model like `teacher`, with a linear block in the place of each decoder layer's attention.

    A block starts from the weights of the attention that it replaces. Every other weight is the teacher's. The teacher
    is not changed. With `share_frozen` both models share memory: training the teacher then changes the student too.

    Args:
        teacher: a loaded `...ForConditionalGeneration` or `...ForCausalLM` of one of `linmu_models.families()`, or
            another of transformers' models for images and text, which a small random model of its kind checks first. It
            may have any floating dtype, and be on any device or device map; with an adapter also on the meta device.
        config: the block and its options. `EXACT` makes an `ExactMMATE`; it fares best in conversion (`bench/reports`).
            `PAPER` and `LITERAL` make an `MMATE`. A dict holds only options that differ from `EXACT`'s, or from those
            of the preset that it names: `{"text_window": 512}`, `{"preset": "paper", "z_gate": True}`.
        keep_attention: decoder layers that keep their attention, and so their KV cache. Negative ones count from the
            end.
        calibration: a few batches of inputs, as keywords of the teacher's forward. If given, each block is fitted to
            what the attention that it replaces makes of them (the block's `calibrate`).
        share_frozen: use the teacher's memory for everything but the blocks, and freeze it in the student
            (`requires_grad` False). For distillation: two models, one vision tower, one set of MLPs and embeddings.

    Returns:
        A `LinmuModel` that is also an instance of the teacher's class. Its `linmu_report`, a `TransferReport`, says
        where each tensor comes from. Save it with `save_pretrained`. Load it with the Auto class after
        `import linmu_models`, or with `trust_remote_code=True`.

    Raises:
        ValueError: the family or an option is unknown; the self check of a family without an adapter fails; the teacher
            is quantised or offloaded, or its attention does what a block cannot do (`linmu_models.teachers`);
            calibration is asked of a teacher on the meta device.
        TypeError: the teacher is no such model, or another argument is of another type.
    """
    batches = as_batches("convert: calibration", calibration)
    if not isinstance(share_frozen, bool):
        raise TypeError(f"convert: share_frozen must be a bool, got {share_frozen!r}")
    family = _family(teacher)
    together = check_generic(teacher.config) if issubclass(family, LinmuGeneric) else ""
    student = _converted(teacher, family, parse_options(config), keep_attention, share_frozen, together)
    if batches:
        if teacher.device.type == "meta":
            raise ValueError("convert: calibration needs a teacher with values, got one on the meta device")
        calibrate(student, teacher, batches)
    device_map = getattr(teacher, "hf_device_map", None)
    if device_map is not None and len(set(device_map.values())) > 1:
        from accelerate import dispatch_model

        student = dispatch_model(student, device_map=device_map)
    return student


def _converted(
    teacher: Any,
    family: type[LinmuModel],
    options: MMATEConfig | ExactConfig,
    keep_attention: Iterable[int],
    share_frozen: bool,
    together: str = "",
) -> Any:
    options = family.fit_options(options, teacher.config)
    layers = teacher.config.get_text_config(decoder=True).num_hidden_layers
    field = linmu_field(options, keep_attention, layers)
    keep_attention = field["keep_attention"]
    if issubclass(family, LinmuGeneric):
        field["facts"] = find_facts(teacher, keep_attention, together)
    config = _student_config(teacher, family, field)
    facts = [family.layer_facts(config, index) for index in range(layers)]
    check_teacher(teacher, keep_attention, options, facts, family.prompt_sees_itself)
    with torch.device("meta"):
        student: Any = family(config)
    memo: dict[int, nn.Parameter] = {}
    report = TransferReport(
        teacher.config.name_or_path or type(teacher).__name__,
        student.config.model_type,
        student.config.linmu["keep_attention"],
        [i for i, attention in attention_modules(student).items() if isinstance(attention, LinmuAttention)],
    )
    layer_names = {id(layer): name for name, layer in student.named_modules()}
    linear_names = [f"{layer_names[id(student.linmu_layers()[i])]}.self_attn" for i in report.linear_layers]
    report.rows += _take(student, teacher, linear_names, share_frozen, memo)
    for name in linear_names:
        blueprint: Any = student.get_submodule(name)
        block, rows = _block(blueprint, teacher.get_submodule(name), options, facts[blueprint.layer_idx], name)
        student.set_submodule(name, block)
        report.rows += rows
    student.linmu_report = report
    student.train(teacher.training)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    for name in type(teacher.config).sub_configs:
        _same_attention(getattr(student.config, name, None), getattr(teacher.config, name, None))
    student._name_attention()
    return student


def _family(teacher: Any) -> type[LinmuModel]:
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"convert: teacher must be a transformers model, got {type(teacher).__name__}")
    family = family_of(teacher.config.model_type)
    if not issubclass(family, type(teacher)):
        wanted = next(c for c in family.__mro__ if c.__module__.startswith("transformers.")).__name__
        raise TypeError(f"convert: teacher must be a {wanted}, got {type(teacher).__name__}")
    if getattr(teacher, "hf_quantizer", None) is not None or is_int8(teacher):
        raise ValueError("convert: teacher must not be quantised, got a quantised one; load it in a float dtype")
    on_meta = [t.device.type == "meta" for t in teacher.parameters()]
    if any(on_meta) and not all(on_meta):
        raise ValueError("convert: teacher must be in memory, got parts offloaded to CPU or disk by its device map")
    if issubclass(family, LinmuGeneric) and all(on_meta):
        raise ValueError(
            f"convert: teacher must have values, as no adapter knows {teacher.config.model_type}, got one on the meta "
            "device"
        )
    return family


def family_of(model_type: str) -> type[LinmuModel]:
    """The class of a type's students: an adapter's, or the generic one.

    Raises:
        ValueError: there is none.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type not in generic.types():
        raise ValueError(
            f"convert: teacher's model type must be one of {', '.join(sorted(FAMILIES))} (none is linear already), or "
            f"another of transformers' for images and text, got {model_type!r}"
        )
    try:
        return generic.family(model_type)
    except ImportError as error:
        raise ValueError(_refused(model_type, error)) from error


def check_generic(config: Any) -> str:
    """Check that models of a type without an adapter can be converted, by a small one of this configuration.

    Returns:
        The layers in which tokens of an image see each other, one of `self_check.TOGETHER`.

    Raises:
        ValueError: why not.
    """
    made = family_of(config.model_type)
    teacher_class = next(c for c in made.__mro__ if c.__module__.startswith("transformers."))
    try:
        return self_check(teacher_class, config, lambda *small: _converted(small[0], made, WIDE, (), True, small[1]))
    except ValueError as error:
        raise ValueError(_refused(config.model_type, error)) from error


def _refused(model_type: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return f"convert: no adapter knows {model_type}, and the generic one refuses it: {reason}"


def _student_config(teacher: Any, family: Any, field: Mapping[str, Any]) -> Any:
    values = teacher.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    config = family.config_class.from_dict({**values, "linmu": dict(field)})
    config.name_or_path = teacher.config.name_or_path
    return config


def _take(
    student: nn.Module, teacher: nn.Module, skip: list[str], share: bool, memo: dict[int, nn.Parameter]
) -> Iterator[TensorRow]:
    """Give the student's tensors, all but those under `skip`, the teacher's values; ties between tensors stay."""
    theirs = dict(teacher.named_modules())
    for module_name, module in student.named_modules():
        if any(module_name == s or module_name.startswith(s + ".") for s in skip):
            continue
        source = theirs[module_name]
        for name, value in list(module._parameters.items()):
            if value is None:
                continue
            original = source._parameters[name]
            assert original is not None
            if id(original) not in memo:
                data = original.detach() if share else original.detach().clone()
                memo[id(original)] = nn.Parameter(data, requires_grad=original.requires_grad and not share)
            module._parameters[name] = memo[id(original)]
            full = f"{module_name}.{name}"
            yield TensorRow(full, full, "shared" if share else "copied", original.numel())
        for name, buffer in source._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.detach().clone()


def _block(
    blueprint: Any, attention: Any, options: MMATEConfig | ExactConfig, facts: Mapping[str, bool], name: str
) -> tuple[Any, list[TensorRow]]:
    parts = read_parts(attention)
    weight = parts.weights["q"]
    with torch.device(weight.device):
        block = linmu_attention(attention, options, blueprint.layer_idx, blueprint.text_only, **facts)
    for parameter_name, parameter in block.named_parameters():
        if not IN_FLOAT32.search(f"{name}.{parameter_name}"):
            parameter.data = parameter.data.to(weight.dtype)
    sizes = {n: p.numel() for n, p in block.named_parameters()}
    rows = block.load_parts(parts)
    return block, [
        TensorRow(f"{name}.{r.name}", f"{name}.{r.source}" if r.source else "", r.how, sizes[r.name]) for r in rows
    ]


def _same_attention(mine: Any, theirs: Any) -> None:
    if mine is not None and theirs is not None:
        mine._attn_implementation_internal = theirs._attn_implementation_internal
