"""What other libraries raise over the files of a model's folder, told in one line."""

from __future__ import annotations

import contextlib
import logging
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

from linmu_ops import LinmuWarning

_LONGEST = 300


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Make a ValueError of one line, which begins with `what`, of what is raised while this is open.

    transformers, tokenizers, safetensors and Jinja raise anything over files that people edited or that were cut:
    KeyError, AttributeError, bare Exception. What already says it in one line stays as it is, and what is not about the
    files (OSError, ImportError).
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{what}: its weights are more than tensors, and no code of theirs is run") from error
    except Exception as error:
        if type(error) is ValueError and "\n" not in str(error).strip():
            raise
        raise ValueError(f"{what}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """An error's name and words, without line breaks."""
    words = " ".join(str(error).split())
    words = words if len(words) <= _LONGEST else words[:_LONGEST] + "..."
    return words if type(error) is ValueError else f"{type(error).__name__}: {words}".removesuffix(": ")


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Keep transformers' table of the tensors that did not fit, which is many lines, to itself while this is open."""
    logger, filter_ = logging.getLogger("transformers.modeling_utils"), _NoReport()
    logger.addFilter(filter_)
    try:
        yield
    finally:
        logger.removeFilter(filter_)


class _NoReport(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


def check_weights(folder: str, found: dict[str, Any], linear: bool) -> None:
    """Raise ValueError where a folder's weights are not those of the model that its config.json describes.

    Args:
        found: what `from_pretrained` tells with `output_loading_info`.
        linear: it is a student, whose folder holds its own weights and nothing else. Of another model, tensors that are
            not there are warned of.
    """
    differing = sorted(found.get("mismatched_keys") or (), key=str)
    if differing:
        name, *sizes = differing[0]
        there, wanted = (tuple(size) for size in sizes)
        raise ValueError(f"{folder}: its weights do not fit its config.json: {name} must be {wanted}, got {there}")
    missing, unexpected = (sorted(found.get(keys) or ()) for keys in ("missing_keys", "unexpected_keys"))
    lacking = f"{folder}: its weights lack {missing[0]}, one of {len(missing)} tensors" if missing else ""
    if missing and not linear:
        warnings.warn(f"{lacking}, which start at random", LinmuWarning, 3)
    elif missing:
        raise ValueError(lacking)
    if unexpected and linear:
        raise ValueError(
            f"{folder}: the model of its config.json has no place for {unexpected[0]}, one of {len(unexpected)} tensors"
        )
