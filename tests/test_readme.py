"""The Python of README and of the pages in docs/ runs, block after block, as a newcomer would paste it."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from linmu_distill.config import parse_config
from linmu_models.cli import app

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(page, tmp_path):
    scope: dict = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block.replace("/tmp/linmu-", f"{tmp_path}/"), str(page), "exec"), scope)
    return scope


@pytest.fixture
def teacher_package(tmp_path_factory, monkeypatch):
    """The wheel of the teacher, as `make wheels` fills it."""
    folder = tmp_path_factory.mktemp("wheel") / "linmu_teacher"
    folder.mkdir()
    for source in ("wheels/linmu_teacher/linmu_teacher", "distill/teachers/tiny"):
        for file in (ROOT / source).glob("*.*"):
            (folder / file.name).symlink_to(file)
    monkeypatch.syspath_prepend(folder.parent)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: str(p.relative_to(ROOT))
)
def test_page_runs(page, tmp_path, monkeypatch, teacher_package):
    monkeypatch.chdir(ROOT)  # README loads the teacher of the checkout
    run(page, tmp_path)


def test_readme_shows_all_it_offers(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    scope = run(ROOT / "README.md", tmp_path)
    assert scope["y"].shape == (2, 1000, 8, 64)
    assert type(scope["student"]).__name__.startswith("Linmu")
    assert (tmp_path / "student" / "model.safetensors").exists()


SHELL = re.compile(r"^```(?:sh|bash)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SHELLED = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "distill/README.md", ROOT / "CONTRIBUTING.md"]


def commands(page):
    """Each command of the page's blocks for a shell, as words."""
    for block in SHELL.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
                    yield shlex.split(part)


@pytest.mark.parametrize("page", SHELLED, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_of_a_page_are_understood(page):
    """`linmu` knows the command and its options, and the Makefile the target. Nothing is run."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    group = typer.main.get_command(app)
    for words in commands(page):
        if words[0] == "linmu":
            command = group.get_command(None, words[1])
            assert command, words
            command.make_context(words[1], words[2:])
        elif words[0] == "make":
            assert all(word in targets for word in words[1:] if "=" not in word), words


TOML = re.compile(r"^```toml\n(output =.*?)^```", flags=re.DOTALL | re.MULTILINE)


def test_configurations_of_pages_are_read():
    found = [block for page in SHELLED for block in TOML.findall(page.read_text())]
    assert found
    for block in found:
        parse_config(tomllib.loads(block))
