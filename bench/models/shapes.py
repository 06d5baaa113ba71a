"""Named sizes of vision-language models, and a teacher and a student of random weights in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf

import linmu_models
from linmu_ops import TokenLayout

SIDE = 16  # a frame is SIDE x SIDE tokens
TEXT = 64  # at least so many tokens of every prompt are text


@dataclass(frozen=True)
class Shape:
    """A model's sizes: `text` of the decoder, `vision` of its tower, as in the configuration of `family`."""

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]

    def with_layers(self, layers: int | None) -> Shape:
        """The same with another number of decoder layers; itself for None."""
        return self if layers is None else replace(self, text=self.text | dict(num_hidden_layers=layers))


def _qwen(hidden: int, layers: int, heads: int, groups: int, intermediate: int, **rest: Any) -> dict[str, Any]:
    half = hidden // heads // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=intermediate, rope_parameters=rope, max_position_embeddings=1 << 19, use_sliding_window=False,
        **(dict(vocab_size=151936) | rest),
    )  # fmt: skip


def _qwen_vision(out: int, intermediate: int) -> dict[str, Any]:
    return dict(
        depth=32, hidden_size=1280, intermediate_size=intermediate, num_heads=16, out_hidden_size=out,
        fullatt_block_indexes=[7, 15, 23, 31], patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
        window_size=112,
    )  # fmt: skip


TINY_VISION = dict(
    depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1],
    patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
)  # fmt: skip
SMOLVLM_TEXT = dict(
    model_type="llama", hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
    intermediate_size=8192, vocab_size=49280, max_position_embeddings=1 << 19, pad_token_id=2,
)  # fmt: skip
SMOLVLM_VISION = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
    patch_size=14,
)  # fmt: skip
SHAPES = {
    "tiny": Shape("qwen2_5_vl", _qwen(64, 2, 4, 2, 96, vocab_size=512), TINY_VISION),
    "0.5b": Shape("qwen2_5_vl", _qwen(896, 24, 14, 2, 4864, tie_word_embeddings=True), _qwen_vision(896, 3420)),
    "smolvlm": Shape("smolvlm", SMOLVLM_TEXT, SMOLVLM_VISION),
    "qwen-3b": Shape("qwen2_5_vl", _qwen(2048, 36, 16, 2, 11008, tie_word_embeddings=True), _qwen_vision(2048, 3420)),
    "qwen-7b": Shape("qwen2_5_vl", _qwen(3584, 28, 28, 4, 18944, vocab_size=152064), _qwen_vision(3584, 3420)),
}


def build(shape: Shape, dtype: torch.dtype, device: str, tower: bool = True, block: str = "exact") -> tuple[Any, Any]:
    """(teacher, student) of random weights that share everything but the blocks; without `tower`, a small tower.

    Args:
        block: the preset of the student's blocks.
    """
    text, vision = shape.text, shape.vision
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if shape.family == "qwen2_5_vl":
                if not tower:
                    vision = TINY_VISION | dict(out_hidden_size=text["hidden_size"])
                ids: dict[str, Any] = {
                    f"{n}_token_id": i for i, n in enumerate(("image", "video", "vision_start", "vision_end"), 3)
                }
                config: Any = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
                config.tie_word_embeddings = text.get("tie_word_embeddings", False)
                teacher: Any = hf.Qwen2_5_VLForConditionalGeneration(config)
            else:
                if not tower:
                    vision = vision | dict(num_hidden_layers=1)
                config = hf.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=3, scale_factor=3)
                teacher = hf.SmolVLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    teacher = teacher.eval().requires_grad_(False)
    teacher.set_attn_implementation("sdpa")
    student = linmu_models.convert(teacher, {"preset": block}, share_frozen=True).requires_grad_(False)
    return teacher, student


def frames_of(tokens: int) -> int:
    """How many frames a prompt of so many tokens holds, beside its text; at least one."""
    return max(1, (tokens - TEXT) // SIDE**2)


def video_layout(tokens: int, batch: int) -> TokenLayout:
    """Rows of half the text, one video, and the rest of the text."""
    frames = frames_of(tokens)
    size = frames * SIDE**2
    if size >= tokens:
        raise ValueError(f"bench: a prompt must hold a frame of {SIDE**2} tokens and text, got {tokens} tokens")
    first = (tokens - size) // 2
    positions = [p for _ in range(batch) for p in range(first, first + size)]
    return TokenLayout([(row, frames, SIDE, SIDE) for row in range(batch)], positions, batch, tokens)


def parameters(model: Any) -> int:
    """Parameters of the decoder and its output layer."""
    tensors = {p.data_ptr(): p.numel() for m in (model.get_decoder(), model.lm_head) for p in m.parameters()}
    return sum(tensors.values())
