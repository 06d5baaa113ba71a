"""Writes the table of families into docs/convert.md, as `linmu families` has it: `python -m tools.docs.families`."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "convert.md"
BEGIN, END = "<!-- families: written by `python -m tools.docs.families` -->\n", "<!-- end of families -->\n"


def table() -> str:
    from transformers.models.auto import modeling_auto

    from linmu_models import families

    pictures = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    classes = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | pictures
    rows = {True: "", False: ""}
    for name in families():
        seen = name in pictures
        rows[seen] += f"| `{name}` | `{classes[name]}` | {'images and text' if seen else 'text'} |\n"
    return f"\n| model type | class of the teacher | takes |\n|---|---|---|\n{rows[True]}{rows[False]}\n"


def parts(page: str) -> tuple[str, str, str]:
    """What is before, in and after the table."""
    before, _, rest = page.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside, after


if __name__ == "__main__":
    before, _, after = parts(PAGE.read_text())
    PAGE.write_text(before + BEGIN + table() + END + after)
