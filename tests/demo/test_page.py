"""The page of `linmu demo` in a headless Chromium, as a person uses it."""

from __future__ import annotations

import io
import re

import browser
import numpy as np
import pytest
from client import lossless, png
from PIL import Image
from served import EXAMPLES, Served, Slow

pytestmark = pytest.mark.skipif(browser.binary() is None, reason="needs Chromium")

DONE = "!document.getElementById('ask').disabled"
TIMES = "\N{MULTIPLICATION SIGN}"
WRITTEN = "[...document.querySelectorAll('.said')].map(said => said.textContent)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(chromium, pair, tmp_path):
    served = Served(pair, tmp_path)
    chromium.events.clear()
    chromium.screen(1280, 860)
    chromium.open(f"http://127.0.0.1:{served.port}/")
    chromium.wait("document.querySelectorAll('#examples button').length > 0")
    yield chromium
    chromium.open("about:blank#closed")
    served.close()


def complaints(page):
    """What the browser's console would show, and what was loaded from elsewhere."""
    shown = [e for e in page.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    return shown + [url for url in asked if not url.startswith(("http://127.0.0.1:", "about:"))]


def upload(page, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    page.choose_file("#file", tmp_path / name)
    page.wait("document.getElementById('status').textContent === '' && "
              "(!document.getElementById('preview').hidden || !document.getElementById('error').hidden)")  # fmt: skip


def ask_by_keyboard(page, question):
    page.value("document.getElementById('question').focus()")
    page.value("document.getElementById('question').value = ''")
    page.type(question)
    page.press("Enter")
    page.wait(f"{WRITTEN}.every(text => text) && {DONE}")
    return page.value(WRITTEN)


def figure(page, side, name):
    return page.value(f"document.querySelector('#{side} .{name}').textContent")


def test_a_picture_and_a_clip_are_uploaded_and_answered(page, tmp_path):
    picture = EXAMPLES[0]
    height, width = picture.clip.frames.shape[1:3]
    size = f"{width} {TIMES} {height} pixels"
    upload(page, tmp_path, "a page.png", png(picture.clip.frames[0]))
    assert page.value("document.getElementById('about').textContent") == f"a page.png: {size}"
    assert page.value("document.getElementById('preview').naturalWidth") == 640
    answers = ask_by_keyboard(page, picture.question)
    assert answers[0] == answers[1] and len(answers[0]) > 3
    small = figure(page, "teacher", "bytes"), figure(page, "student", "bytes")
    upload(page, tmp_path, "a clip.mkv", lossless(EXAMPLES[2].clip.frames))
    assert page.value("document.getElementById('about').textContent") == f"a clip.mkv: 128 {TIMES} 64 pixels, 8.0 s"
    assert not page.value("document.getElementById('time').hidden")
    ask_by_keyboard(page, "digit")
    large = figure(page, "teacher", "bytes"), figure(page, "student", "bytes")
    assert small[0].endswith("KiB") and large[0].endswith("MiB") and small[1] == large[1]
    for side in ("teacher", "student"):
        assert figure(page, side, "first").endswith("s") and figure(page, side, "rate")[0].isdigit()
        assert page.value(f"document.querySelectorAll('#chart circle.{side}').length") == 3  # two questions, and now
        assert page.value(f"document.querySelector('#chart polyline.{side}').getTotalLength()") > 200
    says = page.value("document.getElementById('chart-says').textContent")
    compared = r"the student's state is (about as large as|\d+\.\d times (smaller|larger) than) the teacher's cache\."
    assert f"16 frames of 128 {TIMES} 64 pixels" in says and re.search(compared, says), says
    page.value("document.getElementById('frames').value = 1")
    ask_by_keyboard(page, "digit")
    assert f"of 1 frame of 128 {TIMES} 64 pixels" in page.value("document.getElementById('chart-says').textContent")
    assert not complaints(page)


def test_words_appear_while_they_are_written(page):
    page.value(
        f"window.states = []; new MutationObserver(() => states.push({WRITTEN}.join('|')))"
        ".observe(document.querySelector('.answers'), {subtree: true, childList: true, characterData: true}); true"
    )
    ask_by_keyboard(page, "read")
    states = page.value("[...new Set(states)]")
    final = page.value(WRITTEN)
    teachers = [state.split("|")[0] for state in states]
    assert any(0 < len(text) < len(final[0]) and final[0].startswith(text.strip()) for text in teachers), states
    assert f"{final[0]}|" in states  # the student answers after it


def test_a_bad_file_is_one_line(page, tmp_path):
    for name, data, line in (
        ("notes.txt", b"some words", "notes.txt: image corrupt"),
        ("<b>.svg", b"<svg/>", "<b>.svg: image is an SVG drawing: save it as PNG"),
        ("cut.mkv", lossless(EXAMPLES[2].clip.frames)[:9000], "cut.mkv: video truncated"),
        ("large.png", bytes((1 << 20) + 1), "large.png: the file is larger than 1.00 MB: choose a smaller one"),
    ):
        upload(page, tmp_path, name, data)
        assert page.value("document.getElementById('error').textContent") == line
        assert page.value("document.getElementById('error').getClientRects().length") == 1
        assert page.value("document.getElementById('preview').hidden")
    upload(page, tmp_path, "good.png", png(EXAMPLES[0].clip.frames[0]))
    assert page.value("document.getElementById('error').hidden")


def test_the_keyboard_reaches_everything_in_order(page):
    reached = []
    for _ in range(2 + len(EXAMPLES) + 2):
        page.press("Tab")
        name = page.value("document.activeElement.id || document.activeElement.textContent")
        reached.append(name)
        if name != "":
            outline = page.value(
                "getComputedStyle(document.activeElement.id === 'file' ? document.getElementById('drop') : "
                "document.activeElement).outlineStyle"
            )
            assert outline == "solid" or name not in ("file", "question", "ask"), name
    assert reached[: len(EXAMPLES) + 3] == ["file", *(e.title for e in EXAMPLES), "question", "ask"]


def test_an_answer_is_stopped_by_a_key(chromium, pair, tmp_path):
    stand_in = Slow(pair)
    served = Served(stand_in, tmp_path)
    chromium.open(f"http://127.0.0.1:{served.port}/")
    chromium.wait("document.querySelectorAll('#examples button').length > 0")
    chromium.value("document.querySelectorAll('#examples button')[3].focus()")
    chromium.press("Enter")
    assert chromium.value("document.getElementById('question').value") == EXAMPLES[3].question
    chromium.value("document.getElementById('question').focus()")
    chromium.press("Enter")
    chromium.wait("document.getElementById('teacher').className.includes('writes')")
    assert chromium.value("document.getElementById('ask').disabled && !document.getElementById('stop').hidden")
    chromium.press("Escape")
    chromium.wait(DONE)
    assert chromium.value("document.getElementById('status').textContent") == "stopped"
    assert chromium.value("document.getElementById('error').hidden")
    assert stand_in.stopped.wait(20)
    chromium.open("about:blank#closed")
    served.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 800, 1280])
def test_it_fits_every_screen_in_light_and_dark(page, width, dark, tmp_path):
    page.screen(width, 700, dark)
    page.wait(f"innerWidth === {width}")
    page.value("document.querySelectorAll('#examples button')[2].click()")
    page.wait("document.getElementById('preview').complete")
    assert page.value("document.documentElement.scrollWidth") <= width
    over = "[...document.querySelectorAll('main *')].filter(e => e.getClientRects().length && e.id !== 'file' && "
    over += "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 60))"
    assert page.value(over) == []
    seen = np.asarray(Image.open(io.BytesIO(page.picture())).convert("L"))
    assert (seen.mean() < 70) if dark else (seen.mean() > 200)
    for name in ("body", "h2", ".student h2", ".about", "#status", "button", ".key"):
        assert contrast(page, name) >= 4.5, name


def contrast(page, selector):
    """Of an element's words to what is behind them, as WCAG counts it."""
    colours = page.value(
        f"(() => {{ let e = document.querySelector({selector!r}); const ink = getComputedStyle(e).color; let back;"
        "while ((back = getComputedStyle(e).backgroundColor) === 'rgba(0, 0, 0, 0)') e = e.parentElement;"
        "return [ink, back].map(c => c.match(/\\d+/g).slice(0, 3).map(Number)); })()"
    )
    ink, back = (np.dot(linear(np.array(c) / 255), [0.2126, 0.7152, 0.0722]) for c in colours)
    return (max(ink, back) + 0.05) / (min(ink, back) + 0.05)


def linear(c):
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
