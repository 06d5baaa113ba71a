"""Checkpoints that survive a kill at any instant. They are written aside, flushed, renamed, and verified when read."""

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from .parallel import ANOTHER_ENDED, from_first, is_of_another

_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{9})")
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # One process needs no group.


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or holds what is not data."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_reason(error: BaseException) -> str:
    """One line of what went wrong, on the first process on which it did."""
    while isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    if is_of_another(error):
        return ANOTHER_ENDED
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file; a reader sees the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _flush(path.parent)


def random_states() -> dict[str, Any]:
    """The states of every random generator a training step may use."""
    name, keys, *rest = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    return {
        "python": random.getstate(),
        # No array: reading one back takes more than data.
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def load_data(path: Path) -> Any:
    """Read a file of `torch.save`. It may hold tensors, numbers, text, and lists and dicts of these. None of its code
    is run.

    Raises:
        CheckpointError: the file holds anything else, or is no such file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class) (\S+)", str(error))
        what = f"holds {found[1] or found[2]}" if found else "is not what torch.save writes"
        raise CheckpointError(f"{path} {what}: only tensors, numbers and text are read, nothing is run") from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read: {(str(error).splitlines() or [''])[0]}") from error


@dataclass
class CheckpointStore:
    """The checkpoints of one stage: folders `step-000000200`, the newest `keep` of them.

    Tensors are written by all processes, each what it holds, as safetensors files (`torch.distributed.checkpoint`).
    They can be read by another number of processes. What is small is written by the first. Training goes on meanwhile.

    A folder gets its final name only when every byte of it has reached the disk. Its manifest holds the size and the
    hash of every file. A folder that is not whole is passed over when reading.
    """

    folder: Path
    keep: int = 2

    def __post_init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    @cached_property
    def _group(self) -> dist.ProcessGroup | None:
        """Of its own: it is used beside training. Over gloo, as what is sent is on the CPU. None for one process."""
        joined = dist.is_initialized() and dist.get_world_size() > 1
        return dist.new_group(backend="gloo") if joined else None

    def steps(self) -> list[int]:
        """The steps that have a folder, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(child.name) for child in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, files: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Begin to write a checkpoint, once the one before is written, and delete those that are too old.

        All processes call this. It returns when all tensors are copied to the CPU's memory; `wait` says whether they
        have reached the disk.

        Args:
            step: number of finished steps.
            files: file name -> tensors, numbers, text, and lists and dicts of these. Those of the first process count.
            tensors: name -> tensor. A DTensor is written in its parts.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        group = self._group
        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged = cast(dict[str, Tensor], stager.stage({name: t.contiguous() for name, t in tensors.items()}))
        stager.close()
        self._pending = self._writer.submit(self._write, step, files, staged, group)

    def wait(self) -> None:
        """Return when what `save` began is on the disk.

        Raises:
            CheckpointError: the disk is full or failing; earlier checkpoints are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """At its end, what `save` began is on the disk. Raises CheckpointError where nothing else went wrong."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(CheckpointError):
                self.wait()
            raise
        self.wait()

    def _write(
        self, step: int, files: dict[str, Any], tensors: dict[str, Tensor], group: dist.ProcessGroup | None
    ) -> None:
        partial = None
        first = dist.get_rank(group) == 0 if group else True
        try:
            partial = from_first(lambda: self._begin(step, files), group)
            checkpoint.save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                process_group=group,
                no_dist=group is None,
            )
            if first:
                self._publish(step, partial)
        except (OSError, RuntimeError, CheckpointException) as error:
            # torch.save reports a failed write as a RuntimeError.
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            last = self.steps()
            kept = f"the last good one is at step {last[-1]}" if last else "there is none before it"
            why = _first_reason(error)
            raise CheckpointError(f"the checkpoint at step {step} could not be written ({why}); {kept}") from error

    def _begin(self, step: int, files: dict[str, Any]) -> Path:
        """A new folder for a checkpoint, with all of it that is small.

        Its name is its own: what outlives a killed run for a moment must not write into, or delete, what the next one
        writes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = self.folder / f".partial-{step:09d}-{secrets.token_hex(4)}"
        partial.mkdir()
        try:
            for name, content in files.items():
                torch.save(content, partial / name)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return partial

    def _publish(self, step: int, partial: Path) -> None:
        """Give a folder whose files are written its manifest and its name."""
        target = self.folder / f"step-{step:09d}"
        manifest = {}
        for path in sorted(partial.iterdir()):
            _flush(path)
            manifest[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        write_atomically(partial / _MANIFEST, json.dumps({"step": step, "files": manifest}, indent=1))
        _flush(partial)
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
        _flush(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{old:09d}", ignore_errors=True)

    def check(self, step: int) -> str | None:
        """Why the checkpoint at `step` cannot be used; None when it is whole."""
        folder = self.folder / f"step-{step:09d}"
        try:
            manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
            for name, facts in manifest["files"].items():
                path = folder / Path(name).name
                if path.stat().st_size != facts["bytes"]:
                    return f"{path} has {path.stat().st_size} bytes instead of {facts['bytes']}"
                if sha256(path) != facts["sha256"]:
                    return f"{path} does not match its hash"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{folder} is not whole: {error}"
        return None

    def load(self) -> tuple[int, dict[str, Any], list[str]]:
        """The newest checkpoint that is whole, without its tensors. All processes call this, and the first one reads.

        Returns:
            step (0 when there is none), file name -> content, and a line for each newer one that had to be passed over.

        Raises:
            CheckpointError: one that is whole holds what is not data.
        """
        return from_first(self._newest, self._group)

    def _newest(self) -> tuple[int, dict[str, Any], list[str]]:
        passed_over = []
        for step in reversed(self.steps()):
            if problem := self.check(step):
                passed_over.append(problem)
                continue
            folder = self.folder / f"step-{step:09d}"
            names = json.loads((folder / _MANIFEST).read_text("utf-8"))["files"]
            small = [Path(name).name for name in names if not name.endswith(".safetensors")]
            return step, {name: load_data(folder / name) for name in small}, passed_over
        return 0, {}, passed_over

    def fill(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint's tensors into these, in place. All processes call this.

        Args:
            step: of a checkpoint that is whole.
            tensors: name -> tensor, as `save` was given it, whole or in other parts than then.

        Raises:
            CheckpointError: it lacks one of these, or one has another shape there.
        """
        folder = self.folder / f"step-{step:09d}"
        try:
            checkpoint.load(
                dict(tensors),
                storage_reader=HuggingFaceStorageReader(str(folder)),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (OSError, ValueError, SafetensorError, CheckpointException) as error:
            raise CheckpointError(f"{folder} cannot be read: {_first_reason(error)}") from error

    def clear(self) -> None:
        """Delete all checkpoints; called when the stage is finished and its result is on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
