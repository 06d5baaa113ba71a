"""The file of a cache: what is no file, and cannot be one, is said in one line that names the path."""

from __future__ import annotations

import os

import pytest

import linmu_models
from linmu_models.states import load_cache, new_cache

from . import tiny


@pytest.fixture(scope="module")
def student():
    return linmu_models.convert(tiny.teacher("qwen2"))


def test_a_path_of_no_file(student, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    pipe = tmp_path / "pipe"
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for path, got in (
        (tmp_path, "a folder"),
        (str(tmp_path), "a folder"),
        (pipe, "what is no regular file"),
        (loop, "a link that leads nowhere"),
    ):
        for op, use in (("load", load_cache), ("save", new_cache(student).save)):
            with pytest.raises(ValueError, match=f"^{op}: {path} must be a file that cache.save wrote, got {got}$"):
                use(path, student)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_without_a_name(student, path):
    for op, use in (("load", load_cache), ("save", new_cache(student).save)):
        with pytest.raises(ValueError, match=f"^{op}: path must be of a file, got "):
            use(path, student)


@pytest.mark.parametrize("path", [None, 5, b"name", ["name"]])
def test_what_is_no_path(student, path):
    for op, use in (("load", load_cache), ("save", new_cache(student).save)):
        with pytest.raises(TypeError, match=f"^{op}: path must be of a file, got "):
            use(path, student)


def test_a_path_that_is_not_there(student, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/such"):
        load_cache(tmp_path / "no" / "such", student)
    with pytest.raises(FileNotFoundError, match=r"^save: path must be in a folder that exists, got .*no/such$"):
        new_cache(student).save(tmp_path / "no" / "such", student)


@pytest.mark.parametrize("content", [b"", b"x", b"{}" * 40, bytes(5000), b"\xff" * 5000])
def test_a_file_of_something_else(student, tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ValueError, match=r"^load: .*state must be a (whole )?file .*, got ") as caught:
        load_cache(tmp_path / "state", student)
    assert len(str(caught.value).splitlines()) == 1
