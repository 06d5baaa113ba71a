"""One file per family. It says where the visual tokens are, and what a block must know of the attention."""

from . import (
    gemma3,
    glm4v,
    internvl,
    lfm2_vl,
    llava,
    llava_next,
    llava_onevision,
    mistral3,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    smolvlm,
    text,
    video_llama_3,
)

__all__ = [
    "gemma3",
    "glm4v",
    "internvl",
    "lfm2_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
    "text",
    "video_llama_3",
]
