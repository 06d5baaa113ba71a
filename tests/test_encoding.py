"""Files of text are UTF-8, whatever the locale says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The place of `encoding` among the arguments of a method of a path, the path itself left out.
PLACES = {"read_text": 0, "write_text": 1, "open": 2}


def of_the_locale(source):
    """Lines that read or write text in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if is_method else getattr(node.func, "id", "")
        if name not in PLACES or (not is_method and name != "open"):
            continue
        if is_method and name == "open" and getattr(node.func.value, "id", "") in ("os", "av", "Image", "safetensors"):
            continue
        before = 0 if is_method else 1  # the path
        arguments = node.args[before:]
        modes = [a.value for a in arguments[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        modes += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
        if name == "open" and any("b" in mode for mode in modes):
            continue
        if len(arguments) <= PLACES[name] and "encoding" not in {k.arg for k in node.keywords}:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("package", ["linmu_ops", "linmu_models", "distill"])
def test_every_text_file_names_its_encoding(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    assert not [f"{f.relative_to(ROOT)}:{n}" for f in files for n in of_the_locale(f.read_text("utf-8"))]


def test_what_has_no_encoding_is_found():
    of_it = "p.read_text()\np.write_text(x)\np.open('w')\nopen(p)\nopen(p, 'a')\np.open(mode='r')"
    assert of_the_locale(of_it) == [1, 2, 3, 4, 5, 6]
    assert not of_the_locale("p.read_text('utf-8')\np.write_text(x, encoding='utf-8')\np.open('rb')\nos.open(p, 0)")
