"""A model's folder that somebody edited, or that was cut: one line says which folder, and what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import linmu_models
from linmu_models.chat import ChatProcessor
from linmu_models.generate import load_model
from linmu_models.report import TransferReport
from linmu_ops import LinmuWarning

from . import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    linmu_models.convert(tiny.teacher("qwen2")).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "student"))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder, load=load_model):
    with pytest.raises(ValueError, match=r".") as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_hidden_layers": 5}, "IndexError"),
        ({"hidden_size": 0}, "ZeroDivisionError"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "wibble"}, "KeyError: 'wibble'"),
        ({"rope_parameters": {"rope_type": "wibble"}}, "wibble"),
        ({"dtype": "wibble"}, "wibble"),
        ({"vocab_size": 7}, "lm_head.weight must be (7, 48), got (320, 48)"),
        ({"intermediate_size": 32}, "do not fit its config.json"),
    ],
)
def test_config(folder, changes, word, caplog):
    edit(folder / "config.json", **changes)
    said = refusal(folder)
    assert not caplog.records
    assert word in said
    assert str(folder) in said


def test_blocks_that_are_not_those_of_the_weights(folder):
    field = json.loads((folder / "config.json").read_text())["linmu"]
    edit(folder / "config.json", linmu={**field, "keep_attention": [1]})
    assert "its weights lack model.layers.1.self_attn" in refusal(folder)
    edit(folder / "config.json", linmu={**field, "options": {**field["options"], "z_gate": False}})
    assert "the model of its config.json has no place for model.layers.0.self_attn.scan.z_proj" in refusal(folder)


def test_weights(folder):
    path = folder / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert refusal(folder).startswith(f"{folder}: SafetensorError")
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert "its weights lack model.norm.weight, one of 1 tensors" in refusal(folder)
    path.write_bytes(whole)
    assert isinstance(load_model(folder), torch.nn.Module)


def test_a_teacher_that_lacks_weights_is_told(tmp_path):
    tiny.teacher("qwen2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(LinmuWarning, match="lack model.norm.weight, one of 1 tensors, which start at random"):
        load_model(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\0", b"[1]", b"null", b'{"version": "1.0"}'])
def test_tokenizer(folders, tmp_path, data):
    folder = shutil.copytree(folders / "teacher", tmp_path / "teacher")
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises((ValueError, OSError)) as error:
        ChatProcessor.load(folder)
    assert "\n" not in str(error.value).strip() or isinstance(error.value, OSError)


@pytest.mark.parametrize(
    "template", ["{% for", "{{ raise_exception('system first') }}", "{{ messages[5].content.x }}", "{{ 1 / 0 }}"]
)
def test_chat_template(folders, template):
    chat = ChatProcessor.load(folders / "teacher")
    for speaker in (chat.processor, chat.tokenizer):
        if speaker is not None:
            speaker.chat_template = template
    with pytest.raises(ValueError, match=r"^chat template: ") as error:
        chat.ask("what?")
    assert "\n" not in str(error.value)


def test_a_chat_template_that_says_nothing(folders):
    chat = ChatProcessor.load(folders / "teacher")
    chat._speaker.chat_template = "{{ '' }}"
    with pytest.raises(ValueError, match="must make tokens of the words"):
        chat.ask("what?")


@pytest.mark.parametrize("value", ["x", 1.5, [1, [2]], [True], {"a": 1}])
def test_what_ends_an_answer(folders, tmp_path, value):
    folder = Path(shutil.copytree(folders / "teacher", tmp_path / "teacher"))
    edit(folder / "generation_config.json", eos_token_id=value)
    assert "generation_config.json" in refusal(folder, ChatProcessor.load)


def test_a_report_is_replaced_whole(tmp_path, monkeypatch):
    report = TransferReport("teacher", "linmu_qwen2", [], [0])
    report.save(tmp_path / "report.json")
    before = (tmp_path / "report.json").read_bytes()

    def cut(path, text, encoding):
        path.write_bytes(text.encode(encoding)[:5])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="no space"):
        TransferReport("another", "linmu_qwen2", [], [0]).save(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_bytes() == before
