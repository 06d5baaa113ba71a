"""The site that `make docs` built, in a headless Chromium: every page fits, wide and narrow, in light and in dark."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.demo import browser

SITE = Path(__file__).parents[1] / "build" / "site"
PAGES = [page for page in sorted(SITE.rglob("*.html")) if page.name != "404.html"]  # that one is for servers alone
pytestmark = [
    pytest.mark.sweep,
    pytest.mark.skipif(browser.binary() is None, reason="needs Chromium"),
    pytest.mark.skipif(not PAGES, reason="needs `make docs`"),
]
# What is cut off, and not by something that scrolls.
CUT = """
[...document.querySelectorAll('.md-content *')].filter(e => {
  const box = e.getBoundingClientRect();
  if (!box.width || box.right <= innerWidth + 1) return false;
  for (let over = e; over !== document.body; over = over.parentElement)
    if (/auto|scroll|hidden/.test(getComputedStyle(over).overflowX)) return false;
  return true;
}).map(e => e.outerHTML.slice(0, 80))
"""
BROKEN = "[...document.images].filter(i => i.loading !== 'lazy' && !i.naturalWidth).map(i => i.src)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1440])
def test_every_page_fits(chromium, width, dark):
    chromium.screen(width, 900, dark)
    wrong = {}
    for page in PAGES:
        chromium.events.clear()
        chromium.open(page.as_uri())
        found = {
            "scrolls sideways": chromium.value("document.documentElement.scrollWidth > innerWidth"),
            "is cut off": chromium.value(CUT),
            "has no picture": chromium.value(BROKEN),
            "has the other palette": chromium.value(
                f"document.body.dataset.mdColorScheme !== '{'slate' if dark else 'default'}'"
            ),
            "complains": [e for e in chromium.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")],
            "loads from elsewhere": [
                url for url in requested(chromium) if not url.startswith(("file:", "data:", "blob:"))
            ],
        }
        if told := {what: which for what, which in found.items() if which}:
            wrong[str(page.relative_to(SITE))] = told
    assert not wrong
    seen = np.asarray(Image.open(io.BytesIO(chromium.picture(whole=False))).convert("L"))
    assert (seen.mean() < 90) if dark else (seen.mean() > 180)


def requested(page):
    return [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]


def test_the_search_finds_an_op(chromium):
    """From a file, without a server."""
    chromium.screen(1440, 900)
    chromium.open((SITE / "index.html").as_uri())
    chromium.value("document.querySelector('.md-search__input').focus()")
    chromium.type("gated_delta_scan")
    chromium.value("document.querySelector('.md-search__input').dispatchEvent(new Event('keyup'))")
    chromium.wait("document.querySelectorAll('.md-search-result__item').length > 0")
