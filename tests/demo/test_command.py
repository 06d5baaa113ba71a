"""`linmu demo`: what it finds, what it refuses in one line, and that nothing of it is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from client import call, png, upload
from served import EXAMPLES, TEACHER

from linmu_models.demo import command
from tests.models.folders import run

ROOT = Path(__file__).parents[2]


def refused(*words):
    lines = run("demo", *words, status=1).stderr.splitlines()
    assert lines[-1].startswith("linmu: demo: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def test_without_a_teacher_one_line_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    line = refused()
    assert "--teacher must be given where no teacher is there" in line and "`pip install linmu-teacher`" in line


def test_what_is_there_is_found(tmp_path, monkeypatch):
    """What `make demo` made; else the teacher of the checkout; else that of its package."""
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site" / "linmu_teacher"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    assert command.find(None, None) == (None, str(package))
    for folder in (command.TEACHER, command.STUDENT):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        student = str(folder) if folder is command.STUDENT else None
        assert command.find(None, None) == (student, "distill/teachers/tiny")
    assert command.find(None, "b") == (None, "b")
    assert command.find("a", "b") == ("a", "b")
    assert "linmu_teacher" not in sys.modules  # data alone


def test_what_is_wrong_is_one_line(tmp_path):
    assert refused("x").endswith("--teacher must be given too, as the page shows both")
    (tmp_path / "file").write_text("")
    assert "--folder must be a folder" in refused("x", "--teacher", "y", "--folder", tmp_path / "file", "--port", 0)
    for host in ("no such", ""):
        line = refused("x", "--teacher", "y", "--host", host)
        assert f"--host must be an address or a name of this machine, got {host!r}" in line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("x", "--teacher", "y", "--port", port)
    assert f"--host and --port must be free to listen on, got 127.0.0.1:{port}: " in line
    gone = run("demo", tmp_path / "no", "--teacher", TEACHER, "--port", 0, "--device", "cpu", status=1).stderr
    assert gone.splitlines()[-1].startswith("linmu: ")


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "linmu_models.demo.command")
    monkeypatch.delitem(sys.modules, "linmu_models.demo.server")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    line = run("demo", status=1).stderr.splitlines()[-1]
    assert line.endswith("pip install 'linmu[demo]'") and "starlette" in line


def test_other_packages_add_examples(monkeypatch):
    found = [
        EntryPoint("tasks", "linmu_distill.data.examples:examples", "linmu.examples"),
        EntryPoint("others", "no_such_package:examples", "linmu.examples"),
    ]
    said = []
    monkeypatch.setattr(command, "entry_points", lambda group: [p for p in found if p.group == group])
    assert [example.title for example in command.examples(said.append)] == [example.title for example in EXAMPLES]
    assert said == ["The examples 'others' are left out: No module named 'no_such_package'"]


def test_without_scikit_learn_there_is_a_page():
    code = (
        "import sys; sys.modules['sklearn'] = None; from linmu_distill.data.examples import examples;"
        "print([title for title, *_ in examples()])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['A page']\n", done.stderr


@pytest.mark.parametrize(
    ("host", "shown", "warned"),
    [("127.0.0.1", "127.0.0.1", False), ("localhost", "localhost", False), ("0.0.0.0", "0.0.0.0", True)],
)
def test_the_address_is_shown_and_opened(pair, monkeypatch, host, shown, warned):
    served, opened = [], threading.Event()
    monkeypatch.setattr(command.Pair, "load", lambda *_, **how: served.append(how) or pair)
    monkeypatch.setattr(command.webbrowser, "open", lambda address: served.append(address) or opened.set())
    monkeypatch.setattr(command, "serve", lambda *_: opened.wait(20))
    said = run(
        "demo", "a", "--teacher", "b", "--host", host, "--port", 0, "--open", "--dtype", "bfloat16", "--device", "cpu"
    ).stderr
    how, address = served
    assert how == {"device": "cpu", "dtype": "bfloat16"} and re.fullmatch(rf"http://{shown}:\d+", address)
    assert f"The page: {address} (Ctrl-C ends it)" in said and ("can use the page" in said) == warned


def test_without_a_student_the_teacher_is_converted(monkeypatch):
    """On the page as on the terminal it is said."""
    shown = []
    monkeypatch.setattr(command, "serve", lambda pair, *_: shown.append(pair))
    said = run("demo", "--teacher", TEACHER, "--port", 0, "--device", "cpu", "--max-new-tokens", 20).stderr
    assert command.UNTRAINED in said
    (pair,) = shown
    assert (pair.teacher.label, pair.student.label) == ("teachers/tiny", "converted, not trained")
    texts = []
    page = EXAMPLES[0]
    pair.answer(page.question, page.clip, threading.Event(), lambda e: e["what"] == "end" and texts.append(e["text"]))
    assert texts[0] == texts[1] and len(texts[0]) > 3


@pytest.mark.parametrize("ended", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.sweep)])
def test_the_page_is_served_until_it_is_ended_and_leaves_nothing(pair, tmp_path, ended):
    student, scratch, kept = tmp_path / "student", tmp_path / "scratch", tmp_path / "kept"
    pair.student.model.save_pretrained(student)
    for file in TEACHER.glob("*"):
        if not (student / file.name).exists() and file.suffix in (".json", ".jinja"):
            (student / file.name).write_bytes(file.read_bytes())
    scratch.mkdir()
    options = ["--folder", kept] if ended == signal.SIGINT else []
    process = subprocess.Popen(
        [sys.executable, "-m", "linmu_models.cli", "demo", student, "--teacher", TEACHER, "--port", "0", *options],
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"},
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        port = next(int(m[1]) for line in process.stderr if (m := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
        assert call(port, "GET", "/")[0] == 200
        assert upload(port, png(EXAMPLES[0].clip.frames[0]), "image/png")[0] == 200
        folder = kept if options else next(scratch.glob("linmu-demo-*"))
        assert len(list(folder.iterdir())) == 1
        process.send_signal(ended)
        _, rest = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "Traceback" not in rest
    assert process.returncode == (0 if ended == signal.SIGINT else 128 + signal.SIGTERM)
    assert not list(scratch.glob("linmu-demo-*")) and kept.exists() == bool(options)
    assert {path.name for path in tmp_path.iterdir()} == {"student", "scratch", *(["kept"] if options else [])}
