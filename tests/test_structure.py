"""The rules of the source tree, each held by a check (CONTRIBUTING.md names them)."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import CASES, REVERSES, run_op, small_inputs

ROOT = Path(__file__).parents[1]
OPS = sorted(_registry.OPS)
WITHOUT_CUDA = re.search(r"set\(CPU_OPS ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
MAX_LINES = 600


def tracked(*suffixes):
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / f for f in done.stdout.splitlines() if f.endswith(suffixes) and (ROOT / f).exists()]


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_one_word_in_every_folder(op):
    files = ["linmu_ops/{}.py", "linmu_ops/reference/{}.py", "csrc/linmu/{}.h", "csrc/torch/{}.cpp", "csrc/cpu/{}.cpp"]
    files += ["tests/ops/test_{}.py"] + ["csrc/cuda/{}.cu"] * (op not in WITHOUT_CUDA)
    if (ROOT / "bench" / "ops").exists():
        files.append("bench/ops/{}.py")
    assert [f for f in files if not (ROOT / f.format(op)).exists()] == []
    assert op in CASES, "linmu_ops/_testing.py needs a small case of it"
    assert op in linmu_ops.__all__


@pytest.mark.parametrize("op", OPS)
def test_docs_have_a_row_and_a_page_for_the_op(op):
    assert f"| [`{op}`](ops/{op}.md) |" in (ROOT / "docs" / "ops.md").read_text()
    titles = [page.read_text().splitlines()[0] for page in (ROOT / "docs" / "kernels").glob("*.md")]
    assert any(op in re.split("[# ,]+", title) for title in titles), "docs/kernels/ needs a page of it"
    assert f"`{op}`" in linmu_ops.__doc__ and f"`{op}`" in (ROOT / "CHANGELOG.md").read_text()


def test_each_page_of_a_kernel_has_a_row():
    folder = ROOT / "docs" / "kernels"
    rows = set(re.findall(r"^\| \[\w+\]\((\w+\.md)\)", (folder / "README.md").read_text(), re.MULTILINE))
    assert rows == {page.name for page in folder.glob("*.md")} - {"README.md"}


def test_contributing_names_each_file_that_lists_the_ops():
    """Else a new op touches a file that nobody told of."""
    told = (ROOT / "CONTRIBUTING.md").read_text()
    told = told[told.index("## A new op\n") : told.index("## A new option")]
    differentiable = [op for op in OPS if _registry.OPS[op].backward]
    for file in tracked(*SOURCES, ".sh"):
        path, text = str(file.relative_to(ROOT)), file.read_text()
        if path != "CONTRIBUTING.md" and not path.startswith(GENERATED):
            ops = differentiable if path.startswith(("tests/ops/", "tests/fuzz/")) else OPS
            listed = all(re.search(rf"(\b|_){op}\b", text) for op in ops)
            assert not listed or f"`{path}`" in told, path


@pytest.mark.parametrize("name", [n for n in linmu_ops.__all__ if callable(getattr(linmu_ops, n))])
def test_public_names_have_docstrings(name):
    assert inspect.getdoc(getattr(linmu_ops, name))


def tensor_arguments(op):
    """{name: default} of the tensors that the op takes; `reverse_dt` is one of a scan's `reverse`."""
    parameters = inspect.signature(getattr(linmu_ops, op)).parameters
    tensors = {n: p.default for n, p in parameters.items() if "Tensor" in str(p.annotation)}
    return tensors | {f"reverse_{name}": None for name in (REVERSES[op]._fields if op in REVERSES else ())}


def documented_shapes(op):
    """{argument: [axes, ...]} from the lines "x: (B, L, Gx, P) ..." of the docstring, for tensors."""
    shapes = {}
    for prefix, documented in (("", getattr(linmu_ops, op)), ("reverse_", REVERSES.get(op, linmu_ops.Reverse))):
        text = inspect.getdoc(documented).split("Returns:")[0]
        for name, shape in re.findall(r"^    (\w+): (\(.*)", text, re.MULTILINE):
            if prefix + name in tensor_arguments(op):
                first = re.match(r"\([^)]*\)(?:(?:, | or )\([^)]*\))*", shape)
                alternatives = re.findall(r"\([^)]*\)", first[0])
                rows = ("B", "1")  # of "B or 1"
                shapes[prefix + name] = [a.replace("B or 1", n) for a in alternatives for n in rows]
    return shapes


@pytest.mark.parametrize("op", OPS)
def test_docstring_shapes_are_those_of_the_checks(op):
    shapes = documented_shapes(op)
    assert set(shapes) == set(tensor_arguments(op)), "every tensor has a shape"
    for name, alternatives in shapes.items():
        inputs = small_inputs(op)
        assert isinstance(inputs.get(name), torch.Tensor), f"the small case of {op} must give {name}"
        inputs[name] = inputs[name][None]
        with pytest.raises(ValueError) as caught:
            run_op(op, **inputs)
        quoted = re.match(rf"{op}: {name.replace('reverse_', 'reverse.')} must be (\([^)]*\))", str(caught.value))
        assert quoted and quoted[1] in alternatives, f"{caught.value} does not quote {alternatives}"


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_dense_tensor_is_a_type_error(op):
    """Each tensor as a number, a list, a sparse tensor; and None where it must be given."""
    tensors = tensor_arguments(op)
    for name, value in small_inputs(op).items():
        if isinstance(value, torch.Tensor):
            wrong = [1.0, value.tolist(), value.to_sparse()]
            wrong += [None] if tensors[name] is inspect.Parameter.empty else []
            named = name.replace("reverse_", "reverse.")
            for other in wrong:
                with pytest.raises(TypeError, match=rf"^{op}: {named} must be (a Tensor|dense), got \w+$"):
                    run_op(op, **{**small_inputs(op), name: other})


def test_kernels_know_no_torch():
    for file in tracked(".h", ".cpp", ".cu", ".cuh"):
        if file.parts[len(ROOT.parts) + 1] in ("linmu", "cpu", "cuda", "python"):
            includes = re.findall(r'#include\s*[<"]([^>"]+)', file.read_text())
            assert not [i for i in includes if re.match(r"(\.\./)?(torch|ATen|c10|caffe2)/", i)], file


# What each package may import of this project; benches and tests are for a checkout alone.
MAY_IMPORT = {
    "linmu_ops": {"linmu_ops"},
    "linmu_models": {"linmu_ops", "linmu_models"},
    "distill": {"linmu_ops", "linmu_models"},
}


def test_imports_go_one_way():
    """`distill/` is imported as linmu_distill, from within it by relative imports."""
    everywhere = {*MAY_IMPORT, "linmu_distill", "bench", "tests", "tools"}
    for file in tracked(".py"):
        allowed = MAY_IMPORT.get(file.relative_to(ROOT).parts[0], everywhere - {"distill"})
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top not in everywhere or top in allowed, f"{file.relative_to(ROOT)}:{node.lineno} imports {name}"


def test_importing_needs_no_module_of_one_system():
    """The wheel without binaries is for all of them. Training is for Linux."""
    of_one = {"fcntl", "grp", "msvcrt", "posix", "pwd", "resource", "syslog", "termios", "winreg"}
    for file in tracked(".py"):
        if file.relative_to(ROOT).parts[0] in ("linmu_ops", "linmu_models"):
            for node in ast.parse(file.read_text()).body:
                names = [getattr(node, "module", None)]  # of `from ... import`
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not of_one.intersection(names), f"{file}:{node.lineno}"


def test_a_cache_is_read_by_its_new_name():
    """transformers 5.24 warns of the old one, in the middle of an answer."""
    for file in tracked(".py"):
        path = file.relative_to(ROOT)
        if path.parts[0] in ("linmu_models", "distill") and "def output_cache" not in file.read_text():
            for node in ast.walk(ast.parse(file.read_text())):
                assert getattr(node, "attr", "") not in ("past_key_values", "cache_params"), f"{path}:{node.lineno}"


def imported(file, module, modules):
    """Which of `modules` the file imports: anywhere in it, for types only too."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in (f"{base}.{alias.name}" for alias in node.names):
                yield from {name if name in modules else base} & modules


def test_imports_have_no_circles():
    files = {}
    for file in tracked(".py"):
        path = file.relative_to(ROOT).with_suffix("")
        if len(path.parts) > 1 and path.parts[0] != "tests":
            parts = ["linmu_distill" if path.parts[0] == "distill" else path.parts[0], *path.parts[1:]]
            files[".".join(parts[:-1] if file.name == "__init__.py" else parts)] = file
    graph = {module: set(imported(file, module, set(files))) - {module} for module, file in files.items()}
    assert sum(map(len, graph.values())) > len(files)
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_types_of_every_package_are_checked():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    folders = {file.relative_to(ROOT).parts[0] for file in tracked(".py")} - {"tests"}
    assert {(ROOT / folder).resolve() for folder in folders} == {(ROOT / path).resolve() for path in settings["files"]}
    assert [o["module"] for o in settings["overrides"] if o.get("ignore_errors")] == ["linmu_ops.triton_kernels.*"]


def test_a_command_names_what_can_be_imported():
    for file in tracked(".md", ".toml", ".py", ".sh", "Makefile"):
        assert not re.search(r"-m distill\b|\bdistill\.\w+:\w", file.read_text()) or file == Path(__file__), file


SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", "CMakeLists.txt", "Makefile")


def test_no_file_is_long():
    long = {f.name: n for f in tracked(*SOURCES) if (n := f.read_bytes().count(b"\n")) > MAX_LINES}
    assert not long


def test_each_test_file_has_its_own_name():
    """pytest can't collect two files of one name from folders that are no packages."""
    files = [f for f in tracked(".py") if f.name.startswith("test_") and not (f.parent / "__init__.py").exists()]
    assert not [name for name, n in Counter(f.name for f in files).items() if n > 1]


def test_no_test_imports_another():
    """What tests share is in a module of its own, or in a conftest.py."""
    imports = re.compile(r"^\s*(?:from|import) (?:[^\n(]|\([^)]*\))*?\btest_\w+", re.MULTILINE)
    for file in tracked(".py"):
        found = imports.search(file.read_text()) if file.relative_to(ROOT).parts[0] == "tests" else None
        assert not found, f"{file.relative_to(ROOT)}: {found[0].strip()}"


def test_nothing_is_left_to_do():
    for file in tracked(*SOURCES):
        if file != Path(__file__):
            assert not re.search(r"\b(TODO|FIXME|XXX)\b", file.read_text()), file


# Written by programs.
GENERATED = ("bench/reports/", "bench/results/", "distill/results/", "distill/teachers/")
WIDTH = 120


def pages(but=GENERATED):
    """(page, [(line number, line), ...] outside of blocks of code) for each page, by default that somebody wrote."""
    for file in tracked(".md"):
        if not str(file.relative_to(ROOT)).startswith(but):
            code, lines = False, []
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if line.lstrip().startswith("```"):
                    code = not code
                elif not code:
                    lines.append((number, line))
            yield file, lines


def test_no_line_of_a_page_is_long():
    long = [
        f"{file.relative_to(ROOT)}:{number}"
        for file, lines in pages()
        for number, line in lines
        if len(line) > WIDTH and not line.startswith(("|", "    "))
    ]
    assert not long


def test_links_and_images_exist():
    missing = []
    for file, lines in pages(but=()):
        for number, line in lines:
            for target in re.findall(r"\]\(([^)\s]+)\)", line):
                if not re.match(r"https?://|#", target) and not (file.parent / target.split("#")[0]).exists():
                    missing.append(f"{file.relative_to(ROOT)}:{number}: {target}")
    assert not missing


def test_pictures_of_pages_are_small():
    for file, lines in pages(but=()):
        for _, line in lines:
            for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", line):
                assert (file.parent / target).stat().st_size < 60_000, target


def test_environment_variables_are_documented():
    """Every LINMU_* variable that is read has a row in ENVS.md that names the file, and the other way round."""
    rows = {
        line.split("`")[1]: line for line in (ROOT / "ENVS.md").read_text().splitlines() if line.startswith("| `LINMU_")
    }
    read = {}
    for file in tracked(".py", ".h", ".cpp", ".cu", ".cuh"):
        where = file.relative_to(ROOT)
        if where.parts[0] != "tests":
            for name in re.findall(r"(?:environ(?:\.get)?|getenv)\s*[(\[]\s*[\"'](LINMU_\w+)", file.read_text()):
                read.setdefault(name, set()).add(str(where))
    assert set(rows) == set(read)
    for name, files in read.items():
        assert any(f"`{f}`" in rows[name] for f in files), f"{name} is read in {files}"
