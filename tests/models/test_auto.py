"""Whatever Auto class of transformers knows a teacher knows its student: models, processors, tokenizers, pipelines."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
import torch
import transformers as hf

import linmu_models
from linmu_models.auto import auto_models
from linmu_models.generate import convert_folder
from linmu_models.modeling import FAMILIES

from . import tiny
from .folders import save_llava


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}

    def get(family):
        if family not in folders:
            student = linmu_models.convert(tiny.teacher(family), tiny.NARROW)
            folders[family] = tmp_path_factory.mktemp(family), student
            student.save_pretrained(folders[family][0])
        return folders[family]

    return get


@pytest.mark.parametrize("family", tiny.BUILDERS)
def test_every_auto_class_that_knows_the_teacher(family, saved):
    folder, student = saved(family)
    mine = dict(auto_models(type(student.config)))
    inputs = tiny.example(family, "image") or tiny.example(family, "text")
    for auto, theirs in auto_models(type(tiny.teacher(family).config)):
        if not issubclass(type(tiny.teacher(family).config), theirs.config_class):
            continue  # a model around the teacher
        assert issubclass(mine[auto], theirs), auto
        model = tiny.aligned(auto.from_pretrained(folder).eval())
        assert type(model) is mine[auto]
        with torch.no_grad():
            if isinstance(student, theirs):
                assert torch.equal(model(**inputs).logits, student(**inputs).logits)
            elif auto is hf.AutoModel:
                out, expected = (m(**inputs).last_hidden_state for m in (model, student.model))
                assert torch.equal(out, expected)
            else:  # another head; a prefix of its own means that transformers loads none of the teacher either
                assert any(isinstance(m, linmu_models.LinmuAttention) for m in model.modules())
                body = getattr(model, model.base_model_prefix)
                if theirs.base_model_prefix == type(student).base_model_prefix:
                    expected = student.state_dict()
                    assert all(torch.equal(p, expected[f"model.{n}"]) for n, p in body.state_dict().items())


def test_a_model_without_its_head_is_saved_whole(saved, tmp_path):
    folder, student = saved("llava")
    hf.AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path).eval()
    inputs = tiny.example("llava", "image")
    with torch.no_grad():
        assert torch.equal(again(**inputs).last_hidden_state, student.model(**inputs).last_hidden_state)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder / "teacher")
    convert_folder(folder / "teacher", folder / "student")
    return folder


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines(llava, task):
    from PIL import Image

    if task == "any-to-any":
        pytest.importorskip("torchvision")  # transformers asks for it
    content = [{"type": "image", "image": Image.new("RGB", (70, 60), "red")}, {"type": "text", "text": "what?"}]
    said = [
        hf.pipeline(task, str(llava / name), device="cpu")(
            text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False, do_sample=False
        )
        for name in ("teacher", "student")
    ]
    assert said[0][0]["generated_text"] == said[1][0]["generated_text"]  # all of it lies within the windows


def test_inputs_are_found_by_the_configuration_alone(llava, tmp_path):
    """Where no file names the class of a processor or tokenizer, the model's type decides."""
    for name in ("teacher", "student"):
        target = tmp_path / name
        target.mkdir()
        for file in (llava / name).iterdir():
            if file.suffix in (".json", ".jinja"):
                text = file.read_text()
                if file.name == "processor_config.json":
                    values = json.loads(text)
                    inner = values.pop("image_processor", {})
                    (target / "preprocessor_config.json").write_text(
                        json.dumps({**inner, "image_processor_type": None})
                    )
                    text = json.dumps({k: v for k, v in values.items() if k != "processor_class"})
                if file.name == "tokenizer_config.json":
                    values = json.loads(text)
                    text = json.dumps(
                        {k: v for k, v in values.items() if k not in ("tokenizer_class", "processor_class")}
                    )
                (target / file.name).write_text(text)
    for auto in (hf.AutoProcessor, hf.AutoTokenizer, hf.AutoImageProcessor):
        teacher, student = (type(auto.from_pretrained(tmp_path / name)) for name in ("teacher", "student"))
        assert teacher is student, auto


def test_tokenizer_mapping_is_the_teachers():
    from transformers.models.auto import tokenization_auto as auto

    for kind, family in FAMILIES.items():
        config = family.config_class
        assert auto.TOKENIZER_MAPPING_NAMES.get(f"linmu_{kind}") == auto.TOKENIZER_MAPPING_NAMES.get(kind)
        wrong = auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        assert (config.model_type in wrong) == (kind in wrong)


def test_remote_code_names_the_package(saved):
    """Without this project installed, the message names what to install, not a module."""
    code = (saved("qwen2")[0] / "modeling_linmu.py").read_text()
    ast.parse(code)
    from transformers.dynamic_module_utils import get_imports

    assert "linmu_models" not in get_imports(saved("qwen2")[0] / "modeling_linmu.py")
    blocked = f"import sys\nsys.modules['linmu_models'] = None\n{code}"
    result = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this model needs the package linmu") and "linmu[models]" in last
