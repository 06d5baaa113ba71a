"""Whether a family without an adapter can be converted: a small random model of it says so.

The model has the type and the kinds of layers of the teacher. Converted, with windows that hold everything and nothing
trained, it must give the teacher's logits to rounding: a prompt with visual tokens, padded rows, and steps after them.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linmu_ops.nn import ExactConfig

from .adapters.generic import placeholder
from .hooks import decoder_of
from .teachers import check_teacher
from .tiny_config import tiny_config

WIDE = ExactConfig(text_window=64, sink_tokens=8, window=(4, 8, 8), image_window=None)
TOGETHER = ("nowhere", "sliding", "everywhere")  # layers in which an image's tokens see each other
TOLERANCE = 1e-3  # of the norm of the logits
STEPS = 3
_BEFORE, _VISUAL, _AFTER, _SHORT = 3, 4, 5, 7  # tokens of text, of an image, of text; of another row
_SMALL = 1 << 18  # elements of a part beside the decoder that is built
_LARGE = 1 << 25  # elements of a decoder that is no small one
_checked: dict[str, str] = {}
Inputs = dict[str, Any]


def self_check(teacher_class: type[Any], config: Any, convert: Callable[[Any, str], Any]) -> str:
    """Check a family by a small random model of it.

    Args:
        teacher_class: transformers' class.
        config: the teacher's configuration.
        convert: makes the small teacher's student, with the options `WIDE`, where tokens of an image see each other in
            the second argument's layers.

    Returns:
        The one of `TOGETHER` with which the student is its teacher.

    Raises:
        ValueError: why it cannot be converted, or cannot be checked. Random states and models stay as they were.
    """
    with warnings.catch_warnings(), _quiet(), _one_thread():
        warnings.simplefilter("ignore")
        small = _small(config)
        key = f"{teacher_class.__name__} {json.dumps(small.to_dict(), sort_keys=True, default=str)}"
        if key not in _checked:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                _checked[key] = _judge(teacher_class, small, convert)
    if _checked[key] not in TOGETHER:
        raise ValueError(_checked[key])
    return _checked[key]


def _small(config: Any) -> Any:
    failed: Exception | None = None
    for shrink in (tiny_config, lambda of: tiny_config(of, vocabulary=None)):
        try:
            return shrink(config)
        except Exception as error:  # whatever a configuration of another's says
            failed = failed or error
    raise ValueError(f"a small configuration cannot be made: {_line(failed)}") from failed


def _judge(teacher_class: type[Any], config: Any, convert: Callable[[Any, str], Any]) -> str:
    """The one of `TOGETHER` with which a small student is its teacher, or why there is none."""
    try:
        teacher = tiny_model(teacher_class, config)
    except Exception as error:
        return f"a small model cannot be built: {_line(error)}"
    facts: list[dict[str, bool]] = [{}] * len(decoder_of(teacher).layers)
    try:
        check_teacher(teacher, (), WIDE, facts, values=False)
    except ValueError as error:
        return _line(error).removeprefix("convert: ")
    try:
        inputs, expected = _run_first(teacher, _inputs(teacher))
    except Exception as error:
        return f"a small model does not run on text and placeholders alone: {_line(error)}"
    reasons = []
    for together in TOGETHER if placeholder(config, "image") is not None else TOGETHER[:1]:
        reasons.append(_differs(inputs, expected, lambda how=together: convert(teacher, how)))  # type: ignore[misc]
        if not reasons[-1]:
            return together
        if not reasons[-1].startswith("the student's logits"):
            break
    return reasons[0]


def _differs(
    inputs: Mapping[str, Inputs], expected: Mapping[str, Mapping[str, Tensor]], make: Callable[[], Any]
) -> str:
    """Where a student is not its teacher; empty if nowhere."""
    try:
        student = make()
    except ValueError as error:
        return _line(error).removeprefix("convert: ").removeprefix("linmu: ")
    except Exception as error:
        return f"a small model cannot be converted: {_line(error)}"
    for what, rows in inputs.items():
        try:
            got = _outputs(student, rows)
        except Exception as error:
            return f"the student does not run on {what}: {_line(error)}"
        for name, ours in got.items():
            theirs = expected[what][name]
            apart = 1.0
            if ours.shape == theirs.shape:
                apart = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))
            if not apart < TOLERANCE:
                return f"the student's logits of {what} ({name}) differ from the teacher's by {apart:.1%}"
    return ""


@torch.no_grad()
def tiny_model(teacher_class: type[Any], config: Any) -> PreTrainedModel:
    """A random model of a small configuration in float32; of what is large beside the decoder it has no values."""
    with torch.device("meta"):
        model = teacher_class(config)
    decoder = decoder_of(model)
    if not hasattr(decoder, "layers"):
        raise ValueError(f"{type(decoder).__name__} has no list of decoder layers")
    embedded = sum(p.numel() for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    size = sum(p.numel() for p in decoder.parameters()) - embedded
    if size > _LARGE:
        raise ValueError(f"{type(decoder).__name__} has {size / 1e6:.0f} million parameters still")
    name = next(name for name, module in model.named_modules() if module is decoder)
    with torch.device("cpu"):
        model.set_submodule(name, type(decoder)(decoder.config))
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    real: dict[int, nn.Parameter] = {}
    for module in model.modules():
        whole = module is inputs or module is outputs
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and (whole or parameter.numel() <= _SMALL):
                if id(parameter) not in real:
                    real[id(parameter)] = nn.Parameter(torch.ones(parameter.shape))
                module._parameters[key] = real[id(parameter)]
            elif parameter is not None and parameter.is_meta:
                module._parameters[key] = nn.Parameter(_nothing(parameter), requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = _nothing(buffer)
    model.tie_weights()
    for parameter in model.parameters():
        if 0 in parameter.stride():
            continue
        if parameter.ndim > 1:
            parameter.normal_(0, 0.15)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    if model.can_generate():
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _nothing(like: Tensor) -> Tensor:
    """Zeros in the memory of one, not on the meta device: models ask for the device of their first weight."""
    return torch.zeros((), dtype=like.dtype, device="cpu").expand(like.shape)


def _inputs(model: Any) -> Iterator[dict[str, Inputs]]:
    """What to try, most telling first: with the kinds of tokens and grids that the model's forward names."""
    image = placeholder(model.config, "image")
    names = inspect.signature(type(model).forward).parameters
    merge: Any = getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", None)
    kinds = [name for name in ("mm_token_type_ids", "token_type_ids") if name in names]
    for with_grid, with_kinds in ((True, True), (False, True), (False, False)):
        if (with_grid and ("image_grid_thw" not in names or not merge)) or (with_kinds and not kinds):
            continue
        rest: Inputs = {}
        if with_grid and image is not None:
            rest["image_grid_thw"] = torch.tensor([[1, 2 * int(merge), 2 * int(merge)]])
        yield _rows(image, kinds if with_kinds else [], rest)


def _rows(image: int | None, kinds: list[str], rest: Inputs) -> dict[str, Inputs]:
    def text(n: int) -> list[int]:
        return torch.randint(8, 200, (n,)).tolist()

    whole = text(_BEFORE) + [image or 0] * (_VISUAL if image is not None else 0) + text(_AFTER)
    visual = [[int(image is not None and token == image) for token in whole]]
    pad = len(whole) - _SHORT
    two = [whole, [0] * pad + text(_SHORT)]
    given = {
        "a prompt": ([whole], [[1] * len(whole)], visual),
        "padded rows": (two, [[1] * len(whole), [0] * pad + [1] * _SHORT], [*visual, [0] * len(whole)]),
    }
    out: dict[str, Inputs] = {}
    for what, (ids, mask, types) in given.items():
        out[what] = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **rest}
        out[what] |= {name: torch.tensor(types) for name in kinds}
    return out


def _run_first(teacher: Any, tries: Iterator[Mapping[str, Inputs]]) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    failed: Exception | None = None
    for inputs in tries:
        try:
            return inputs, {what: _outputs(teacher, rows) for what, rows in inputs.items()}
        except Exception as error:  # the most telling inputs of all failed is the one to name
            failed = failed or error
    assert failed is not None
    raise failed


@torch.no_grad()
def _outputs(model: Any, rows: Inputs) -> dict[str, Tensor]:
    """Logits of all real tokens in one call, and of a few greedy steps with a cache."""
    real = rows["attention_mask"].bool()
    out = {"one call": model(**rows).logits[real]}
    made = model.generate(
        **rows, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return {**out, "steps": torch.stack(made.logits)}


def _line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Class validation error"):
        return lines[1].partition(": ")[2]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So small products take longer to share than to make."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of what a small random model lacks."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
