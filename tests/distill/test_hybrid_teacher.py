"""A whole run on a random Qwen3.5, half of whose layers are linear already."""

import json

from small_run import run_values, save_hybrid

from linmu_distill.config import parse_config
from linmu_distill.run import distill


def test_a_hybrid_is_distilled_and_evaluated(tmp_path):
    teacher = save_hybrid(tmp_path / "teacher")
    tasks = dict(data={"batch_size": 2, "mixture": {"where": 1}},
                 evaluation={"samples": {"where": 2}, "speed_lengths": []})  # fmt: skip
    config = parse_config(run_values(tmp_path, teacher, preset="exact", **tasks))
    report = distill(config).read_text()
    assert "1 of 1 attention layers" in report
    rows = json.loads((config.folder / "transfer.json").read_text())
    assert rows["linear_layers"] == [1] and not rows["kept_layers"]
    losses = [json.loads(line) for line in (config.folder / "stage3" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
