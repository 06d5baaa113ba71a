"""Writes the tables of families into docs/convert.md, as `linmu families` has them: `python -m tools.docs.families`.

With `--check` it first asks the self check of the generic adapter about each type without an adapter of its own, and
writes the answers to `linmu_models/adapters/checked.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "convert.md"
CHECKED = ROOT / "linmu_models" / "adapters" / "checked.py"
BEGIN, END = "<!-- families: written by `python -m tools.docs.families` -->\n", "<!-- end of families -->\n"


def _rope(sections: list[int], part: float = 1.0) -> dict[str, Any]:
    kinds = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, "partial_rotary_factor": part}
    return {"rope_parameters": kinds}


# Where transformers' default configuration builds no model, or one that does not run: what its published ones have.
PUBLISHED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 11}},
    "emu3": {"vocabulary_map": {"<image>": 8711, "<|extra_200|>": 8712}},
    "ernie4_5_vl_moe": {"text_config": _rope([22, 22, 20])},
    "glm_ocr": {"text_config": _rope([8, 12, 12])},
    "glmga": {"text_config": _rope([8, 12, 12], 0.5)},
    "paddleocr_vl": {"text_config": _rope([16, 24, 24])},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 9, "vision_end_token_id": 10, "text_config": _rope([16, 24, 24]),
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 9, "vision_end_token_id": 10},
    "step3p7": {"text_config": {"sliding_window": 512}},
}  # fmt: skip


def verdict(model_type: str) -> str:
    """Why the generic adapter refuses a type; empty where it takes it."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from linmu_models.conversion import check_generic

    config = CONFIG_MAPPING[model_type](**PUBLISHED.get(model_type, {}))
    try:
        check_generic(config)
    except ValueError as error:
        try:
            with torch.device("meta"):
                made: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
                made(config)
        except ImportError:
            return "a package that it needs is not installed here: timm"
        except Exception:
            return "not known, as transformers' default configuration builds no model"
        return str(error).partition("the generic one refuses it: ")[2].replace("\u2011", "-")
    return ""


def write_verdicts() -> None:
    from linmu_models.adapters import generic

    lines = "".join(
        f"    {json.dumps(name)}: {json.dumps(verdict(name), ensure_ascii=False)},\n"
        for name in sorted(generic.types())
    )
    CHECKED.write_text(
        '"""What the self check says of each type that has no adapter: why the generic one refuses it, or nothing.\n\n'
        "Of default configurations of transformers 5.24; a teacher's own is checked when it is converted. Written by\n"
        '`python -m tools.docs.families --check`.\n"""\n\n'
        f"# ruff: noqa: E501\n\nCHECKED: dict[str, str] = {{\n{lines}}}\n"
    )


def table() -> str:
    from transformers.models.auto import modeling_auto

    from linmu_models import families
    from linmu_models.adapters.checked import CHECKED as verdicts

    pictures = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    classes = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | pictures
    rows = {True: "", False: ""}
    for name in families():
        seen = name in pictures
        rows[seen] += f"| `{name}` | `{classes[name]}` | {'images and text' if seen else 'text'} |\n"
    taken = ", ".join(f"`{name}`" for name, why in verdicts.items() if not why)
    refused = "".join(f"| `{name}` | {why.replace('|', '')} |\n" for name, why in verdicts.items() if why)
    return (
        f"\n| model type | class of the teacher | takes |\n|---|---|---|\n{rows[True]}{rows[False]}\n"
        f"| by the generic adapter, checked |\n|---|\n| {taken} |\n\n"
        f"| refused | why |\n|---|---|\n{refused}\n"
    )


def parts(page: str) -> tuple[str, str, str]:
    """What is before, in and after the table."""
    before, _, rest = page.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside, after


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        write_verdicts()
    before, _, after = parts(PAGE.read_text())
    PAGE.write_text(before + BEGIN + table() + END + after)
