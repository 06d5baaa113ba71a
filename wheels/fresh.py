"""Tries wheels where nothing else of ours is: in new environments, with no checkout in sight.

    python -m wheels.fresh FILE.whl ... [--python PATH ...] [--torch REQUIREMENT ...] [--venv FOLDER ...]

For each --python (this one where none is named) and each --torch (the version that is here) an environment is made, by
pip alone; --venv tries one that is there and has a PyTorch. Then `linmu env` tries each op, and a smoke test the rest
of what was installed. A line for each says how it went; the exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SMOKE = """
import importlib.metadata, importlib.util, json, sys, warnings
import torch, linmu_ops
from linmu_ops import _native, _registry
from linmu_ops.env import main as env
assert linmu_ops.__file__.startswith(FOLDER), linmu_ops.__file__
compiled = any(str(f).endswith(".so") for f in importlib.metadata.files("linmu")) if WHOLE else COMPILED
error = _registry.binaries()["cpu"].error
assert not error if compiled else error.startswith("not built"), error
assert list(_native.planners()) == ["liblinmu_cpu.so"] * compiled, _native.planner_errors()
if not compiled:
    warnings.simplefilter("ignore", linmu_ops.LinmuWarning)
x, dt, A = torch.randn(1, 40, 2, 16, requires_grad=True), torch.rand(1, 40, 2), -torch.rand(2)
B, C = torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
y = linmu_ops.ssd_scan(x, dt, A, B, C)
torch.testing.assert_close(torch.compile(linmu_ops.ssd_scan, backend="aot_eager", fullgraph=True)(x, dt, A, B, C), y)
for block in (linmu_ops.MMATE(dim=32, num_heads=2), linmu_ops.ExactMMATE(dim=32, num_heads=2)):
    tokens = torch.randn(1, 2 * 3 * 4, 32, requires_grad=True)
    block(tokens, grid=(2, 3, 4)).sum().backward()
    assert tokens.grad.isfinite().all()
done = ["ops and blocks"]
if importlib.util.find_spec("transformers"):
    import linmu_models
    from transformers import Qwen2Config, Qwen2ForCausalLM
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    teacher = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1)).eval()
    ids, greedy = torch.arange(30)[None], dict(max_new_tokens=5, do_sample=False)
    student = linmu_models.convert(teacher)
    assert torch.equal(student.generate(ids, **greedy), teacher.generate(ids, **greedy))
    done.append("a converted model")
print(", ".join(done))
"""


def smoke(folder: str, whole: bool = True, compiled: bool = True) -> str:
    """The code of the test: of an installation under `folder`; of one that pip knows, or else of unpacked files."""
    return f"FOLDER, WHOLE, COMPILED = {folder!r}, {whole}, {compiled}\n{SMOKE}"


def tried(python: Path, wheels: list[str]) -> str:
    """Install the wheels into an environment that has a PyTorch, and try them; what came of it."""
    # Nothing of this checkout, and no other environment's packages.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LINMU_"))}
    with tempfile.TemporaryDirectory() as nowhere:

        def run(*words: str) -> str:
            done = subprocess.run([str(python), *words], cwd=nowhere, env=clean, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError((done.stdout + done.stderr).strip())
            return done.stdout

        run("-m", "pip", "install", "-q", "--no-compile", "--force-reinstall", "--no-deps", *wheels)
        run("-m", "pip", "install", "-q", "--no-compile", *wheels)  # what they need, beside the PyTorch that is there
        run("-m", "linmu_ops.env")
        return run("-c", smoke(str(python.parents[1]))).strip()


def new(folder: Path, python: str, torch: str) -> Path:
    subprocess.check_call([python, "-m", "venv", str(folder)])
    made = folder / "bin" / "python"
    subprocess.check_call([str(made), "-m", "pip", "install", "-q", "--no-compile", torch])
    return made


def described(python: Path) -> str:
    code = "import platform, torch; print('Python', platform.python_version() + ', PyTorch', torch.__version__)"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip() or str(python)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wheels.fresh", description="Try wheels in new environments.")
    parser.add_argument("wheels", nargs="+")
    parser.add_argument("--python", action="append")
    parser.add_argument("--torch", action="append")
    parser.add_argument("--venv", action="append", default=[])
    asked = parser.parse_args(arguments)
    wheels = [str(Path(file).resolve()) for file in asked.wheels]
    pythons = asked.python or ([] if asked.venv else [sys.executable])
    torches = asked.torch or [f"torch=={importlib.metadata.version('torch')}"]
    failed = 0

    def tell(python: Path) -> None:
        nonlocal failed
        try:
            result = tried(python, wheels)
        except RuntimeError as error:
            failed += 1
            result = f"FAILED\n{error}"
        print(f"{described(python)}: {result}", flush=True)

    for folder in asked.venv:
        tell(Path(folder).resolve() / "bin" / "python")
    for interpreter in pythons:
        for torch in torches:
            with tempfile.TemporaryDirectory(prefix="linmu-fresh-") as folder:
                tell(new(Path(folder), interpreter, torch))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
