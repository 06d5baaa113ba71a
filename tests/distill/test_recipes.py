"""Recipes other than the table's: skipped stages, other parameters, layers that keep attention, LoRA on blocks."""

import json
import re
from itertools import pairwise

import pytest
import torch
from small_run import run_values, save_teacher
from transformers import AutoModelForImageTextToText

from bench.runs.rivals import RivalRun
from bench.runs.table import Row
from linmu_distill import handoff
from linmu_distill.config import ConfigError, parse_config
from linmu_distill.run import Run, RunError, distill
from linmu_distill.student import trainable_parameters
from linmu_ops import LinmuWarning

NO_SPEED = {"samples": {"where": 2}, "speed_lengths": []}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def _states(config):
    run = Run(config)
    return [handoff.load_result(config.folder, i, run.teacher_hash, config)[0] for i in range(4)]


def _changed(before, after):
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def test_lora_alone_on_blocks_beside_kept_attention(teacher, tmp_path):
    """LIGER's way, which a row of a table may go: LoRA on the projections of the new blocks learns the answers."""
    config = parse_config(
        run_values(
            tmp_path, teacher, evaluation=NO_SPEED, student={"keep_attention": [-1], "text_window": 4},
            stage1={"steps": 0}, stage2={"steps": 0},
            stage3={"steps": 2, "learning_rate": 1e-2, "losses": {"supervised": 1}},
        )
    )  # fmt: skip
    run = RivalRun(config, Row(name="liger", lora_alone=r".*self_attn\.(scan|windows)\.[cbxqkv]_proj"))
    run.prepare()
    for number in (1, 2, 3):
        run.train(number)
    before, *_, after = _states(config)
    changed = _changed(before, after)
    assert changed and all(".scan." in name or ".windows." in name for name in changed)
    assert all("layers.0.self_attn" in name and ".lora_" in name for name in changed)
    saved = AutoModelForImageTextToText.from_pretrained(run.export()).eval()
    assert saved.config.linmu["keep_attention"] == [1]
    ids = torch.arange(20, 30)[None]
    ours = run.student_after(3).model
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_windows_that_no_text_looks_at_learn_nothing_from_answers(teacher, tmp_path):
    """Local-Swin alone, without a window of text: text sees no picture, and LoRA is what stage 3 trains."""
    student = {"branches": "swin", "text_window": 0}
    stages = {"stage1": {"steps": 0}, "stage2": {"steps": 2}, "stage3": {"steps": 2, "learning_rate": 1e-2}}
    config = parse_config(run_values(tmp_path, teacher, student=student, evaluation=NO_SPEED, **stages))
    distill(config)
    _, _, second, third = _states(config)
    assert _changed(second, third) == {name for name in third if ".lora_" in name}
    # A layer that keeps its attention shows the text what the windows below it make of a picture.
    kept = parse_config(run_values(tmp_path, teacher, student={**student, "keep_attention": [1]}, **stages))
    found = Run(kept).fresh_student(lora=True)
    trained = trainable_parameters(found.model, found.blocks, kept.stage(3))
    assert any("layers.0.self_attn.windows" in name for name in trained)


def test_exact_near_and_learnt_far(teacher, tmp_path):
    """The default: what makes the windows exact stays, the scan and its share learn, and Local-Swin is never off."""
    frozen = [r"self_attn\.o_proj", r"windows\.[qkv]_", r"scan\.dt_"]
    config = parse_config(
        run_values(
            tmp_path, teacher, preset="exact", evaluation=NO_SPEED,
            data={"batch_size": 2, "mixture": {"video": 1}},
            student={
                "text_window": 4, "sink_tokens": 2, "kept_tokens": 0, "window": [2, 2, 2], "image_window": [1, 2, 2]
            },
            **{f"stage{i}": {"steps": 2, "learning_rate": 1e-2} for i in (1, 2, 3)},
        )
    )  # fmt: skip
    distill(config)
    initial, first, second, third = _states(config)
    assert any(".scan." in name for name in _changed(initial, first))
    assert not any(".windows." in name or ".share." in name for name in _changed(initial, first))
    assert any(".share." in name for name in _changed(first, second))
    assert not any(re.search("|".join(frozen), name) for name in _changed(initial, third))
    run, saved = Run(config), AutoModelForImageTextToText.from_pretrained(config.folder / "student").eval()
    ids = torch.arange(20, 36)[None]
    ours = run.student_after(3).model
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        fresh, theirs = (m(input_ids=ids).logits[0] for m in (run.student_after(0).model, run.teacher))
    torch.testing.assert_close(fresh[:7], theirs[:7], rtol=1e-4, atol=1e-4)  # until 4 tokens leave a window of 4
    assert not torch.allclose(fresh[7:], theirs[7:], rtol=1e-2, atol=1e-2)
    assert "Text sees the last 4 tokens" in (config.folder / "report.md").read_text()


def test_blocks_alone_then_logits(teacher, tmp_path):
    """Near mmMamba's way: blocks by their outputs, twice, then all of them by the teacher's probabilities."""
    config = parse_config(
        run_values(
            tmp_path, teacher, evaluation={"samples": 0, "speed_lengths": []},
            student={"branches": "flex", "reverse": False, "head_norm": True},
            stage1={"steps": 2, "losses": {"block": 1}}, stage2={"steps": 2, "losses": {"block": 1}},
            stage3={"steps": 2, "losses": {"token": 1}},
        )
    )  # fmt: skip
    distill(config)
    states = _states(config)
    for before, after in pairwise(states):
        assert any("scan.c_proj" in name for name in _changed(before, after))
    assert (config.folder / "student/config.json").exists()


def test_within_the_windows_nothing_is_learnt_and_that_is_said(teacher, tmp_path):
    config = parse_config(run_values(tmp_path, teacher, preset="exact", evaluation=NO_SPEED))
    with pytest.warns(LinmuWarning, match=r"stage 1: nothing that was looked at lay beyond the windows.*\.layers\.0\."):
        distill(config)
    told = [json.loads(line) for line in (config.folder / "stage1/metrics.jsonl").read_text().splitlines()]
    assert all(record["hidden"] < 1e-6 for record in told)


def test_nothing_trained_is_the_calibrated_start(teacher, tmp_path):
    config = parse_config(run_values(tmp_path, teacher, evaluation=NO_SPEED,
                                     **{f"stage{i}": {"steps": 0} for i in (1, 2, 3)}))  # fmt: skip
    distill(config)
    before, *_, after = _states(config)
    assert not _changed(before, after)
    assert "losses.png" not in (config.folder / "report.md").read_text()


def test_a_recipe_that_ends_without_local_swin_is_refused():
    values = {"output": "x", "preset": "paper", "teacher": "t", "stage2": {"steps": 0}, "stage3": {"steps": 0}}
    with pytest.raises(ConfigError, match=r"student\.branches must be 'flex' where only stage 1 has steps"):
        parse_config(values)
    assert parse_config({**values, "student": {"branches": "flex"}}).stage(2).steps == 0
    assert parse_config({**values, "preset": "exact"}).stage(2).steps == 0  # its windows are never off


def test_what_cannot_work_is_found_before_anything_is_made(teacher, tmp_path):
    values = run_values(tmp_path, teacher)
    run = Run(parse_config({**values, "student": {"keep_attention": [99]}}))
    with pytest.raises(RunError, match=r"keep_attention must hold layers in \[-2, 2\), got 99"):
        run.check_stages()
    with pytest.raises(RunError, match=r"keep_attention"):
        distill(run.config)
    assert not (run.folder / "stage0").exists()
    with pytest.raises(ConfigError, match="stage1 trains nothing: it has no trainable parameter"):
        Run(parse_config({**values, "student": {"branches": "swin"}})).check_stages()


def test_fingerprints_follow_the_recipe():
    values = {"output": "x", "teacher": "t"}
    plain = parse_config(values).fingerprint(3)
    for change in ({"lora_rank": 4}, {"preset": "paper"}, {"student": {"keep_attention": [0]}}):
        assert parse_config({**values, **change}).fingerprint(3) != plain
