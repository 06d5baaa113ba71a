"""The page of `linmu demo` with the shipped teacher and the student that conversion makes of it, untrained."""

from __future__ import annotations

import pytest

import linmu_models
from linmu_models.generate import load


@pytest.fixture(scope="session")
def pair():
    from served import TEACHER

    from linmu_models.demo.pair import Pair, Side

    model, processor = load(TEACHER, "cpu")
    student = linmu_models.convert(model).eval()
    return Pair(Side("teacher", "a teacher", model, processor), Side("student", "a student", student, processor), 12)


@pytest.fixture(scope="module")
def page(pair, tmp_path_factory):
    from served import Served

    served = Served(pair, tmp_path_factory.mktemp("uploads"))
    yield served
    served.close()
