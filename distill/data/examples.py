"""Pictures and clips of the built-in tasks, for the page of `linmu demo`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

from linmu_models.media import Clip

from .tasks import generate

# Title, group, seed, frames of a needle.
CHOSEN = (
    ("A page", "line", 3, None),
    ("A moving digit", "video", 3, None),
    ("A needle in 16 frames", "needle", 3, 16),
    ("A needle in 64 frames", "needle", 5, 64),
)


def examples() -> Iterator[tuple[str, str, Clip]]:
    """(title, question, pixels) of each; the teacher of the demo can answer them.

    Those with handwritten digits are left out where scikit-learn is not installed, which has the digits.
    """
    digits = find_spec("sklearn") is not None
    for title, group, seed, frames in CHOSEN:
        if group != "line" and not digits:
            continue
        options: dict[str, Any] = {} if frames is None else {"frames": (frames, frames)}
        sample = generate(group, 1, seed, "test", **options)[0]
        pixels = np.repeat(sample.frames[..., None], 3, axis=-1)
        yield title, sample.turns[0][0], Clip(pixels, 2.0 if sample.is_video else None)
