"""A folder that a process leaves at any instant holds a whole model or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from linmu_models.generate import convert_folder
from linmu_models.saving import locked, whole_folder

from .folders import run

FILES = {"model.safetensors": "weights", "tokenizer.json": "words", "sub/more.json": "{}", "config.json": "{}"}


def written(folder, mark, files=FILES):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(mark)


def marks(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def dies_before(count, work):
    """Whether a process that dies before its change number `count` of a file's name gets to the end of `work`."""
    child = os.fork()
    if not child:
        left = count

        def dying(real):
            def change(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return change

        for name in ("replace", "unlink", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("before", ["nothing", "a model", "a sharded model"])
def test_a_kill_at_any_change_leaves_a_whole_model_or_none(tmp_path, before):
    old = {
        "nothing": (), "a model": FILES,
        "a sharded model": ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json"),
    }[before]  # fmt: skip
    seen = set()
    for count in range(30):
        out = tmp_path / str(count)
        if old:
            written(out, "old", old)
        done = dies_before(count, lambda out=out: save(out))
        found = {name: mark for name, mark in marks(out).items() if ".partial" not in name} if out.exists() else {}
        whole = found.get("config.json")
        seen.add(whole)
        if whole == "new":
            assert found == dict.fromkeys(FILES, "new")
        elif whole == "old":
            assert found == dict.fromkeys(old, "old")
        save(out)  # again
        assert marks(out) == dict.fromkeys(FILES, "new")
        if done:
            break
    assert done and seen == {None, "new", *(["old"] if old else [])}


def save(out):
    with whole_folder(out) as made:
        written(made, "new")


def test_what_fails_leaves_what_was_there(tmp_path):
    def half(out):
        with whole_folder(out) as made:
            written(made, "half")
            raise OSError("full")

    def fail(out):
        with pytest.raises(OSError, match="full"):
            half(out)

    fail(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    written(tmp_path / "old", "old", (*FILES, "notes.txt", "adapter.safetensors"))
    fail(tmp_path / "old")
    assert marks(tmp_path / "old") == dict.fromkeys((*FILES, "notes.txt", "adapter.safetensors"), "old")
    save(tmp_path / "old")  # what is no model's stays
    assert marks(tmp_path / "old") == {
        **dict.fromkeys(FILES, "new"), "notes.txt": "old", "adapter.safetensors": "old",
    }  # fmt: skip


def test_one_process_at_a_time(tmp_path, folders):
    with locked(tmp_path / "out"):
        line = run("convert", folders / "teacher", tmp_path / "out", status=1).stderr.splitlines()[-1]
    assert line == f"linmu: another process is at work in {tmp_path / 'out'}"


def test_a_conversion_replaces_another(tmp_path, folders):
    """Its own files alone say what it is."""
    for window in (4, 8):
        convert_folder(folders / "teacher", tmp_path / "out", {"text_window": window})
    convert_folder(folders / "teacher", tmp_path / "new", {"text_window": 8})
    made, new = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("out", "new"))
    assert made == new and Path(tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


STOPPED = """
import sys
sys.argv = ["linmu", "families"]
class Stop:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop)
from linmu_models.cli import main
main()
"""


@pytest.mark.parametrize("module", ["torch", "transformers", "linmu_ops"])
def test_ctrl_c_while_the_command_is_imported_has_one_line(module):
    done = in_process("-c", STOPPED.format(module=module))
    assert (done.returncode, done.stderr) == (130, "linmu: stopped; nothing is left half done\n")


def test_a_variable_of_no_sense_has_one_line():
    done = in_process("-m", "linmu_models.cli", "families", LINMU_IMPL="x:y")
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("linmu: LINMU_IMPL: op must be "), lines


def in_process(*words, **environment):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests/names")])
    return subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
