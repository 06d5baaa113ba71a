"""What tests of several files need."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from .folders import save_llava


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of `teacher`, with its processor, and `picture.png`."""
    folder = tmp_path_factory.mktemp("cli")
    save_llava(folder / "teacher")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder
