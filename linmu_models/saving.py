"""Folders that a process may leave at any instant: what is in them is whole, or is not taken for a model."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_CONFIG = "config.json"
# What transformers reads weights from: those that are left from a model before may be read in place of the new ones.
_WEIGHTS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_PARTIAL = ".partial-"


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, at most until the process ends; without `wait`, yields whether it was free."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield True
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(folder)


@contextlib.contextmanager
def whole_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to save a model in. At the end its files are moved to `out`, in place of a model that was there.

    config.json is the first file to go and the last one to come, and without it a folder holds no model: whenever the
    process is killed, `out` has the old model, none, or the new one. Until the new one is complete the old one stays.

    Raises:
        OSError: another process saves a model there, or it cannot be written to.
    """
    target = Path(out)
    is_new = not target.exists()
    with locked(target, wait=False) as mine:
        if not mine:
            raise OSError(f"another process is at work in {target}")
        for stale in target.glob(f"{_PARTIAL}*"):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=target, ignore_cleanup_errors=True) as partial:
                yield Path(partial)
                _move(Path(partial), target)
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):
                    target.rmdir()
            raise


def _move(source: Path, target: Path) -> None:
    (target / _CONFIG).unlink(missing_ok=True)
    for old in {path for pattern in _WEIGHTS for path in target.glob(pattern)}:
        old.unlink()
    files = [path for path in source.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda path: path == source / _CONFIG):
        moved = target / file.relative_to(source)
        moved.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, moved)
