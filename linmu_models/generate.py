"""From folders to folders and to text: what `linmu convert` and `linmu generate` do; and decoding made fast."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, CompileConfig, GenerationMixin

from .config import parse_mmate
from .convert import convert
from .modeling import AUTO_CLASSES, FAMILIES
from .report import TransferReport

# Everything a processor or tokenizer is loaded from, beside the weights and the model's own configuration.
PROCESSOR_FILES = (
    "*processor_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "*.model",
)  # fmt: skip


def convert_folder(
    teacher: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: dict[str, Any] | None = None,
    keep_attention: Iterable[int] = (),
    dtype: str = "auto",
) -> TransferReport:
    """Load a teacher, make it linear, and save it with the teacher's processor.

    Args:
        teacher: folder of a saved model, or its name on the hub.
        out: folder to make.
        config, keep_attention: as in `convert`.
        dtype: "auto" (as saved), or a torch dtype such as "bfloat16".

    Raises:
        ValueError: not a family that can be converted, or an unknown option. OSError: no such model.
    """
    folder = Path(teacher)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(teacher)))
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind not in FAMILIES:
        raise ValueError(f"convert: teacher's model type must be one of {', '.join(sorted(FAMILIES))}, got {kind!r}")
    options = parse_mmate(config or {})
    auto = AUTO_CLASSES[FAMILIES[kind].auto_class]
    student = convert(auto.from_pretrained(folder, dtype=dtype), options, keep_attention)
    student.save_pretrained(out)
    for pattern in PROCESSOR_FILES:
        for file in folder.glob(pattern):
            shutil.copy2(file, Path(out) / file.name)
    return student.linmu_report


def load(folder: str | os.PathLike[str], device: str | None = None, dtype: str = "auto") -> tuple[GenerationMixin, Any]:
    """(model, processor, or tokenizer of a text-only model) of a saved model, linear or not, on `device`."""
    config = AutoConfig.from_pretrained(folder)
    name = "AutoModelForImageTextToText" if "vision_config" in config.sub_configs else "AutoModelForCausalLM"
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AUTO_CLASSES[name].from_pretrained(folder, dtype=dtype).to(where).eval()
    reader = AutoProcessor if name == "AutoModelForImageTextToText" else AutoTokenizer
    return model, reader.from_pretrained(folder)


def generate_text(
    model: Any,
    processor: Any,
    prompt: str,
    images: Sequence[str | os.PathLike[str]] = (),
    videos: Sequence[str | os.PathLike[str]] = (),
    **options: Any,
) -> str:
    """Answer one prompt about images and videos.

    Args:
        model, processor: from `load`.
        prompt: the user's words; put into the processor's chat template, where it has one.
        images, videos: paths; they come before the words.
        options: of transformers' `generate`.
    """
    inputs = _inputs(processor, prompt, [os.fspath(i) for i in images], [os.fspath(v) for v in videos])
    inputs = inputs.to(model.device)
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    out = model.generate(**inputs, **options)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def fast_decode(**compile_options: Any) -> dict[str, Any]:
    """Options of `generate` with which the step of one token is compiled, once: `generate(**inputs, **fast_decode())`.

    The state then keeps its place in memory (transformers' static cache), the step is one graph that updates it there,
    and on a GPU it is captured and replayed as a CUDA graph. The graph depends on the batch size and on whether rows
    are padded, not on the length of prompt or answer, and serves later calls too. The tokens are those of a plain
    `generate`. transformers compiles greedy decoding and sampling; beams run as they are. Compiling takes tens of
    seconds, which pays on a GPU; on a CPU only where operators' overhead is a large part of the time (small models).

    Args:
        compile_options: of transformers' `CompileConfig`, i.e. of `torch.compile`; mode "reduce-overhead" if left out.
    """
    config = CompileConfig(**compile_options)
    config._compile_all_devices = True  # transformers would not compile on a CPU
    return {"cache_implementation": "static", "compile_config": config}


def _inputs(processor: Any, prompt: str, images: list[str], videos: list[str]) -> Any:
    if getattr(processor, "chat_template", None):
        content: Any = [
            *({"type": "image", "path": path} for path in images),
            *({"type": "video", "path": path} for path in videos),
            {"type": "text", "text": prompt},
        ]
        text_only = not hasattr(processor, "tokenizer")
        chat = [{"role": "user", "content": prompt if text_only else content}]
        return processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    if videos:
        raise ValueError("generate: a video needs a processor with a chat template, got one without")
    if not images:
        return processor(text=[prompt], return_tensors="pt")
    from PIL import Image

    text = processor.image_token * len(images) + prompt
    return processor(text=[text], images=[Image.open(path).convert("RGB") for path in images], return_tensors="pt")
