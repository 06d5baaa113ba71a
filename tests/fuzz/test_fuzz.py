"""The targets of `make fuzz` hold in a few fixed cases, and their cases survive being printed."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from linmu_ops import _registry
from tests.fuzz import TARGETS, laws


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


# Of its first output cancellation leaves three digits fewer than its terms have, and a NaN changes the order of sums.
CANCELS = {
    "seed": 119, "dtype": "float32", "mixed": {}, "threads": 1, "B": 1, "L": 2, "heads": [1, 1, 1, 1], "P": 2, "N": 5,
    "direction": "forward", "options": [], "chunk_size": None, "manners": {},
    "hidden": {"at": 0, "junk": 0, "seed": 0},
}  # fmt: skip


@pytest.mark.parametrize("leak", [0, 1e-5])
def test_what_leaks_is_told_from_rounding(leak, monkeypatch):
    before = laws.outputs

    def leaking(op, inputs, options, impl="cpu"):
        out = before(op, inputs, options, impl)
        return out + leak * inputs["x"].isnan().any() if impl == "cpu" else out

    monkeypatch.setattr(laws, "outputs", leaking)
    with pytest.raises(AssertionError, match="saw what is hidden") if leak else nullcontext():
        laws.ssd_scan_unseen(CANCELS)
