"""What one stage leaves for the next. A stage starts from nothing else; where it cannot, it says why."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .checkpoint import sha256, write_atomically
from .config import Config

_WEIGHTS, _MANIFEST = "weights.safetensors", "manifest.json"


class HandoffError(RuntimeError):
    """The stage before is missing, unfinished, or belongs to another teacher, student or configuration."""


def stage_folder(run: Path, number: int) -> Path:
    """Where stage `number` (0: the calibrated student before stage 1) keeps its files."""
    return run / f"stage{number}"


_FACTS = {"finished": bool, "teacher": dict, "student": dict, "config": str, "weights": dict}


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        why = str(error)
    else:
        if not isinstance(manifest, dict):
            why = f"it must hold an object, got a {type(manifest).__name__}"
        elif wrong := [name for name, kind in _FACTS.items() if not isinstance(manifest.get(name), kind)]:
            why = f"no {wrong[0]} in it"
        elif not {"path", "sha256"} <= set(manifest["teacher"]) or not {"file", "sha256"} <= set(manifest["weights"]):
            why = "no hashes in it"
        else:
            return manifest
    raise HandoffError(f"{path} is damaged ({why}); delete {folder} and run the stage again")


def read_facts(run: Path, number: int) -> dict[str, Any]:
    """The manifest of stage `number` of a run.

    Raises:
        HandoffError: it is missing or damaged.
    """
    manifest = _read(stage_folder(run, number))
    if manifest is None:
        raise HandoffError(f"stage {number} is missing in {run}")
    return manifest


def save_result(run: Path, number: int, state: dict[str, Tensor], teacher: str, config: Config, **facts: Any) -> None:
    """Write a finished stage: the weights first, then the manifest that declares them whole."""
    folder = stage_folder(run, number)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{_WEIGHTS}.partial"
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, partial)
    except SafetensorError as error:
        raise OSError(f"{folder} could not be written: {error}") from error
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(folder / _WEIGHTS)
    manifest = {
        "stage": number,
        "finished": True,
        "teacher": {"path": config.teacher, "sha256": teacher},
        "student": config.student,
        "config": config.fingerprint(number),
        "before": weights_hash(run, number - 1) if number else None,
        "weights": {"file": _WEIGHTS, "sha256": sha256(folder / _WEIGHTS)},
        **facts,
    }
    write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1))


def is_finished(run: Path, number: int) -> bool:
    """Whether stage `number` of a run has its result on disk."""
    manifest = _read(stage_folder(run, number))
    return bool(manifest and manifest.get("finished"))


def has_begun(run: Path, number: int) -> bool:
    """Whether stage `number` of a run has its result, or is on its way to it."""
    return is_finished(run, number) or (stage_folder(run, number) / "checkpoints").exists()


def weights_hash(run: Path, number: int) -> str:
    """The hash of what stage `number` of a run left, as its manifest has it."""
    return str(read_facts(run, number)["weights"]["sha256"])


def load_result(
    run: Path, number: int, teacher: str, config: Config, *, same_config: bool = False, verified: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the manifest of a finished stage.

    Args:
        same_config: also refuse a result whose own settings were not those of `config`, or which began from another
            result of the stage before.
        verified: another process has found that the weights match their hash.

    Raises:
        HandoffError: it is missing, unfinished or damaged, or of another teacher, student or configuration.
    """
    folder = stage_folder(run, number)
    manifest = _read(folder)
    command = f"run `linmu distill CONFIG --stage {max(number, 1)}` first"
    if manifest is None:
        why = "is not finished" if (folder / "checkpoints").exists() else "is missing"
        raise HandoffError(f"stage {number} {why} in {run}; {command}")
    if not manifest.get("finished"):
        raise HandoffError(f"stage {number} is not finished in {run}; {command}")
    theirs = manifest["teacher"]
    if theirs["sha256"] != teacher:
        raise HandoffError(
            f"stage {number} in {run} was distilled from another teacher: {theirs['path']} ({theirs['sha256'][:12]}), "
            f"not {config.teacher} ({teacher[:12]})"
        )
    if manifest["student"] != json.loads(json.dumps(config.student)):
        raise HandoffError(f"stage {number} in {run} has a student with other options: {manifest['student']}")
    if same_config and manifest["config"] != config.fingerprint(number):
        raise HandoffError(
            f"stage {number} in {run} was run with another configuration; restore it, or choose another output"
        )
    # A release that did not note it may have made the stage.
    if same_config and number and manifest.get("before") not in (None, weights_hash(run, number - 1)):
        raise HandoffError(
            f"stage {number} in {run} began from another stage {number - 1} than the one that is there now; delete "
            f"{folder}, and run the stage again"
        )
    path = folder / _WEIGHTS
    if not path.exists() or not (verified or sha256(path) == manifest["weights"]["sha256"]):
        raise HandoffError(f"{path} is damaged: it does not match its hash; delete {folder}, then {command}")
    try:
        return load_file(path), manifest
    except SafetensorError as error:
        raise HandoffError(f"{path} is damaged: {error}; delete {folder}, then {command}") from error
