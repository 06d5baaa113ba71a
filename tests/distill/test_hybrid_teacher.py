"""A whole run on a random Qwen3.5, three of whose four layers are linear already: the way that its page shows."""

import json
import re
import tomllib
from pathlib import Path

from linmu_distill.config import parse_config
from linmu_distill.run import distill

PAGE = Path(__file__).parents[2] / "docs" / "hybrids.md"


def test_a_hybrid_is_distilled_and_evaluated(tmp_path):
    page = PAGE.read_text().replace("/tmp/linmu-", f"{tmp_path}/")
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    sizes = re.search(r"^sizes = .*?\)$", first, re.DOTALL | re.MULTILINE)
    exec(f"{sizes.group()}\n{second}", {})
    (values,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    config = parse_config(tomllib.loads(values))
    report = distill(config).read_text()
    assert "1 of 1 attention layers" in report
    rows = json.loads((config.folder / "transfer.json").read_text())
    assert rows["linear_layers"] == [3] and not rows["kept_layers"]
    losses = [json.loads(line) for line in (config.folder / "stage3" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert (config.folder / "student" / "model.safetensors").exists()
