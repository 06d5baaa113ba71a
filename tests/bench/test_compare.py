"""Two commits are compared in one run, each by its own code."""

from __future__ import annotations

import json
import subprocess

import pytest

from bench import compare, run


def git(*words):
    return subprocess.run(["git", *words], cwd=run.ROOT, capture_output=True, text=True)


def worktrees():
    return git("worktree", "list").stdout


@pytest.fixture(scope="module", autouse=True)
def checkout():
    try:
        if git("rev-parse", "--verify", "HEAD").returncode:
            pytest.skip("needs a checkout by git")
    except OSError:
        pytest.skip("needs git")


def test_a_commit_and_this_checkout(tmp_path, capsys):
    before = worktrees()
    rows = tmp_path / "rows.jsonl"
    words = ["--op", "ssd_step", "--case", "tiny", "--seconds", "0", "--threads", "1", "--device", "cpu"]
    if git("diff", "--quiet", "HEAD", "--", *compare.COMPILED).returncode:
        pytest.skip("kernels are being changed: the base would have to be built")
    assert compare.main(["--base", "HEAD", *words, "--json", str(rows)]) == 0
    (row,) = [json.loads(line) for line in rows.read_text().splitlines()]
    assert (row["op"], row["case"], row["dtype"], row["status"]) == ("ssd_step", "tiny", "float32", "ok")
    assert row["rounds"] == 3 and row["base_us"] > 0 and row["this_us"] > 0
    assert 0 < row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
    assert "ssd_step" in capsys.readouterr().out and worktrees() == before


class Stand:
    """A process with known times and results."""

    def __init__(self, seconds, **answer):
        self.seconds, self.answer, self.taken = iter(seconds), answer, 0

    def ask(self, **question):
        if "sample" not in question:
            return dict(norms=[1.0, 2.0], seconds=0.5) | self.answer
        self.taken += 1
        return dict(seconds=next(self.seconds))


QUESTION = compare.Question("ssd_step", "tiny", "float32", False, "cpu")


def test_ratios_are_of_neighbouring_samples():
    row = compare.compare(Stand([2.0, 40.0, 6.0]), Stand([1.0, 10.0, 2.0]), QUESTION, 1.5)
    assert (row["ratio"], row["ratio_p20"], row["ratio_p80"], row["rounds"]) == (3.0, 2.0, 4.0, 3)
    assert (row["base_us"], row["this_us"]) == (6e6, 2e6)
    assert "| 3.00 (2.00 to 4.00) | 3 |" in compare.table([row])


@pytest.mark.parametrize(
    "answer, status",
    [
        (dict(error="AttributeError: no such op"), "base: AttributeError: no such op"),
        (dict(norms=[1.0, 2.1]), "not timed: the results differ"),
        (dict(norms=[1.0]), "not timed: the results differ"),
        (dict(norms=[1.0, float("nan")]), "not timed: the results differ"),
    ],
)
def test_what_differs_is_not_timed(answer, status):
    base, this = Stand([], **answer), Stand([])
    row = compare.compare(base, this, QUESTION, 1.0)
    assert row["status"] == status and not base.taken and not this.taken
    assert status in compare.table([row])


@pytest.mark.parametrize("revision", ["no-such-commit", "", "--all"])
def test_a_commit_must_be_there(revision, capsys):
    before = worktrees()
    assert compare.main([f"--base={revision}", "--op", "ssd_step"]) == 1
    assert capsys.readouterr().err == f"bench: --base must be a commit of this checkout, got {revision!r}\n"
    assert worktrees() == before


def test_a_case_must_be_there(capsys):
    assert compare.main(["--base", "HEAD", "--op", "ssd_step", "--case", "wibble"]) == 1
    assert capsys.readouterr().err.startswith("ssd_step: case must be one of tiny, ")
