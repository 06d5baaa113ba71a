"""Linear vision-language models for transformers.

    convert(teacher)    makes a loaded model of transformers linear
    convert_nvila(...)  does the same for NVILA, which is not a part of transformers
    families()          lists the model types that can be converted
    fast_decode()       gives options of `generate` that compile the step of one token
    load_cache(path, model)    reopens a prompt that was read before
    int8_weights(model) holds a model's weights in 8 bits, to decode faster on a CPU
    accelerate_transformers()  lets transformers' own linear layers run on our kernels

Import this package before you load a saved LinMU model: it makes them known to transformers' Auto classes.
"""

import sys
from pathlib import PurePath
from typing import Any


def _is_the_command() -> bool:
    """Whether this process is the command `linmu`. Its help needs nothing of this, and whatever goes wrong while it is
    imported, Ctrl-C too, shall be told in one line."""
    program = PurePath((sys.argv or [""])[0]).name
    return program in ("linmu", "linmu.exe") or (program == "-m" and "linmu_models.cli" in sys.orig_argv)


if not _is_the_command():
    from ._api import *  # noqa: F403  what `__all__` lists
    from ._api import __all__ as __all__


def __getattr__(name: str) -> Any:
    """What was left out, where it is asked for all the same."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _api

    globals().update({known: getattr(_api, known) for known in _api.__all__})
    if name not in _api.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
