"""`linmu convert` and `linmu generate`, with a processor that needs no network."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from linmu_models.cli import app
from linmu_models.generate import convert_folder, generate_text, load

from . import tiny

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer():
    vocab = {c: i for i, c in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(32, 127))])}
    vocab |= {f"<t{i}>": i for i in range(len(vocab), tiny.IMAGE)} | {"<image>": tiny.IMAGE}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return tiny.hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False, **names
    )


def run(*args, status=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.teacher("llava").save_pretrained(folder / "teacher")
    images = tiny.hf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = tiny.hf.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=TEMPLATE,
    )  # fmt: skip
    processor.save_pretrained(folder / "teacher")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def test_convert_and_generate(folders):
    out = folders / "student"
    result = run("convert", folders / "teacher", out, "--keep-attention", 1, "--option", "window=[2,2,2]")
    assert "2 linear layers, 1 with attention [1]" in result.output and "scan.c_proj.weight" in result.output
    saved = json.loads((out / "config.json").read_text())
    assert saved["linmu"]["keep_attention"] == [1] and saved["linmu"]["options"]["window"] == [2, 2, 2]
    arguments = ("generate", out, "--prompt", "what?", "--image", folders / "picture.png", "--max-new-tokens", 5)
    answer, said = run(*arguments).stdout, run(*arguments).stderr
    assert answer == run(*arguments).stdout and len(answer.strip()) > 0
    assert re.search(r"\d+ tokens in, 5 out; first after [\d.]+ s, then [\d.]+ tokens/s; state [\d.]+ MiB", said)
    torch.manual_seed(0)
    assert run(*arguments, "--temperature", 2.0, "--dtype", "bfloat16").stdout
    text = run("generate", out, "--prompt", "what?", "--max-new-tokens", 5).stdout
    assert text and text != answer


def test_answers_come_in_pieces(folders):
    convert_folder(folders / "teacher", folders / "plain")
    model, processor = load(folders / "plain", "cpu")
    pieces, options = [], dict(max_new_tokens=12, do_sample=False)
    answer = generate_text(model, processor, "what?", stream=pieces.append, **options)
    assert len(pieces) > 1 and "".join(pieces) == answer.text
    assert (answer.prompt_tokens, answer.tokens) == (5, 12) and answer.first_token_seconds > 0
    assert answer.tokens_per_second > 0
    one = generate_text(model, processor, "what?", **{**options, "max_new_tokens": 1})
    assert one.tokens_per_second is None and one.cache_bytes == answer.cache_bytes  # the state is of constant size
    with pytest.raises(ValueError, match="beam"):
        generate_text(model, processor, "what?", num_beams=2, **options)


def test_a_text_model(tmp_path):
    tiny.teacher("qwen2").save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    run("convert", tmp_path / "teacher", tmp_path / "student")
    assert run("generate", tmp_path / "student", "--prompt", "abc", "--max-new-tokens", 3).stdout


def test_errors_are_one_line(folders, tmp_path):
    wrong = run("convert", folders / "teacher", tmp_path / "x", "--option", "wibble=1", status=1)
    assert wrong.stderr.startswith("linmu: ") and "got wibble" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    config = tiny.hf.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    config.save_pretrained(tmp_path / "bert")
    wrong = run("convert", tmp_path / "bert", tmp_path / "x", status=1)
    assert "got 'bert'" in wrong.stderr
