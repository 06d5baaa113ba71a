"""The character-level tokenizer of the shipped teacher, and the files that transformers needs to ask it anything."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .assets import BLANK, DIGITS, LETTERS

PAD, BOS, EOS, UNK = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, BOS, EOS, UNK, VISION_START, VISION_END, IMAGE, VIDEO)
CHARACTERS = "\n ?" + BLANK + LETTERS + DIGITS
# What `Processor` makes of samples: media and question, a new line, the answer and its end, the next question.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == "image" %}
                {{- "<|vision_start|><|image_pad|><|vision_end|>" }}
            {%- elif part.type == "video" %}
                {{- "<|vision_start|><|video_pad|><|vision_end|>" }}
            {%- elif part.type == "text" %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- eos_token if message.role == "assistant" else "\\n" }}
{%- endfor %}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and Qwen2.5-VL's image and video placeholders; 48 tokens."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[VISION_START, VISION_END, IMAGE, VIDEO],
        image_token=IMAGE,
        video_token=VIDEO,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def save_processor(folder: Path, vision: Any) -> None:
    """Write tokenizer, chat template and image processor, with which `AutoProcessor` and `linmu generate` make of a
    picture and a question what `Processor` makes of a sample.

    Args:
        vision: the vision configuration of a model laid out as Qwen2.5-VL.
    """
    build_tokenizer().save_pretrained(folder)
    side = vision.patch_size * vision.spatial_merge_size
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        # Qwen2.5-VL's own takes videos too, for which it needs torchvision; of pictures both make the same.
        "processor_class": "PaddleOCRVLProcessor",
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": side**2, "longest_edge": 4096 * side**2},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
