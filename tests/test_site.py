"""The site of docs/ (`make docs`) shows every page, and a page of every op."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from linmu_ops import _registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_each_page_has_a_place():
    nav = re.findall(r"[\w/]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert {page for page in nav if not page.startswith("repo/")} == pages
    assert len(nav) == len(set(nav))


@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_each_op_has_a_page(op):
    assert f"::: linmu_ops.{op}\n" in (DOCS / "ops" / f"{op}.md").read_text()
