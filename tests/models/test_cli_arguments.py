"""Whatever is typed after `linmu`, what is wrong with it is said in one line, and no traceback is shown."""

from __future__ import annotations

import os
import shutil
import stat

import pytest
import torch
from typer.testing import CliRunner

from linmu_models import generate
from linmu_models.cli import app
from linmu_models.generate import convert_folder

from . import tiny
from .folders import tokenizer

BAD = os.fsdecode(b"na\xffme")
TWO = "two\nlines\x1b[31m[red]"
LONG, DIGITS = "x" * 5000, "9" * 5000
ASK = ("--prompt", "what?", "--max-new-tokens", "2")


@pytest.fixture(scope="module")
def places(folders, tmp_path_factory):
    """Names of folders and files of every wrong kind."""
    root = tmp_path_factory.mktemp("places")
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    for name, config in (("broken", "{"), ("list", "[]"), ("unknown", '{"model_type": "wibble"}')):
        (root / name).mkdir()
        (root / name / "config.json").write_text(config)
    for name in ("cut", "weightless", BAD):
        shutil.copytree(folders / "teacher", root / name)
    weights = (root / "cut" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(weights[:1000])
    (root / "weightless" / "model.safetensors").unlink()
    (root / "latin.toml").write_bytes(b"name = \xe9")
    (root / "deep.toml").write_text("name = " + "[" * 100_000)
    (root / "half.toml").write_text("name =")
    (root / "binary").write_bytes(bytes(range(256)) * 20)
    (root / "nothing").write_bytes(b"")
    os.mkfifo(root / "pipe")
    (root / TWO).write_text("x")
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root / "loop")
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    for name, text in (
        ("digits", f"seed = {DIGITS}"), ("twice", "seed = 1\nseed = 2"), ("surrogate", 'output = "\\ud800"'),
        ("null", 'output = "a\\u0000b"\nteacher = "t"'), ("large", "#" * 2**21),
        ("typed", 'output = "x"\nteacher = "t"\nseed = 1979-05-27'),
    ):  # fmt: skip
        (root / f"{name}.toml").write_text(text)
    for name, teacher, output in (
        ("no_teacher", root / "no" / "such", root / "new"), ("file_teacher", root / "file", root / "new"),
        ("file_output", folders / "teacher", root / "file"),
    ):  # fmt: skip
        (root / f"{name}.toml").write_text(f'teacher = "{teacher}"\noutput = "{output}"\n')
    convert_folder(folders / "teacher", root / "student")
    return {"root": root, "teacher": folders / "teacher", "new": root / "new", "state": root / "state",
            "absent": root / "no" / "such" / "x",
            "none": "", "long": LONG, "url": "https://example.org/a/b", "zero": "/dev/zero",
            "markup": "[/x]",
            **{p.name: p for p in root.iterdir()}}  # fmt: skip


def said(places, *arguments):
    words = [str(places[a[1:]]) if a.startswith("@") else a for a in arguments]
    result = CliRunner().invoke(app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    return result.exit_code, lines


NO_FILES = ["@long", "@markup", "@url", "@dangling", "@loop", "@socket", f"@{TWO}"]
FOLDERS = [
    "@absent", "@none", "@file", "@empty", "@broken", "@list", "@unknown", "@cut", "@weightless", f"@{BAD}", "@pipe",
    *NO_FILES,
]  # fmt: skip
ONE_LINE = [
    *(("convert", folder, "@new") for folder in FOLDERS),
    *(("generate", folder, *ASK) for folder in FOLDERS),
    *(("evaluate", folder) for folder in FOLDERS),
    *(("evaluate", "@teacher", "--teacher", folder) for folder in FOLDERS[:3]),
    *(("convert", "@teacher", out) for out in ("@none", "@file", "@teacher")),
    *(("convert", "@teacher", "@new", "--dtype", d) for d in ("float8_e4m3fn", "", "int8", "complex64", "x", "Tensor")),
    *(("generate", "@teacher", *ASK, "--dtype", d) for d in ("float8_e4m3fn", "", "bool", "x")),
    *(("generate", "@teacher", *ASK, "--device", d) for d in ("meta", "tpu", "mps", "fpga", "cuda:99", "x")),
    *(("convert", "@teacher", "@new", "--keep-attention", n) for n in ("99", "-9")),
    *(("convert", "@teacher", "@new", "--option", o) for o in (
        "", "=", "window", "window=1", "window=[1,2]", "text_window=1e12", "text_window=1000000000000",
        "text_window=-1", "initial_decay=NaN", "initial_scale=Infinity", "preset=x", "preset=[]", "preset=1",
        f"{BAD}=1", f"branches={BAD}", "z_gate=null", f"text_window={DIGITS}", f"{TWO}=1")),
    *(("evaluate", "@teacher", "--group", group, option, n) for group, option in (
        ("needle", "--frames"), ("page", "--lines"), ("needles", "--keys"), ("tracking", "--hops"),
        ("tracking", "--chains")) for n in ("1000000", "1" + "0" * 400)),
    ("convert", "@teacher", "@new", "--option", "text_window=16", "--option", "text_window=32"),
    ("convert", "@teacher", "@new", "--option", "window=" + "[" * 100_000),
    *((command, "@deep.toml") for command in ("distill", "plan", "answers")),
    *(("generate", "@student", *ASK, "--weights", "int8", o, "@state") for o in ("--load-state", "--save-state")),
    ("convert", "@teacher", "@new", "--option", "preset=paper", "--option", "preset=exact"),
    ("generate", "@teacher", *ASK, "--image", "/proc/self/mem"),
    ("generate", "@teacher", "--prompt", ""),
    ("generate", "@teacher", "--prompt", os.fsdecode(b"caf\xe9")),
    ("generate", "@teacher", "--prompt", "<image>"),
    ("generate", "@teacher", *ASK, "--temperature", "1e-300"),
    *(("generate", "@teacher", *ASK, kind, p) for kind in ("--image", "--video")
      for p in ("@absent", "@root", "@file", f"@{BAD}", *NO_FILES)),
    ("evaluate", "@teacher", "--group", ""), ("evaluate", "@teacher", "--split", "x"),
    ("evaluate", "@teacher", "--device", "x"), ("evaluate", "@teacher", "--group", BAD),
    *((command, p) for command in ("distill", "plan", "answers")
      for p in ("@absent", "@none", "@root", "@latin.toml", "@half.toml", "@file", "@binary", "@no_teacher.toml",
                "@file_teacher.toml", "@file_output.toml", "@digits.toml", "@twice.toml", "@surrogate.toml",
                "@null.toml", "@large.toml", "@typed.toml", "@zero", *NO_FILES) if (command, p) != ("plan",
                "@file_output.toml")),
    *(("generate", model, *ASK, option, p) for model in ("@student", "@teacher")
      for option in ("--load-state", "--save-state") for p in ("@root", "@absent", "@long", "@socket", "@loop")),
    *(("generate", "@student", *ASK, "--load-state", p) for p in ("@binary", "@file", "@nothing", "@pipe")),
    *(("generate", "@teacher", *ASK, "--image", p) for p in ("@binary", "@nothing", "@pipe")),
    *(("generate", "@teacher", *ASK, "--weights", w) for w in ("x", "")),
]  # fmt: skip


@pytest.mark.parametrize("arguments", ONE_LINE, ids=lambda a: " ".join(ascii(x)[1:-1][:40] for x in a))
def test_one_line(places, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, lines = said(places, *arguments)
    assert status == 1 and len(lines) == 1 and lines[0].startswith("linmu: "), lines
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("wibble",), ("convert",), ("convert", "@teacher"),
        ("convert", "@teacher", "@new", "--keep-attention", "x"),
        ("generate", "@teacher"), *(("generate", "@teacher", *ASK, *more) for more in (
            ("--frames", "0"), ("--frames", "-1"), ("--fps", "0"), ("--fps", "nan"), ("--temperature", "-1"),
            ("--temperature", "nan"), ("--temperature", "inf"), ("--max-new-tokens", "0"), ("--wibble",))),
        ("evaluate", "@teacher", "--samples", "0"), ("evaluate", "@teacher", "--seed", "-1"), ("distill",),
        *(("evaluate", "@teacher", option, n) for option in ("--samples", "--depths", "--frames", "--lines", "--keys")
          for n in ("nan", "1e3", "-1", DIGITS)),
        *(("evaluate", "@teacher", option, "1" + "0" * 400) for option in ("--samples", "--depths")),
        *(("plan", "@half.toml", option, n) for option in ("--gpus", "--memory", "--tflops", "--share")
          for n in ("nan", "inf", "-1", "1e400", "1" + "0" * 400)),
        *(("answers", "@half.toml", option, n) for option in ("--processes", "--batch") for n in ("0", "1" + "0" * 9)),
        *(("demo", option, n) for option, n in (
            ("--max-upload", "nan"), ("--max-upload", "inf"), ("--max-pixels", "1e9"), ("--port", "65536"),
            ("--max-new-tokens", "1" + "0" * 400))),
        ("distill", "@half.toml", "--ablate"), ("env", "--wibble"),
    ],
    ids=lambda a: " ".join(x[:40] for x in a),
)  # fmt: skip
def test_usage(places, arguments):
    assert said(places, *arguments)[0] == 2


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "linmu: stopped; nothing is left half done"),
        (MemoryError("Unable to allocate 3 TiB"), 1,
         "linmu: this takes more memory than there is: Unable to allocate 3 TiB"),
        (MemoryError(), 1, "linmu: this takes more memory than there is: MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), 1,
         "linmu: this takes more memory than there is: CUDA out of memory."),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), 1,
         "linmu: this takes more memory than there is: [enforce] DefaultCPUAllocator: can't allocate memory"),
        (ModuleNotFoundError("No module named 'x'"), 1, "linmu: No module named 'x': pip install 'linmu[models]'"),
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_what_may_end_any_command_has_one_line(places, monkeypatch, raised, status, line):
    def fail(*_, **__):
        raise raised

    for name in ("load", "convert_folder"):
        monkeypatch.setattr(generate, name, fail)
    if isinstance(raised, ModuleNotFoundError):
        commands = [("convert", "@teacher", "@new")]  # `generate` says what a reader lacks
    else:
        commands = [("convert", "@teacher", "@new"), ("generate", "@teacher", *ASK)]
    for words in commands:
        assert said(places, *words) == (status, [line])


@pytest.mark.parametrize("prompt", ["\0", "  ", "\ufffc", "\ue000", "é" * 3, "<unk>"])
def test_words_of_any_kind_are_answered(places, prompt):
    status, lines = said(places, "generate", "@teacher", "--prompt", prompt, "--max-new-tokens", "2")
    assert status == 0 or (status == 1 and len(lines) == 1)


def test_named_templates_are_kept(tmp_path):
    """Whatever a tokenizer or processor reads of the teacher's folder, it finds in the student's."""
    tiny.teacher("qwen2").save_pretrained(tmp_path / "teacher")
    words = tokenizer()
    words.chat_template = {"default": "a", "tool_use": "b", "rag": "c"}
    words.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "tokenization_own.py").write_text("")
    (tmp_path / "teacher" / "video_preprocessor_config.json").write_text("{}")
    (tmp_path / "teacher" / "normalizer.json").write_text("{}")
    convert_folder(tmp_path / "teacher", tmp_path / "student")
    theirs, mine = (tiny.hf.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("teacher", "student"))
    assert mine.chat_template == theirs.chat_template == words.chat_template
    assert type(mine) is type(theirs) and mine.get_vocab() == theirs.get_vocab()
    assert mine.init_kwargs.keys() == theirs.init_kwargs.keys() and mine("what?") == theirs("what?")
    own = {"config.json", "model.safetensors"}
    for file in (tmp_path / "teacher").rglob("*"):
        if file.is_file() and file.name not in own:
            kept = tmp_path / "student" / file.relative_to(tmp_path / "teacher")
            assert kept.read_bytes() == file.read_bytes(), file
