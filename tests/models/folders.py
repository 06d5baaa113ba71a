"""Folders of a tiny teacher with a tokenizer or processor that needs no network, and the command `linmu` on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from linmu_models.cli import app

from . import tiny

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer() -> Any:
    """One token a character."""
    vocab = {c: i for i, c in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(32, 127))])}
    vocab |= {f"<t{i}>": i for i in range(len(vocab), tiny.IMAGE)} | {"<image>": tiny.IMAGE}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False, **names
    )


def save_llava(folder: Path) -> None:
    """A teacher with its processor."""
    tiny.teacher("llava").save_pretrained(folder)
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = hf.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=TEMPLATE,
    )  # fmt: skip
    processor.save_pretrained(folder)


def run(*args: object, status: int = 0) -> Any:
    """`linmu` with these words; it must end with `status`."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, (result.output, result.exception)
    return result
