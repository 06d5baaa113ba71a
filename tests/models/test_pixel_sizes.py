"""Pixels without the sizes that their processor passes beside them are refused in one line, by any family."""

from __future__ import annotations

import contextlib

import pytest
import torch

import linmu_models

from . import tiny

CASES = [(family, kind) for family in tiny.EVERY for kind in ("image", "video") if tiny.example(family, kind)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_each_input_beside_the_pixels(family, kind):
    student, batch = linmu_models.convert(tiny.teacher(family)), tiny.example(family, kind)
    needed = {name for names in student.sizes_of_pixels.values() for name in names}
    for name in set(batch) - {"input_ids", "attention_mask"}:
        rest = {k: v for k, v in batch.items() if k != name}
        if name not in needed:
            # transformers' own words; 5.23 has none for LFM2-VL without its mask
            with contextlib.suppress(ValueError, AttributeError), torch.no_grad():
                student(**rest)
            continue
        words = f"^linmu: {name} must be given with pixel_values.*, got None$"
        with pytest.raises(ValueError, match=words), torch.no_grad():
            student(**rest)
        with pytest.raises(ValueError, match=words):
            student.generate(**rest, max_new_tokens=2)
