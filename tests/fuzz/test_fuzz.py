"""The targets of `make fuzz` hold in a few fixed cases, and their cases survive being printed."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from linmu_ops import _registry
from tests.fuzz import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_cases(name):
    cases, check = TARGETS[name]

    @given(cases)
    @settings(
        max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )  # fmt: skip
    def run(case):
        check(json.loads(json.dumps(case)))

    run()


def test_every_op_is_a_target():
    assert set(_registry.OPS) <= set(TARGETS)
