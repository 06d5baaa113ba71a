"""Whole runs of several processes, one of which dies in each stage, are the run of one."""

import pytest
from small_run import run_values, save_teacher
from training import curve, killed_in_each_stage

from linmu_distill.config import parse_config
from linmu_distill.run import distill

STEPS = 4


@pytest.mark.sweep
@pytest.mark.parametrize(
    "processes, parallel, preset, context",
    [
        (2, "ddp", "paper", 1), (2, "fsdp", "exact", 1), (4, "ddp", "exact", 1), (4, "fsdp", "paper", 1),
        (2, "ddp", "exact", 2), (2, "ddp", "paper", 2), (4, "fsdp", "exact", 2), (4, "ddp", "exact", 2),
    ],
)  # fmt: skip
def test_a_run_with_a_kill_in_each_stage_is_the_run_of_one(tmp_path, processes, parallel, preset, context):
    """context: so many processes share each row."""
    # Little is near, so that something is far, and learns.
    near = {"window": [1, 2, 2], "text_window": 16, "kept_tokens": 4} if preset == "exact" else {}
    changes = dict(
        preset=preset, student=near, evaluation={"samples": 0, "speed_lengths": []},
        **{f"stage{number}": {"steps": STEPS} for number in (1, 2, 3)},
    )  # fmt: skip
    teacher = save_teacher(tmp_path / "teacher")
    one = parse_config(run_values(tmp_path / "one", teacher, gradient_accumulation=processes // context, **changes))
    distill(one)
    config = parse_config(run_values(tmp_path / "more", teacher, parallel=[parallel, context], **changes))

    killed_in_each_stage(config, processes)
    assert (config.folder / "report.md").exists()
    for number in (1, 2, 3):
        ours, theirs = (curve(c.folder / f"stage{number}") for c in (config, one))
        assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
        for mine, its in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(its, rel=1e-3)
