"""What an installation offers: three packages, and one command that says what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linmu_models import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of all that a wheel holds but the compiled libraries."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "build_py", "--build-lib", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_packages_are_ours_by_name(installed):
    """Nothing that another project's folder may be called: no `bench`, `distill`, `tests` or `tools`."""
    found = {path.parent.name for path in installed.glob("*/__init__.py")}
    assert found == {"linmu_ops", "linmu_models", "linmu_distill"}
    assert {p.name for p in installed.iterdir()} - found == {"linmu.egg-info"}
    assert not [path for name in ("names", "results", "*.jsonl", "*.md") for path in installed.rglob(name)]
    assert not (installed / "linmu_distill" / "teachers").exists()  # a package of its own: linmu-teacher
    assert {p.name for p in (installed / "linmu_distill" / "data").glob("*.[nt]*")} >= {"glyphs.npz", "words.txt"}
    page = Path("linmu_models") / "demo" / "page"
    assert {p.name for p in (installed / page).iterdir()} == {p.name for p in (ROOT / page).iterdir()}


def test_what_others_made_comes_with_their_licence(installed):
    """Each file of data that is packed is named by one of the licences that are packed beside it."""
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license-files"]
    texts = "".join((ROOT / name).read_text() for name in names)
    data = {p.name for p in (installed / "linmu_distill" / "data").iterdir() if p.suffix in (".npz", ".txt")}
    assert len(data) >= 3 and not [name for name in data if name not in texts]


def test_a_package_finds_its_own_files(installed):
    code = (
        "import linmu_distill.data as data, linmu_ops, linmu_models;"
        "print(linmu_ops.__file__, linmu_models.__file__, data.__file__, len(data.generate('needle', 1, 0)) == 1)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "LINMU_NO_BINARY": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *files, answered = done.stdout.split()
    assert answered == "True" and all(f.startswith(str(installed)) for f in files)


def offered(monkeypatch, *points):
    found = [EntryPoint(name, value, "linmu.commands") for name, value in points]
    monkeypatch.setattr(cli, "entry_points", lambda group: [p for p in found if p.group == group])


def run(*words):
    result = CliRunner().invoke(cli.app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("points", [[], [("distill", "wibble.cli:x"), ("evaluate", "wibble.cli:x")]])
@pytest.mark.parametrize("words", [("distill",), ("distill", "x.toml", "--resume"), ("evaluate", "x", "--seed", "3")])
def test_a_command_that_cannot_be_loaded_says_so_in_one_line(monkeypatch, points, words):
    offered(monkeypatch, *points)
    result = run(*words)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"linmu: `linmu {words[0]}` ") and "pip install 'linmu[distill]'" in result.stderr
    assert "evaluate" in run("--help").output


def test_what_the_extra_brings_is_named(monkeypatch):
    offered(monkeypatch, ("distill", "linmu_distill.cli:distill"))
    monkeypatch.setitem(sys.modules, "linmu_distill.config", None)  # as if what it imports were not installed
    result = run("distill", "x.toml")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "linmu_distill.config" in result.stderr and "pip install 'linmu[distill]'" in result.stderr


def test_other_packages_add_commands(monkeypatch):
    offered(monkeypatch, ("wave", f"{__name__}:wave"))
    assert run("wave", "you").output == "you\n" and "Greet." in run("--help").output


def wave(name: str) -> None:
    """Greet."""
    print(name)


def test_an_unknown_command_is_refused():
    result = run("bench")
    assert result.exit_code == 2 and "No such command 'bench'" in result.output


def test_the_package_offers_its_commands(installed):
    text = (installed / "linmu.egg-info" / "entry_points.txt").read_text()
    assert "linmu = linmu_models.cli:main" in text and "linmu = linmu_distill.lmms:manifest" in text
    for command in ("distill", "answers", "plan", "evaluate"):
        assert f"{command} = linmu_distill.cli:{command}\n" in text
    assert "[linmu.examples]\ntasks = linmu_distill.data.examples:examples\n" in text
