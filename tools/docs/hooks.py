"""Files outside docs/ become pages of the site where a page links to them: Markdown as it is, source as code.

Their place in the site is `repo/` and their path, so links between them hold. mkdocs calls the functions by name.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
CODE = {".py": "python", ".toml": "toml", ".sh": "bash", ".json": "json", ".jsonl": "json"}
CODE |= dict.fromkeys((".h", ".cpp", ".cu", ".cuh"), "cpp")
PICTURES = (".svg", ".png", ".jpg")
LARGE = 200_000  # bytes of source that no page should show
OUTWARD: dict[str, set[str]] = defaultdict(set)


def pieces(text: str) -> list[str]:
    """Prose and fenced code in turns, prose first; joined they are the text."""
    return re.split(r"(^[ ]*```.*?^[ ]*```[^\n]*$)", text, flags=re.MULTILINE | re.DOTALL)


def source(uri: str) -> Path:
    """The file of the checkout that a page of the site shows."""
    shown = PurePosixPath(uri)
    if shown.parts[0] != "repo":
        return DOCS / shown
    path = ROOT / PurePosixPath(*shown.parts[1:])
    return path if path.exists() else path.with_suffix("")


def place(path: Path) -> str | None:
    """Where in the site a file of the checkout is shown; None if it is not."""
    if path.is_dir():
        path = path / "README.md"
    if not path.is_file() or not path.is_relative_to(ROOT):
        return None
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    inside = f"repo/{path.relative_to(ROOT).as_posix()}"
    if path.suffix == ".md" or path.suffix in PICTURES:
        return inside
    return f"{inside}.md" if path.suffix in CODE and path.stat().st_size < LARGE else None


def linked(path: Path, target: str) -> str | None:
    return place(Path(os.path.normpath(path.parent / target.split("#")[0])))


def is_outward(target: str) -> bool:
    return re.match(r"\w+:|#", target) is not None


def text_of(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".md":
        return text
    name = path.relative_to(ROOT).as_posix()
    return f'# `{name}`\n\n````{CODE[path.suffix]} linenums="1"\n{text}\n````\n'


def on_files(files: Any, config: Any) -> Any:
    ahead = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    ahead += re.findall(r"repo/\S+\.md", str(config["nav"]).replace("'", " ").replace("}", " "))
    have = {file.src_uri for file in files}
    done: set[str] = set()
    while ahead:
        uri = ahead.pop()
        if uri in done:
            continue
        done.add(uri)
        path = source(uri)
        if path.suffix in PICTURES:
            if uri not in have:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
            continue
        if uri not in have:
            files.append(File.generated(config, uri, content=text_of(path)))
        if path.suffix == ".md":
            for prose in pieces(path.read_text())[::2]:
                for _, target, _ in LINK.findall(prose):
                    if not is_outward(target) and (there := linked(path, target)):
                        ahead.append(there)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are on disk, made links of the site; what the site does not show stays as words."""
    uri = page.file.src_uri
    path = source(uri)
    if path.suffix != ".md":
        return markdown

    def moved(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        if is_outward(target):
            if target.startswith("http"):
                OUTWARD[target].add(uri)
            return found[0]
        there = linked(path, target)
        if there is None:
            return before[1:-2]
        anchor = f"#{target.partition('#')[2]}" if "#" in target else ""
        return before + os.path.relpath(there, PurePosixPath(uri).parent) + anchor + after

    return "".join(piece if i % 2 else LINK.sub(moved, piece) for i, piece in enumerate(pieces(markdown)))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Pictures of ops lie in the page itself: there they follow the palette that the reader chose."""

    def inline(found: re.Match[str]) -> str:
        path = DOCS / PurePosixPath(page.file.src_uri).parent / found[1]
        return path.read_text() if path.parent == DOCS / "ops" else found[0]

    return re.sub(r'<img [^>]*src="([^"]+\.svg)"[^>]*/?>', inline, html)


def searchable(output: str) -> str:
    """The theme would fetch what lets a page that was opened as a file search; here it is in the page."""
    shim = (Path(__file__).parent / "search.js").read_text()
    return output.replace('<script src="https://unpkg.com/iframe-worker/shim"></script>', f"<script>{shim}</script>")


def on_post_page(output: str, page: Any, config: Any) -> str:
    return searchable(output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    return searchable(output_content)


def on_post_build(config: Any) -> None:
    """Links to elsewhere are not followed: a build needs no network. They are listed, for who wants to try them."""
    lines = [f"{target}  {' '.join(sorted(pages))}\n" for target, pages in sorted(OUTWARD.items())]
    (Path(config["site_dir"]).parent / "external-links.txt").write_text("".join(lines))
