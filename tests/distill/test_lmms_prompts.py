"""The ids that the plugin for lmms-eval gives a model are those of transformers' own `apply_chat_template`."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import linmu_distill

pytest.importorskip("accelerate")
STUBS = {  # lmms-eval brings hundreds of packages; of it the plugin needs these names
    "lmms_eval": (), "lmms_eval.api": (), "lmms_eval.models": (), "lmms_eval.protocol": ("ChatMessages",),
    "lmms_eval.api.instance": ("GenerationResult", "Instance", "TokenCounts"), "lmms_eval.api.model": ("lmms",),
    "lmms_eval.models.registry_v2": ("ModelManifest",), "lmms_eval.utils": ("Collator",),
}  # fmt: skip
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {"plain": TURNS, "bos": "{{ bos_token }}" + TURNS}
ADDED = {"none": None, "bos": "<bos> $A"}
QUESTIONS = [(0, "what?"), (1, "what is it?"), (2, "which?")]


@pytest.fixture
def plugin(monkeypatch):
    for name, attributes in STUBS.items():
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {"__init__": lambda self, **_: None}))
        monkeypatch.setitem(sys.modules, name, module)
    path = Path(linmu_distill.__file__).parent / "lmms.py"
    spec = importlib.util.spec_from_file_location("linmu_distill.lmms_with_stubs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Linmu


class AddsNothing(hf.LlavaProcessor):
    """Never lets its tokenizer add special tokens, as LFM2-VL's, whose images need torchvision."""

    text_kwargs = {"add_special_tokens": False}  # noqa: RUF012  # as transformers declares it


KINDS = {"llava": hf.LlavaProcessor, "adds_nothing": AddsNothing}


def llava(template, added, kind):
    """A processor of characters."""
    vocab = {t: i for i, t in enumerate([*SPECIAL, *map(chr, range(32, 127))])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if ADDED[added]:
        inner.post_processor = processors.TemplateProcessing(single=ADDED[added], special_tokens=[("<bos>", 1)])
    tokens = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return KINDS[kind](
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATES[template],
    )  # fmt: skip


class Chat:
    """A user's words behind images, as lmms-eval hands it over."""

    def __init__(self, images, words):
        self.images = [Image.new("RGB", (40, 60 + i), "red") for i in range(images)]
        self.words = words

    def to_hf_messages(self):
        parts = [{"type": "image", "image": image} for image in self.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.words}]}]

    def extract_media(self):
        return self.images, [], []


class Asked(Exception):
    """Carries what a model was asked."""


class Model:
    device, dtype, generation_config = torch.device("cpu"), torch.float32, None

    def generate(self, **inputs):
        raise Asked(inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_those_of_the_chat_template(plugin, template, added, kind):
    asks = plugin.__new__(plugin)
    asks.processor, asks.model = llava(template, added, kind), Model()
    asks.tokenizer = asks.processor.tokenizer
    chats = [Chat(*question) for question in QUESTIONS]
    for batch in ([chat] for chat in chats), [chats]:
        for some in batch:
            with pytest.raises(Asked) as asked:
                asks._answer(some, {})
            (given,) = asked.value.args
            for chat, row, mask in zip(some, given["input_ids"], given["attention_mask"], strict=True):
                want = llava(template, added, kind).apply_chat_template(
                    chat.to_hf_messages(), tokenize=True, return_dict=True, add_generation_prompt=True
                )["input_ids"][0]
                assert row[mask.bool()].tolist() == list(want)
                assert mask.diff().min() >= 0  # padding on the left
