"""Importing is free, and possible whatever is missing. Everything here runs in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import linmu_ops
from linmu_ops import _native

ROOT = Path(linmu_ops.__file__).parents[1]
STEP = "from linmu_ops._testing import *; linmu_ops.ssd_step(**small_inputs('ssd_step'));"


def python(code, root=ROOT, **environment):
    environment = {**os.environ, "PYTHONPATH": str(root), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def needs_binary():
    if not (_native.HERE / "liblinmu_cpu.so").exists():
        pytest.skip("liblinmu_cpu.so is not built")


def test_imports_nothing_but_itself():
    """Beyond torch, which takes a hundred times as long."""
    code = "import sys, torch; before = set(sys.modules); import linmu_ops; print(*set(sys.modules) - before)"
    for environment in ({}, {"LINMU_NO_BINARY": "1"}):
        found = python(code, **environment).split()
        assert "linmu_ops" in found and [name for name in found if name.split(".")[0] != "linmu_ops"] == []
        assert "linmu_ops._C" not in found


HELP = """
import sys
sys.argv = ["linmu", *{words}]
from linmu_models.cli import main
try:
    main()
except SystemExit:
    print({names} & set(sys.modules))
"""


@pytest.mark.parametrize("words", [[], ["--help"], ["convert", "--help"], ["demo", "--help"], ["distill", "--help"]])
def test_help_loads_neither_torch_nor_transformers(words):
    heavy = {"torch", "transformers", "numpy", "linmu_ops"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/names")])
    text = python(HELP.format(words=words, names=heavy), PYTHONPATH=path)
    assert "Usage: linmu" in text and text.splitlines()[-1] == "set()"


def test_a_program_of_that_name_finds_what_the_help_leaves_out():
    code = (
        "import sys; sys.argv = ['linmu', '--help']; import linmu_models;"
        "print('torch' in sys.modules, linmu_models.families()[:1], linmu_models.convert.__name__);"
        "print('torch' in sys.modules, hasattr(linmu_models, 'wibble'))"
    )
    assert python(code).splitlines()[:2] == ["False ['gemma3'] convert", "True False"]


def test_words_that_are_asked_are_no_help():
    """`linmu generate FOLDER --prompt --help` knows the models that it is to load."""
    code = (
        "import sys; sys.argv = ['linmu', 'generate', 'x', '--prompt', '--help']; import linmu_models.generate;"
        "from transformers import AutoConfig; print(AutoConfig.for_model('linmu_qwen2').model_type)"
    )
    assert python(code).splitlines()[0] == "linmu_qwen2"


def test_no_module_has_the_name_of_what_the_package_offers():
    """The command imports modules before the package's names: a module would be found in place of a function."""
    import linmu_models

    assert "convert" in linmu_models.__all__
    assert not set(linmu_models.__all__) & {path.stem for path in (ROOT / "linmu_models").iterdir()}


def test_without_binary_one_warning_says_how_to_build():
    text = python(f"import linmu_ops; {STEP * 2}", LINMU_NO_BINARY="1")
    assert text.count("LinmuWarning") == 1 and "LINMU_NO_BINARY is set" in text


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, without binaries."""
    shutil.copytree(ROOT / "linmu_ops", tmp_path / "linmu_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_not_built(copy):
    # An editable install would still find the compiled planner of the tree it points to.
    alone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]; "
    text = python(f"{alone}import linmu_ops; {STEP * 2} linmu_ops.TokenLayout([], [], 1, 4)", copy)
    assert text.count("LinmuWarning") == 2  # the ops and the planner, once each
    assert text.count("pip install --no-build-isolation -e .") == 2


def test_built_for_other_schemas(copy):
    needs_binary()
    shutil.copy(_native.HERE / "liblinmu_cpu.so", copy / "linmu_ops")
    file = copy / "linmu_ops" / "ssd_step.py"
    file.write_text(file.read_text().replace("bool normalize) ->", "bool normalize, int new=0) ->"))
    text = python("import linmu_ops; print(linmu_ops.explain('ssd_step')[0].why_not)", copy)
    assert "refused to register: it was built for other op schemas" in text and "pip install" in text


def test_not_a_library(copy):
    (copy / "linmu_ops" / "liblinmu_cpu.so").write_bytes(b"not a library")
    text = python(f"import linmu_ops; {STEP * 2}", copy)
    assert text.count("LinmuWarning") == 1 and "cannot be loaded by this torch" in text


def test_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import linmu_ops;"
        "print(linmu_ops.explain('ssd_scan', device='cuda')[2].why_not)"
    )
    assert python(code) == "triton is not installed\n"
