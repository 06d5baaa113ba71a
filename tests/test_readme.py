"""The README's Python runs, block after block, as a newcomer would paste it."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_readme_runs(tmp_path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(blocks) >= 3
    scope: dict = {}
    for block in blocks:
        exec(compile(block.replace("/tmp/linmu-student", str(tmp_path)), str(README), "exec"), scope)
    assert scope["y"].shape == (2, 1000, 8, 64)
    assert "copied" in capsys.readouterr().out
