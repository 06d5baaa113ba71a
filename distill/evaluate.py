"""`linmu evaluate`: a saved model on the built-in tasks, side by side with its teacher."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import linmu_models
from linmu_models.config import parse_options
from linmu_models.generate import check_model_name, find_device
from linmu_ops import ExactMMATE
from linmu_ops._tables import markdown

from .data import GROUPS, SPLITS, TASKS, draw, task_options
from .evaluation import Result, evaluate
from .handoff import HandoffError, read_facts, stage_folder
from .limited import EQUAL_MEMORY, equal_tokens, limited
from .progress import telling
from .sources import UNFIT, fits_tasks
from .stages import STAGES
from .student import ALONE, exact_alone, load_own_state
from .teacher import load_teacher


class EvaluationError(RuntimeError):
    """There is nothing to evaluate at that place, or no such task."""


def _find(folder: Path, teacher: str | None) -> tuple[str, str | None]:
    """The student's folder and the teacher, from a run's folder or a model's."""
    if (folder / "config.json").exists():
        return str(folder), teacher
    if (folder / "student" / "config.json").exists():
        try:
            return str(folder / "student"), teacher or read_facts(folder, len(STAGES))["teacher"]["path"]
        except HandoffError as error:
            raise EvaluationError(f"--teacher must be given: {error}") from error
    if (folder / "stage0").exists():
        raise EvaluationError(f"{folder} is a run that has not finished: go on with `linmu distill CONFIG --resume`")
    raise EvaluationError(f"{folder} holds no model: neither config.json nor student/config.json is there")


@dataclass(frozen=True)
class Asked:
    """A task group with options of its generator: a row of the table."""

    group: str
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The group, and what differs from its default."""
        return ", ".join([self.group, *(tell(name, value) for name, value in self.options.items())])


def tell(name: str, value: Any) -> str:
    """An option of a group, in words."""
    if name == "frames":
        return f"{value[0]} frames"
    if name == "sizes":
        return f"{value[0][0]} lines"
    if name == "depth":
        return f"depth {value[0]:g}-{value[1]:g}"
    return f"{value} {name.removesuffix('s') if value == 1 else name}"


def asked_for(groups: list[str] | None, options: Mapping[str, Sequence[Any]]) -> list[Asked]:
    """Each group with each choice of values of those options that it takes.

    Args:
        options: name -> values; one without values is left at the group's default.

    Raises:
        EvaluationError: there is no such group, or no group takes an option.
    """
    if unknown := sorted(set(groups or ()) - set(TASKS)):
        raise EvaluationError(f"--group must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
    names = groups or list(GROUPS)
    given = {name: values for name, values in options.items() if values}
    for name in given:
        takers = [group for group in TASKS if name in task_options(group)]
        if not set(takers) & set(names):
            flag = {"sizes": "lines"}.get(name, name)
            raise EvaluationError(f"--{flag} must be left out but for {', '.join(takers)}, got {', '.join(names)}")
    return [
        Asked(group, dict(zip(own, values, strict=True)))
        for group in names
        for own in [[name for name in given if name in task_options(group)]]
        for values in product(*(given[name] for name in own))
    ]


def untrained(folder: Path, teacher: PreTrainedModel) -> PreTrainedModel:
    """The student of a run's folder as it was before training.

    Raises:
        EvaluationError: it is not there, or its file is damaged.
    """
    try:
        options = dict(read_facts(folder, 0)["student"])
        kept = options.pop("keep_attention", ())
        # Every option is written out, so a preset says no more than which block it is.
        preset = "exact" if "kept_tokens" in options else "paper"
        student = linmu_models.convert(teacher, parse_options({"preset": preset, **options}), kept).eval()
        load_own_state(student, load_file(stage_folder(folder, 0) / "weights.safetensors"))
    except (HandoffError, SafetensorError, FileNotFoundError, ValueError) as error:
        raise EvaluationError(f"{folder} has no untrained student: {error}") from error
    return student


def evaluate_folder(
    folder: Path,
    teacher: str | None,
    samples: int,
    groups: list[str] | None,
    split: str,
    seed: int,
    device: str | None = None,
    *,
    options: Mapping[str, Sequence[Any]] | None = None,
    rows: bool = False,
    depths: int = 0,
) -> str:
    """A Markdown table: a row for each task group and its options, a column for each model.

    Args:
        device: "cpu", "cuda", ...; None for a GPU if there is one.
        options: values of options of the groups, as in `asked_for`.
        rows: also of a teacher whose memory is the student's; of windows alone, and with kept tokens; and of zero
            steps. The last three are of a run's untrained student; of a model they are the model without its scan.
        depths: a second table, of so many equal parts of the input.

    Raises:
        EvaluationError: no model in `folder`, an unknown group or split, an option that no group takes.
    """
    asked = asked_for(groups, options or {})
    if split not in SPLITS:
        raise EvaluationError(f"--split must be among {', '.join(SPLITS)}, got {split}")
    path, teacher = _find(folder, teacher)
    if rows and teacher is None:
        raise EvaluationError("--teacher must be given with --rows")
    for source in (teacher, path):
        if source is not None:
            check_model_name(source)
    for one in asked:  # What is asked for is seen before hours have gone by.
        next(draw(one.group, seed, split, **one.options))
    results: dict[str, list[Result]] = {}
    with telling() as tell:
        for label, model, tokenizer, context in _models(folder, path, teacher, find_device(device), rows):
            if not fits_tasks(model, tokenizer):
                raise EvaluationError(f"{path} cannot be shown the built-in tasks: {UNFIT}")
            with context:
                results[label] = [
                    evaluate(
                        model, tokenizer, one.group, samples, seed, split=split,
                        told=tell(f"{label}: {one.label}"), **one.options,
                    )
                    for one in asked
                ]  # fmt: skip
    told = _table(asked, results, f"{split}, n={samples}")
    return told + ("\n\n" + _depth_table(asked, results, depths) if depths else "")


def _models(
    folder: Path, path: str, teacher: str | None, where: torch.device, rows: bool
) -> Iterator[tuple[str, PreTrainedModel, Any, AbstractContextManager[Any]]]:
    """(label, model, tokenizer, what must be open while it is asked)."""
    student, tokenizer = load_teacher(path, "auto")
    cast(nn.Module, student).to(where)
    if teacher is not None:
        model, own = load_teacher(teacher, "auto")
        cast(nn.Module, model).to(where)
        yield "teacher", model, own, nullcontext()
        if rows:
            tokens = equal_tokens(model, student, own)
            yield f"{EQUAL_MEMORY} ({tokens} tokens)", model, own, limited(model, tokens)
            is_run = path != str(folder)
            start = untrained(folder, model) if is_run else student
            blocks = [layer.self_attn for layer in start.get_decoder().layers if hasattr(layer.self_attn, "scan")]
            if any(isinstance(block, ExactMMATE) for block in blocks):
                for label, kept in ALONE.items():
                    yield label, start, own, exact_alone(blocks, kept)
            if is_run:
                yield "zero steps", start, own, nullcontext()
    yield "model", student, tokenizer, nullcontext()


def _table(asked: list[Asked], results: dict[str, list[Result]], what: str) -> str:
    body = []
    for i, one in enumerate(asked):
        cells = []
        for found in results.values():
            low, high = found[i].interval
            cells.append(f"{found[i].accuracy:.1%} ({low:.1%}-{high:.1%})")
        if "teacher" in results:
            base = results["teacher"][i].accuracy
            cells.append(f"{results['model'][i].accuracy / base:.1%}" if base else "-")
        body.append([one.label, *cells])
    head = [f"task ({what})", *results, *(["model / teacher"] if "teacher" in results else [])]
    return markdown(head, body)


def _depth_table(asked: list[Asked], results: dict[str, list[Result]], parts: int) -> str:
    """Answers by where what was asked lies."""
    body = []
    for i, one in enumerate(asked):
        counted = {label: found[i].by_depth(parts) for label, found in results.items()}
        for part in range(parts):
            cells = [f"{right} of {n}" for right, n in (found[part] for found in counted.values())]
            if any(n for _, n in (found[part] for found in counted.values())):
                body.append([one.label, f"{part / parts:.0%} to {(part + 1) / parts:.0%}", *cells])
    return markdown(["task", "depth", *results], body)
