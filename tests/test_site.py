"""The site of docs/ (`make docs`) shows every page, and a page of every op."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml

from linmu_ops import _registry
from tools.docs import families, pictures, speed
from tools.docs import messages as read
from tools.docs.messages import GAP, messages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_each_page_has_a_place():
    nav = re.findall(r"[\w/]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert {page for page in nav if not page.startswith("repo/")} == pages
    assert len(nav) == len(set(nav))


def slugs(page):
    """The anchors of a page's headings, as the site makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    words = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in words}


def test_each_docstring_that_a_page_asks_for_is_there():
    asked = [
        name for page in DOCS.rglob("*.md") for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
    ]
    assert len(asked) > 20
    for name in asked:
        module, _, member = name.rpartition(".")
        assert getattr(importlib.import_module(module), member).__doc__, name


def test_each_anchor_is_a_heading():
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "distill" / "README.md"]
    found = 0
    for page in pages:
        for target, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text()):
            there = page.parent / target if target else page
            found += 1
            assert anchor in slugs(there), f"{page.relative_to(ROOT)}: {target}#{anchor}"
    assert found > 10


@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_each_op_has_a_page(op):
    assert f"::: linmu_ops.{op}.{op}\n" in (DOCS / "ops" / f"{op}.md").read_text()


def rows_of_messages():
    """{row: pattern} of docs/troubleshooting.md, and the rows that are under Warnings."""
    page = (DOCS / "troubleshooting.md").read_text()
    rows = [double or single for double, single in re.findall(r"^\| (?:`` (.*?) ``|`(.*?)`) \|", tidy(page), re.M)]
    warned = page[page.index("## Warnings") : page.index("## Errors that say")]
    return {row: re.compile(".*".join(map(re.escape, row.split(GAP))), re.DOTALL) for row in rows}, warned


def tidy(page):
    return re.sub(r"`` ?(.*?) ?``", r"`` \1 ``", page)


@pytest.fixture(scope="module")
def found():
    return list(messages())


def test_each_message_that_a_user_can_meet_is_explained(found):
    rows, warned = rows_of_messages()
    found = [message for message in found if not message.explains_itself]
    assert sum(message.is_warning for message in found) >= 10 and len(found) > 100
    for message in found:
        mine = [row for row, pattern in rows.items() if pattern.fullmatch(message.text)]
        assert mine, f"docs/troubleshooting.md needs a row: {message}"
        assert not message.is_warning or any(f"`{row}`" in warned for row in mine), f"under Warnings: {message}"


def test_no_explained_message_is_out_of_date(found):
    texts = [message.text for message in found]
    rows, _ = rows_of_messages()
    for row, pattern in rows.items():
        assert any(pattern.fullmatch(text) for text in texts), row
        assert len(re.findall(r"\w{3,}", row)) or row == "… needs …, got …", f"{row} says too little"


def test_a_message_of_each_kind_is_read(tmp_path, monkeypatch):
    """By every way in which the source tells a user something."""
    source = """
def size(kind):
    return ValueError(f"{kind} is far too large")
def fail(n):
    why = "is bad" if n else "is worse"
    raise RuntimeError(f"step {n} {why} today")
def other(why):
    raise TypeError(where(f"it {why} not work"))
def slow():
    warnings.warn("this is " "slow", stacklevel=2)
    warn_once("key", f"{slow} runs in numpy")
    stop("the end of it")
    raise KeyError
"""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "file.py").write_text(source)
    monkeypatch.setattr(read, "ROOT", tmp_path)
    monkeypatch.setattr(read, "PACKAGES", ("package",))
    assert {(m.is_warning, m.text) for m in messages()} == {
        (False, "… is far too large"),
        (False, "step … is bad today"),
        (False, "step … is worse today"),
        (False, "…it … not work…"),
        (True, "this is slow"),
        (True, "… runs in numpy"),
        (False, "the end of it"),
    }


def test_the_table_of_families_is_what_the_command_lists():
    page = families.PAGE.read_text()
    assert families.parts(page)[1] == families.table(), "python -m tools.docs.families"


def test_the_table_of_speed_is_that_of_the_report():
    inside = speed.parts(speed.PAGE.read_text())[1]
    assert inside == speed.table(speed.REPORT.read_text()), "python -m tools.docs.speed"
    case = "**ssd_step · batch 1 · float32**  (commit 1)\n\n| implementation | times best peer |\n|---|---|\n"
    slow = case + "| linmu cpu | 40.1 | 0.50 |\n| eager | 20.1 | 1.00 |\n| slow | 30.1 | 0.70 |\n"
    assert speed.cases(slow) == {"ssd_step": [(0.5, "batch 1 · float32", "eager")]}
    assert "| 0.50 to 0.50 | eager | batch 1 · float32: 0.5 |" in speed.table(slow)


@pytest.mark.parametrize("name", [*sorted(_registry.OPS), "layouts"])
def test_each_op_has_a_picture_of_what_it_computes(name):
    assert f"]({name}.svg)" in (DOCS / "ops" / f"{name}.md").read_text()
    drawn = pictures.svg(name)
    assert (DOCS / "ops" / f"{name}.svg").read_text() == drawn, "python -m tools.docs.pictures"
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    colours = set(re.findall(r"\.lm-(ink|dim|line|off|tip)\b", pictures.STYLE))
    assert all(f'"slate"] .lm-{colour}' in (DOCS / "site.css").read_text() for colour in colours)


def words_of(drawn):
    """(words, left, top, right, bottom) of each text, in a font that is wider than most."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    for word in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text"):
        size, x, y = int(word.get("font-size")), float(word.get("x")), float(word.get("y"))
        long = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size).getlength(word.text)
        left = x - long * {"start": 0, "middle": 0.5, "end": 1}[word.get("text-anchor")]
        yield word.text, left, y - 0.7 * size, left + long, y


@pytest.mark.parametrize("name", list(pictures.DRAWINGS))
def test_words_of_a_picture_lie_inside_it_and_on_no_others(name):
    found = list(words_of(pictures.svg(name)))
    for i, (words, left, top, right, bottom) in enumerate(found):
        assert left >= 0 and right <= pictures.WIDTH, words
        for other, *box in found[:i]:
            assert right <= box[0] or box[2] <= left or bottom <= box[1] or box[3] <= top, (words, other)


def module_of_the_site(monkeypatch, name, **needed):
    """A module that runs where mkdocs is: what it imports from there is not in this environment."""
    for path, names in needed.items():
        monkeypatch.setitem(sys.modules, path.replace("__", "."), SimpleNamespace(**names))
    monkeypatch.delitem(sys.modules, f"tools.docs.{name}", raising=False)
    return importlib.import_module(f"tools.docs.{name}")


def test_docstrings_become_what_the_site_understands(monkeypatch):
    readable = module_of_the_site(monkeypatch, "docstrings", griffe={"Extension": object}).readable
    given = """Scan T*H*W tokens, from P ** -0.5 on; *near* stays, and `a*b`.

Args:
    x: (B, L) float.

Flex-MA, the scan
    reverse: run it
        backwards. None: not.
    gate, mix: numbers.

Returns:
    y: (B, L), or
    (y, state).
    due: (B,) bool.

Raises:
    ValueError: a shape. TypeError: a dtype.

Example:
    >>> scan(x)
"""
    made = readable(given)
    assert "T\\*H\\*W" in made and "P \\*\\* -0.5" in made and "*near*" in made and "`a*b`" in made
    assert "**Flex-MA, the scan:**\n\n- `reverse`: run it\n  backwards. None: not.\n- `gate, mix`: numbers.\n" in made
    assert "**Returns:**\n\n- `y`: (B, L), or\n(y, state).\n- `due`: (B,) bool.\n" in made
    assert "    ValueError: a shape.\n    TypeError: a dtype." in made
    assert "Args:\n    x: (B, L) float.\n" in made and "\nExamples:\n" in made


def test_links_out_of_docs_lead_to_pages_of_the_site(monkeypatch):
    hooks = module_of_the_site(
        monkeypatch, "hooks", mkdocs={}, mkdocs__structure={}, mkdocs__structure__files={"File": object}
    )

    def shown(text, uri="kernels/ssd_scan.md"):
        return hooks.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=uri)), None, None)

    assert shown("[a](../ops.md#the-scan)") == "[a](../ops.md#the-scan)"
    assert shown("[a\nb](../../distill/README.md#memory)") == "[a\nb](../repo/distill/README.md#memory)"
    assert shown("[c](../../csrc/cpu/ssd_scan.h)") == "[c](../repo/csrc/cpu/ssd_scan.h.md)"
    assert shown("[d](../../distill)") == "[d](../repo/distill/README.md)"
    assert shown("[e](../../Makefile), [f](https://x.y)") == "e, [f](https://x.y)"
    assert shown("```\n[c](../../Makefile)\n```") == "```\n[c](../../Makefile)\n```"
    assert shown("[o](../docs/ops.md)", "repo/distill/README.md") == "[o](../../ops.md)"
    assert hooks.source("repo/csrc/cpu/ssd_scan.h.md") == ROOT / "csrc/cpu/ssd_scan.h"
    assert hooks.text_of(ROOT / "setup.py").startswith("# `setup.py`\n\n````python")


def test_a_page_opened_as_a_file_can_be_searched(monkeypatch):
    hooks = module_of_the_site(
        monkeypatch, "hooks", mkdocs={}, mkdocs__structure={}, mkdocs__structure__files={"File": object}
    )
    tag = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
    assert "unpkg" not in hooks.on_post_page(f"<head>{tag}</head>", None, None)
    assert "IFrameWorker" in hooks.on_post_template(tag, "404.html", None)
