"""The Python of README and of the pages in docs/ runs, block after block, as a newcomer would paste it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(page, tmp_path):
    scope: dict = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block.replace("/tmp/linmu-student", str(tmp_path)), str(page), "exec"), scope)
    return scope


@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: str(p.relative_to(ROOT))
)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # README loads the teacher of the checkout
    run(page, tmp_path)


def test_readme_shows_all_it_offers(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    scope = run(ROOT / "README.md", tmp_path)
    assert scope["y"].shape == (2, 1000, 8, 64)
    assert type(scope["student"]).__name__.startswith("Linmu")
    assert (tmp_path / "model.safetensors").exists()
