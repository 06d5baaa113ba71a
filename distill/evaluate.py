"""`linmu evaluate`: a saved model on the built-in tasks, side by side with its teacher."""

from pathlib import Path
from typing import cast

from torch import nn

from linmu_models.generate import check_model_name, find_device
from linmu_ops._tables import markdown

from .data import GROUPS, SPLITS
from .evaluation import Result, evaluate
from .handoff import HandoffError, read_facts
from .sources import UNFIT, fits_tasks
from .stages import STAGES
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


def evaluate_folder(
    folder: Path,
    teacher: str | None,
    samples: int,
    groups: list[str] | None,
    split: str,
    seed: int,
    device: str | None = None,
) -> str:
    """A Markdown table: a row for each task group, a column for each model.

    Args:
        device: "cpu", "cuda", ...; None for a GPU if there is one.

    Raises:
        EvaluationError: no model in `folder`, an unknown group or split.
    """
    if unknown := sorted(set(groups or ()) - set(GROUPS)):
        raise EvaluationError(f"--group must be among {', '.join(GROUPS)}, got {', '.join(unknown)}")
    if split not in SPLITS:
        raise EvaluationError(f"--split must be among {', '.join(SPLITS)}, got {split}")
    path, teacher = _find(folder, teacher)
    where = find_device(device)
    results: dict[str, list[Result]] = {}
    names = groups or list(GROUPS)
    for source in (teacher, path):
        if source is not None:
            check_model_name(source)
    for label, source in (("teacher", teacher), ("model", path)):
        if source is not None:
            model, tokenizer = load_teacher(source, "auto")
            if not fits_tasks(model, tokenizer):
                raise EvaluationError(f"{source} cannot be shown the built-in tasks: {UNFIT}")
            cast(nn.Module, model).to(where)
            results[label] = [evaluate(model, tokenizer, name, samples, seed, split=split) for name in names]
    rows = []
    for i, name in enumerate(names):
        cells = []
        for found in results.values():
            low, high = found[i].interval
            cells.append(f"{found[i].accuracy:.1%} ({low:.1%}-{high:.1%})")
        if teacher is not None:
            base = results["teacher"][i].accuracy
            cells.append(f"{results['model'][i].accuracy / base:.1%}" if base else "-")
        rows.append([name, *cells])
    head = [f"task ({split}, n={samples})", *results, *(["model / teacher"] if teacher is not None else [])]
    return markdown(head, rows)
