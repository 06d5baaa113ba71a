"""A tokenizer with a chat template, processors that need no network, and files to read."""

import io
import json

import av
import datasets
import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
)

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% elif c.type == 'video' %}VIDEO"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<unk>", "<|start|>", "<|end|>", "<image>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>",
           "<|vision_end|>"]  # fmt: skip


def tokenizer(image, video=""):
    """One token a character; `image` and `video` are what the template writes for one."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "\n", *map(chr, range(32, 127))])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>",
        additional_special_tokens=[token for token in SPECIAL if token not in ("<pad>", "<unk>", "<|end|>")],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    out.chat_template = TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)
    return out


def language_model(vocab_size, tokens, **more):
    """A tiny Llama whose predictions differ from token to token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokens.eos_token_id,
                    pad_token_id=tokens.pad_token_id, bos_token_id=None, **more)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def qwen_folder(folder):
    """A folder with the configuration and the processor of a tiny Qwen2.5-VL."""
    tokens = tokenizer("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
    ids = tokens.convert_tokens_to_ids
    Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32,
                           patch_size=7, window_size=28, fullatt_block_indexes=[0]),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    ).save_pretrained(folder)  # fmt: skip
    tokens.save_pretrained(folder)
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    Qwen2VLImageProcessorPil(patch_size=7, size=sizes).save_pretrained(folder)
    return folder


def llava_folder(folder):
    """The same of a LLaVA, which takes no videos."""
    tokens = tokenizer("<image>")
    LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
        ),
        vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                       image_size=28, patch_size=14),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    ).save_pretrained(folder)  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor=images, tokenizer=tokens, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=tokens.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def png(seed, height=40, width=60):
    """Bytes of a picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_video(path, frames=40, height=48, width=64, fps=10):
    """A video whose frame i has the grey 5 * i; cut short, it still opens."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 5
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 5 * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def talk(question, answer):
    """A conversation of LLaVA's."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_json(path, value):
    path.write_text(json.dumps(value))
    return str(path)


ONEVISION = Features(
    {
        "id": Value("string"),
        "image": datasets.Image(),
        "conversations": List({"from": Value("string"), "value": Value("string")}),
        "data_source": Value("string"),
    }
)


def onevision(path, images, group=5):
    """A parquet file of LLaVA-OneVision-Data's; `images` maps an id to bytes or None."""
    rows = [
        {"id": name, "image": data and {"bytes": data, "path": None}, "data_source": "made up",
         "conversations": talk(f"<image>\nwhat is {name}?" if data else f"say {name}", f"it is {name}")}
        for name, data in images.items()
    ]  # fmt: skip
    Dataset.from_list(rows, features=ONEVISION).to_parquet(str(path), batch_size=group)
    return str(path)
