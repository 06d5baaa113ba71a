"""The server of `linmu demo`: what is uploaded, what is answered, and who may ask."""

from __future__ import annotations

import asyncio
import http.client
import io
import itertools
import json
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from client import JSON, ask, begun, call, lossless, png, said, upload
from PIL import Image
from served import EXAMPLES, Served, Slow

from linmu_models.demo import server, shelf
from linmu_models.demo.pair import Pair
from linmu_models.generate import convert_folder, generate_text
from tests.models import folders, tiny

PAGE = EXAMPLES[0]
CLIP = EXAMPLES[2]


def figures(model, processor, example):
    images, videos = ([], [example.clip]) if example.clip.is_video else ([example.clip], [])
    return generate_text(model, processor, example.question, images, videos, max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize(("example", "kind"), [(PAGE, "picture"), (CLIP, "clip")])
def test_an_upload_is_answered_by_both(page, pair, example, kind):
    frames = example.clip.frames
    data = lossless(frames) if kind == "clip" else png(frames[0])
    status, _, body = upload(page.port, data, "video/x-matroska" if kind == "clip" else "image/png")
    item = json.loads(body)
    assert status == 200 and (item["kind"], item["height"], item["width"]) == (kind, *frames.shape[1:3])
    assert item["seconds"] == (len(frames) / 2 if kind == "clip" else None)
    events = ask(page.port, example.question, item["id"])
    assert events[0] == {"what": "seen", "kind": kind, "frames": len(frames), "height": frames.shape[1],
                         "width": frames.shape[2]}  # fmt: skip
    for side, first in ((pair.teacher, 1), (pair.student, events.index({"what": "start", "side": "student"}))):
        mine = [event for event in events if event.get("side") == side.name]
        assert events[first] == mine[0] == {"what": "start", "side": side.name} and mine[1]["what"] == "read"
        expected = figures(side.model, side.processor, example)
        end = mine[-1]
        assert (end["what"], end["text"]) == ("end", expected.text)
        assert (end["tokens"], end["bytes"]) == (expected.tokens, expected.cache_bytes)
        assert "".join(event["text"] for event in mine if event["what"] == "text").strip() == expected.text.strip()
        steps = [event for event in mine if event["what"] in ("read", "step")]
        assert [event["tokens"] for event in steps] == list(range(1, expected.tokens + 1))
        assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(steps))
        assert steps[-1]["bytes"] == expected.cache_bytes
        assert steps[0]["growth"][-1] == [expected.prompt_tokens, steps[0]["bytes"]]
    assert [event["what"] for event in events].index("read") < [event["what"] for event in events].index("end")


def test_fewer_frames_are_read_where_fewer_are_wanted(page):
    item = json.loads(upload(page.port, lossless(CLIP.clip.frames), "video/x-matroska")[2])
    for wanted, count in (({"frames": 3}, 3), ({"fps": 1}, 8), ({"frames": 1, "fps": 240}, 1)):
        assert ask(page.port, "digit", item["id"], **wanted)[0]["frames"] == count


@pytest.mark.parametrize("most", [5_000, 40_000])
def test_no_more_pixels_are_read_than_the_page_takes(pair, tmp_path, most):
    served = Served(pair, tmp_path, max_pixels=most)
    try:
        picture = json.loads(upload(served.port, png(np.zeros((300, 400, 3), np.uint8)), "image/png")[2])
        clip = json.loads(upload(served.port, lossless(CLIP.clip.frames), "video/x-matroska")[2])
        assert (picture["height"], picture["width"]) == (300, 400)
        for item in (picture, clip):
            seen = ask(served.port, "digit", item["id"])[0]
            assert seen["frames"] * seen["height"] * seen["width"] < 1.1 * most
    finally:
        served.close()


def test_words_alone_are_answered(page):
    events = ask(page.port, "read")
    assert [event["side"] for event in events if event["what"] == "end"] == ["teacher", "student"]


def test_models_of_words_alone_take_no_files(tmp_path):
    tiny.teacher("qwen2").save_pretrained(tmp_path / "teacher")
    folders.tokenizer().save_pretrained(tmp_path / "teacher")
    convert_folder(tmp_path / "teacher", tmp_path / "student")
    (tmp_path / "uploads").mkdir()
    models = Pair.load(str(tmp_path / "teacher"), str(tmp_path / "student"), 3, device="cpu")
    served = Served(models, tmp_path / "uploads")
    try:
        assert not json.loads(call(served.port, "GET", "/facts")[2])["takes_media"]
        ends = [event["side"] for event in ask(served.port, "abc") if event["what"] == "end"]
        assert ends == ["teacher", "student"]
        refused = ask(served.port, "abc", "example-0")[-1]
        assert refused == {"what": "error", "text": "a qwen2 takes text only, got 1 images or videos"}
    finally:
        served.close()


def test_examples_are_there_and_answered(page, pair):
    facts = json.loads(call(page.port, "GET", "/facts")[2])
    assert [example["title"] for example in facts["examples"]] == [example.title for example in EXAMPLES]
    assert (facts["teacher"], facts["student"], facts["max_bytes"]) == ("a teacher", "a student", 1 << 20)
    for shown, example in zip(facts["examples"], EXAMPLES, strict=True):
        assert (shown["kind"] == "clip") == example.clip.is_video
        status, headers, picture = call(page.port, "GET", f"/files/{shown['id']}")
        assert status == 200 and headers["content-type"] == "image/png"
        assert max(Image.open(io.BytesIO(picture)).size) <= 700
    read, end, *_ = [event for event in ask(page.port, PAGE.question, "example-0") if event["what"] in ("seen", "end")]
    assert read["kind"] == "picture"
    assert end["text"] == figures(pair.teacher.model, pair.teacher.processor, PAGE).text


def files(page):
    return {path.name for path in page.folder.iterdir()}


BAD = [
    (b"hello", "text/plain", "image corrupt"),
    (b"<svg/>", "image/svg+xml", "image is an SVG drawing: save it as PNG"),
    (b"%PDF-1.7", "application/pdf", "image is a PDF document: save its page as PNG"),
    (png(PAGE.clip.frames[0])[:300], "image/png", "image corrupt"),
    (png(PAGE.clip.frames[0])[:300], "video/mp4", "image corrupt"),
    (b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n", "video/mp4", "video is a playlist: give a file that it names"),
    (lossless(CLIP.clip.frames)[:9000], "video/x-matroska", "video truncated"),
    (b"", "image/png", "the file is empty"),
    (png(np.zeros((1, 500, 3), np.uint8)), "image/png", "too elongated"),
]


@pytest.mark.parametrize(("data", "media_type", "reason"), BAD)
def test_a_bad_file_is_one_line_and_is_not_kept(page, data, media_type, reason):
    before = files(page)
    answer = upload(page.port, data, media_type)
    assert answer[0] == 400 and said(answer) == reason
    assert files(page) == before


def test_a_wrong_media_type_is_no_reason(page):
    for data, media_type, kind in (
        (png(PAGE.clip.frames[0]), "video/mp4", "picture"),
        (lossless(CLIP.clip.frames), "image/png", "clip"),
        (lossless(CLIP.clip.frames), "", "clip"),
    ):
        assert json.loads(upload(page.port, data, media_type)[2])["kind"] == kind


def test_a_clip_that_is_too_long_is_refused(page, monkeypatch):
    monkeypatch.setattr(shelf, "SECONDS", 5.0)
    answer = upload(page.port, lossless(CLIP.clip.frames), "video/x-matroska")
    assert said(answer) == "the clip is 8 seconds long, over 5: cut it"


def test_a_large_file_is_refused_before_it_is_read(page):
    before = files(page)
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60)
    connection.putrequest("POST", "/files")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 400 and json.loads(answer.read())["error"].startswith("the file is larger than 1 MB")
    connection.close()
    assert files(page) == before


def test_a_large_file_of_unknown_length_is_not_read_to_its_end(page, tmp_path):
    taken = []

    async def chunks():
        for _ in range(100):
            taken.append(1)
            yield bytes(1 << 18)

    own = shelf.Shelf(tmp_path, 1 << 20, 1 << 20)
    with pytest.raises(shelf.UploadError, match="the file is larger than 1 MB: choose a smaller one"):
        asyncio.run(own.receive(chunks(), None))
    assert len(taken) == 5 and not list(tmp_path.iterdir())
    answer = call(page.port, "POST", "/files", iter([bytes(1 << 18)] * 6))
    assert answer[0] == 400 and said(answer).startswith("the file is larger than 1 MB")


def wait(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_upload_that_breaks_off_leaves_nothing(page):
    before = files(page)
    with socket.create_connection(("127.0.0.1", page.port)) as connection:
        connection.sendall(b"POST /files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nsome")
        wait(lambda: page.shelf.receiving == 1)
    wait(lambda: page.shelf.receiving == 0)
    assert files(page) == before


def test_a_file_that_cannot_be_kept_is_one_line(pair, tmp_path):
    """The disk is full, or somebody has deleted the folder."""
    (tmp_path / "uploads").mkdir()
    served = Served(pair, tmp_path / "uploads")
    try:
        (tmp_path / "uploads").rmdir()
        answer = upload(served.port, png(np.zeros((60, 60, 3), np.uint8)))
        assert (answer[0], said(answer)) == (507, "the file cannot be kept: No such file or directory")
        (tmp_path / "uploads").mkdir()
        assert upload(served.port, png(np.zeros((60, 60, 3), np.uint8)))[0] == 200
    finally:
        served.close()


def test_few_files_are_received_at_once(tmp_path):
    own = shelf.Shelf(tmp_path, 1 << 20, 1 << 20)
    own.receiving = shelf.AT_ONCE
    with pytest.raises(shelf.UploadError, match="still being uploaded"):
        asyncio.run(own.receive(None, 10))


def test_the_last_files_are_kept_under_names_of_their_own(pair, tmp_path):
    served = Served(pair, tmp_path)
    try:
        data = png(PAGE.clip.frames[0])
        ids = [json.loads(upload(served.port, data, "image/png")[2])["id"] for _ in range(shelf.KEPT + 2)]
        assert files(served) == set(ids[2:]) and all(re.fullmatch("[0-9a-f]{32}", name) for name in ids)
        gone = call(served.port, "POST", "/ask", json.dumps({"question": "read", "file": ids[0]}), JSON)
        assert gone[0] == 400 and said(gone) == "the file is not there any more: choose it again"
    finally:
        served.close()


@pytest.mark.parametrize("path", ["/files/..%2fconftest.py", "/files/%00", "/files/" + "a" * 5000, "/nothing", "/ask"])
def test_what_is_not_there_is_one_line(page, path):
    answer = call(page.port, "GET", path)
    assert answer[0] in (404, 405) and said(answer)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("wibble", "a question must be JSON"),
        (b"\xff\xfe", "a question must be JSON"),
        ("[" * 10_000, "a question must be JSON"),
        ("[]", "a question must have words"),
        ('{"question": 3}', "a question must have words"),
        ('{"question": "a", "file": 3}', "file must be the id of one"),
        ('{"question": "a", "file": "../../etc/passwd"}', "the file is not there any more: choose it again"),
        ('{"question": "a", "frames": 0}', "frames must be a whole number from 1 to 1024"),
        ('{"question": "a", "frames": null}', "frames must be a whole number from 1 to 1024"),
        ('{"question": "a", "fps": 1e9}', "frames a second must be a number from 0.01 to 240"),
        ('{"question": "a", "fps": NaN}', "frames a second must be a number from 0.01 to 240"),
        (json.dumps({"question": "a" * 20_000}), "a question must have at most 16384 bytes"),
    ],
)
def test_a_malformed_question_is_one_line(page, body, says):
    answer = call(page.port, "POST", "/ask", body, JSON)
    assert answer[0] == 400 and said(answer) == says


def test_a_question_of_another_media_type_is_refused(page):
    """A page elsewhere can send such a one without asking the server first."""
    answer = call(page.port, "POST", "/ask", '{"question": "a"}', {"Content-Type": "text/plain"})
    assert answer[0] == 400 and said(answer) == "a question must be JSON"


@pytest.mark.parametrize("question", ["", "<|image_pad|>", "\ud800"])
def test_what_cannot_be_asked_is_one_line_among_the_events(page, question):
    events = ask(page.port, question)
    assert events[-1]["what"] == "error" and "must" in events[-1]["text"] and "\n" not in events[-1]["text"]


@pytest.fixture
def slow(pair, tmp_path):
    stand_in = Slow(pair)
    served = Served(stand_in, tmp_path)
    served.pair = stand_in
    yield served
    served.close()


def test_one_answer_at_a_time_and_a_closed_connection_ends_it(slow):
    connection, answer = begun(slow.port, "one")
    assert answer.readline().startswith(b"data: ")
    busy = call(slow.port, "POST", "/ask", '{"question": "another"}', JSON)
    assert busy[0] == 409 and said(busy) == "another question is being answered: ask again in a moment"
    answer.close()
    connection.close()
    assert slow.pair.stopped.wait(20)
    slow.pair.error = ValueError("the next one is heard")
    wait(lambda: call(slow.port, "POST", "/ask", '{"question": "next"}', JSON)[0] == 200)


def test_a_server_that_ends_ends_its_answer(pair, tmp_path):
    stand_in = Slow(pair)
    served = Served(stand_in, tmp_path)
    connection, answer = begun(served.port, "one")
    assert answer.readline().startswith(b"data: ")
    served.close()
    assert stand_in.stopped.is_set()
    connection.close()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("generate: image corrupt\nat length"), "image corrupt"),
        (OSError("no space"), "no space"),
        (ValueError(), "ValueError"),
        (MemoryError(), "the answer takes more memory than there is: ask with fewer frames, or a smaller picture"),
        (torch.OutOfMemoryError("CUDA ..."), "the answer takes more memory than there is: ask with fewer frames, or a "
                                             "smaller picture"),
        (RuntimeError("/secret/path"), "the answer failed: the terminal that runs `linmu demo` shows why"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_among_the_events(slow, error, says, caplog):
    slow.pair.error = error
    assert ask(slow.port, "why?")[-1] == {"what": "error", "text": says}
    assert ("/secret/path" in caplog.text) == ("/secret/path" in str(error))


def test_what_fails_unforeseen_is_one_line(page, monkeypatch):
    def fails(self, path, media_type):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(shelf.Shelf, "add", fails)
    answer = upload(page.port, b"x")
    assert answer[0] == 500 and said(answer) == "something failed: the terminal that runs `linmu demo` shows what"


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(page):
    status, headers, html = call(page.port, "GET", "/")
    assert status == 200 and b"<main>" in html
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    named = re.findall(rb'(?:src|href)="([^"]+)"', html)
    assert sorted(named) == [b"icon.svg", b"page.css", b"page.js"]
    for name in named:
        status, headers, content = call(page.port, "GET", f"/{name.decode()}")
        assert status == 200 and headers["x-content-type-options"] == "nosniff"
        assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", content)
    assert {path.name for path in (Path(server.__file__).parent / "page").iterdir()} == {
        name for name, _ in server.PAGE.values()
    }


LOCAL = ["127.0.0.1", "localhost", "LOCALHOST", "[::1]", "127.0.0.1:8000", "localhost:9", "127.1.2.3"]
NAMES = [
    "",
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "[::1",
    "0.0.0.0.a",
]
ADDRESSES = ["192.168.1.7", "[fe80::1]:8000"]


def test_by_which_names_a_page_may_be_called():
    for listens in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "192.168.1.7", "box.lan"):
        assert all(server.may_be_called(name, listens) for name in LOCAL)
        assert not [name for name in NAMES if server.may_be_called(name, listens)]
        outside = listens not in ("127.0.0.1", "localhost", "::1")
        assert all(server.may_be_called(name, listens) == outside for name in ADDRESSES)
        assert server.may_be_called(socket.gethostname(), listens) == (outside or socket.gethostname() == "localhost")
    assert server.may_be_called("BOX.lan:80", "box.lan") and not server.may_be_called("box.lan", "127.0.0.1")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://[::1"},
    ],
)
@pytest.mark.parametrize("what", [("POST", "/ask"), ("POST", "/files"), ("GET", "/facts"), ("GET", "/")])
def test_a_page_elsewhere_gets_nothing(page, headers, what):
    before = files(page)
    answer = call(page.port, *what, "{}" if what[0] == "POST" else None, headers)
    assert answer[0] == 403 and re.search("is not called|are refused", said(answer))
    assert "access-control-allow-origin" not in answer[1] and files(page) == before


def test_the_page_itself_may_ask(page):
    own = f"127.0.0.1:{page.port}"
    answer = call(page.port, "POST", "/ask", "{}", {**JSON, "Host": own, "Origin": f"http://{own}"})
    assert answer[0] == 400 and said(answer) == "a question must have words"
