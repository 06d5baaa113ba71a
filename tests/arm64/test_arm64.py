"""What `make arm64` runs, where its tools are installed; and that it tells a wrong result."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

import linmu_ops
from tests.arm64 import __main__ as arm64


@pytest.mark.sweep
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_kernels_are_right_on_arm64():
    torch.manual_seed(0)
    with linmu_ops.use_impl("*:reference"):
        assert arm64.main() == 0


@pytest.mark.parametrize("wrong", [None, 1.01, float("nan")])
def test_a_wrong_result_is_told(wrong, monkeypatch, tmp_path):
    """A stand-in for the emulator gives back what it is given."""
    monkeypatch.setattr(arm64, "BUILD", tmp_path)
    script = "import sys; open(sys.argv[3], 'wb').write(open(sys.argv[2], 'rb').read()[8:])"
    given = torch.tensor([1.0, 2.0, 3.0])
    case = ([given], [given], lambda: [given.double() * (wrong or 1)])
    said = arm64.run([sys.executable, "-c", script], "echo", case)
    assert said is None if wrong is None else said.startswith("result 0 differs by ")
    assert arm64.run([sys.executable, "-c", "raise SystemExit(3)"], "x", case).startswith("ended with status 3")


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setenv("ARM64_CXX", "no-such-compiler")
    assert arm64.main() == 1
    said = "arm64: no-such-compiler must be installed (Debian: g++-aarch64-linux-gnu), got none\n"
    assert capsys.readouterr().err == said
