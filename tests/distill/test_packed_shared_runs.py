"""Whole runs on rows of several samples, which processes share: killed in each stage, they are the run of one."""

import pytest
import record_sets
from training import curve, killed_in_each_stage

from linmu_distill.run import distill

STEPS = {f"stage{number}": {"steps": 4} for number in (1, 2, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return record_sets.write(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    done = record_sets.packed_config(folder, tmp_path_factory.mktemp("one"), **STEPS)
    distill(done)
    return done


@pytest.mark.sweep
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_packed_rows_are_shared(folder, one, tmp_path, parallel):
    """Pictures and text; each sample of a row is alone, wherever the row is cut."""
    two = record_sets.packed_config(folder, tmp_path, parallel=[parallel, 2], **STEPS)
    killed_in_each_stage(two, 2)
    assert (two.folder / "report.md").exists()
    for number in (1, 2, 3):
        ours, theirs = (curve(c.folder / f"stage{number}") for c in (two, one))
        assert len(ours) == 4 and all(step["padding"] == 0 for step in ours)
        for mine, its in zip(ours, theirs, strict=True):
            # A divergence of equal logits is what rounding makes of 0.
            assert mine == pytest.approx(its, rel=1e-3, abs=1e-6)
