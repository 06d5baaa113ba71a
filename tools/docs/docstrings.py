"""Docstrings as mkdocstrings understands them: they are written to be read in the source; some sections are ours."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A title, then indented entries `name: text`. Those that the reader of Google's style knows are left to it.
SECTION = re.compile(r"^(?P<title>[A-Z][\w ,-]*):?\n(?P<entries>(?: {4}\w[\w, ]*: .*\n(?: {8}.*\n)*)+)", re.MULTILINE)
RETURNS = re.compile(r"^Returns:\n(?P<entries>(?: {4}.*\n)+)", re.MULTILINE)
KNOWN = ("Args", "Raises", "Notes", "Examples")


def listed(found: re.Match[str]) -> str:
    """The entries of a section as a list of Markdown, one item each."""
    if found["title"] in KNOWN:
        return found[0]
    items = re.sub(r"^ {4}(\w[\w, ]*): ", r"- `\1`: ", found["entries"], flags=re.MULTILINE)
    return f"**{found['title']}:**\n\n" + re.sub(r"^ {8}", "  ", items, flags=re.MULTILINE) + "\n"


def returned(found: re.Match[str]) -> str:
    """What is returned: an item for each name, or words."""
    text = re.sub(r"^ +", "", found["entries"], flags=re.MULTILINE)
    return "**Returns:**\n\n" + re.sub(r"^(\w+): ", r"- `\1`: ", text, flags=re.MULTILINE) + "\n"


def readable(text: str) -> str:
    text = re.sub(r"^Example:$", "Examples:", text + "\n", flags=re.MULTILINE)
    text = re.sub(r"(?<=[.;]) (?=[A-Z]\w+Error: )", "\n    ", text)  # one item for each kind of error
    # Products and powers are no emphasis; between backticks they stay.
    text = re.sub(r"(`[^`]*`)|(?<=\w)\*\*?(?=[\w-])| \*\* ", lambda m: m[1] or m[0].replace("*", "\\*"), text)
    return SECTION.sub(listed, RETURNS.sub(returned, text))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
