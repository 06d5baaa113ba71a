"""`linmu convert` and `linmu generate`, with a processor that needs no network."""

from __future__ import annotations

import json
import re

import pytest
import torch

import linmu_models
from linmu_models.generate import convert_folder, generate_text, load

from . import tiny
from .folders import run, tokenizer


def test_convert_and_generate(folders):
    out = folders / "student"
    result = run("convert", folders / "teacher", out, "--keep-attention", 1, "--option", "window=[2,2,2]")
    assert "2 linear layers, 1 with attention [1]" in result.output and "windows.q_proj.weight" in result.output
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


def test_families_are_listed():
    lines = {line.split()[0]: line for line in run("families").stdout.splitlines()}
    assert lines["qwen3_5"].split()[1:] == ["images", "and", "text", "adapter"]
    assert lines["llama"].split()[1:] == ["text", "adapter"]
    assert lines["got_ocr2"].endswith("images and text  generic (checked)")
    assert "images and text  refused: layer 0's PersimmonAttention must be softmax attention" in lines["fuyu"]
    assert set(linmu_models.families()) <= set(lines)
