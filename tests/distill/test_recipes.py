"""Recipes other than the table's: skipped stages, other parameters, layers that keep attention, LoRA on blocks."""

import json
import re

import pytest
import torch
from small_run import run_values, save_teacher
from transformers import AutoModelForImageTextToText

from linmu_distill import handoff
from linmu_distill.config import ConfigError, parse_config
from linmu_distill.run import Run, RunError, distill
from linmu_ops import LinmuWarning

NO_SPEED = {"samples": {"where": 2}, "speed_lengths": []}
BUT_LORA = r"^(?!.*\.lora_)"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def _states(config):
    run = Run(config)
    return [handoff.load_result(config.folder, i, run.teacher_hash, config)[0] for i in range(4)]


def _changed(before, after):
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def test_lora_alone_on_blocks_beside_kept_attention(teacher, tmp_path):
    """LIGER's way: nothing is distilled, LoRA on the projections of the new blocks learns the answers."""
    config = parse_config(
        run_values(
            tmp_path, teacher, evaluation=NO_SPEED, student={"keep_attention": [-1], "text_window": 4},
            lora={"target": r".*self_attn\.(scan|windows)\.[cbxqkv]_proj"}, stage1={"steps": 0}, stage2={"steps": 0},
            stage3={"steps": 2, "learning_rate": 1e-2, "freeze": [BUT_LORA], "losses": {"supervised": 1}},
        )
    )  # fmt: skip
    distill(config)
    before, *_, after = _states(config)
    changed = _changed(before, after)
    assert changed and all(".scan." in name or ".windows." in name for name in changed)
    assert all("layers.0.self_attn" in name and ".lora_" in name for name in changed)
    assert list(json.loads((config.folder / "evaluation.json").read_text())) == ["teacher", "initial", "stage 3"]
    run, saved = Run(config), AutoModelForImageTextToText.from_pretrained(config.folder / "student").eval()
    assert saved.config.linmu["keep_attention"] == [1]
    ids = torch.arange(20, 30)[None]
    ours = run.student_after(3).model
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert rf"LoRA, without `{BUT_LORA}` | " in (config.folder / "report.md").read_text()


def test_exact_near_and_learnt_far(teacher, tmp_path):
    """The default: what makes the windows exact stays, the scan and its share learn, and Local-Swin is never off."""
    frozen = [r"self_attn\.o_proj", r"windows\.[qkv]_"]
    config = parse_config(
        run_values(
            tmp_path, teacher, preset="exact", evaluation=NO_SPEED,
            data={"batch_size": 2, "mixture": {"video": 1}},
            student={"text_window": 4, "sink_tokens": 2, "window": [2, 2, 2], "image_window": [1, 2, 2]},
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
    torch.testing.assert_close(fresh[:6], theirs[:6], rtol=1e-4, atol=1e-4)  # 4 tokens and 2 sinks
    assert not torch.allclose(fresh[6:], theirs[6:], rtol=1e-2, atol=1e-2)
    assert "text is the last 4 tokens" in (config.folder / "report.md").read_text()


def test_blocks_alone_without_lora(teacher, tmp_path):
    """mmMamba's way: what is new first, then whole blocks by their outputs, then the logits."""
    config = parse_config(
        run_values(
            tmp_path, teacher, evaluation={"samples": 0, "speed_lengths": []},
            student={"branches": "flex", "reverse": False, "head_norm": True},
            stage1={"steps": 2, "losses": {"block": 1}, "freeze": [r"scan(\.[cbx]|_o)_p"]},
            stage2={"steps": 2, "losses": {"block": 1}},
            stage3={"steps": 2, "losses": {"token": 1}, "freeze": [r"\.lora_"]},
        )
    )  # fmt: skip
    distill(config)
    states = _states(config)
    assert not any("_proj" in n and "dt_proj" not in n for n in _changed(states[0], states[1]))
    assert any("c_proj" in n for n in _changed(states[1], states[2]))
    assert any(".scan." in n for n in _changed(states[2], states[3]))
    assert all((states[3][n] == 0).all() for n in states[3] if ".lora_B" in n)
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
    values = {"name": "x", "preset": "paper", "teacher": {"path": "t"}, "stage2": {"steps": 0}, "stage3": {"steps": 0}}
    with pytest.raises(ConfigError, match=r"student\.branches must be 'flex' where only stage 1 has steps"):
        parse_config(values)
    assert parse_config({**values, "student": {"branches": "flex"}}).stage(2).steps == 0
    assert parse_config({**values, "preset": "exact"}).stage(2).steps == 0  # its windows are never off


def test_a_recipes_patterns_may_match_nothing_others_may_not(teacher, tmp_path):
    """And what cannot work is found before the first stage, not after it."""
    values = run_values(tmp_path, teacher, preset="exact", student={"text_window": 4, "window": [2, 2, 2]})
    Run(parse_config({**values, "stage3": {"steps": 2, "freeze": [BUT_LORA]}})).check_stages()
    run = Run(parse_config({**values, "stage3": {"steps": 2, "freeze": ["nonsense"]}}))
    with pytest.raises(ConfigError, match=r"stage3\.freeze: 'nonsense' matches no trainable parameter"):
        run.check_stages()
    with pytest.raises(ConfigError, match=r"stage3\.freeze"):  # before anything is made
        distill(run.config)
    assert not (run.folder / "stage0").exists()
    alone = {
        **values,
        "preset": "paper",
        "student": {"branches": "flex"},
        "stage2": {"steps": 2, "freeze": [".*"]},
    }
    with pytest.raises(ConfigError, match="stage2 trains nothing: it has no trainable parameter"):
        Run(parse_config(alone)).check_stages()
    with pytest.raises(ConfigError, match=r"lora\.target: 'x' matches no linear layer"):
        Run(parse_config({**values, "lora": {"target": "x"}})).check_stages()
    paper = {**values, "preset": "paper", "student": {}}
    with pytest.raises(RunError, match=r"keep_attention must hold layers in \[-2, 2\), got 99"):
        Run(parse_config({**paper, "student": {"keep_attention": [99]}})).check_stages()


def test_fingerprints_follow_the_recipe():
    values = {"name": "x", "teacher": {"path": "t"}}
    plain = parse_config(values).fingerprint(3)
    for change in ({"stage3": {"freeze": ["lora_"]}}, {"student": {"keep_attention": [0]}}):
        assert parse_config({**values, **change}).fingerprint(3) != plain
