"""A random teacher of two layers on disk, and the configuration of a run on it that takes seconds."""

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from linmu_distill.data import build_tokenizer
from linmu_distill.data.tokenizer import BOS, EOS, IMAGE, PAD, VIDEO, VISION_END, VISION_START, save_processor


def save_teacher(folder, seed=0):
    """A random teacher in `folder`, which is returned as a string."""
    tokenizer = build_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
                bos_token_id=token(BOS), eos_token_id=token(EOS), pad_token_id=token(PAD),
                rope_parameters={"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 3, 3]},
            ),
            vision_config=dict(
                depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=8,
                spatial_merge_size=2, temporal_patch_size=1, window_size=64, fullatt_block_indexes=[0],
                tokens_per_second=1,
            ),
            image_token_id=token(IMAGE), video_token_id=token(VIDEO), vision_start_token_id=token(VISION_START),
            vision_end_token_id=token(VISION_END), tie_word_embeddings=True,
        )
    )  # fmt: skip
    return _saved(model, folder)


def save_hybrid(folder):
    """A random Qwen3.5 in `folder`: a layer of the gated delta rule, and one of attention with gates."""
    tokenizer = build_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(
            text_config=dict(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
                bos_token_id=token(BOS), eos_token_id=token(EOS), pad_token_id=token(PAD),
                layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
                linear_key_head_dim=8, linear_value_head_dim=8,
                rope_parameters={
                    "rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 1, 1],
                    "partial_rotary_factor": 0.5,
                },
            ),
            vision_config=dict(
                depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=8,
                spatial_merge_size=2, temporal_patch_size=1, num_position_embeddings=64,
            ),
            image_token_id=token(IMAGE), video_token_id=token(VIDEO), vision_start_token_id=token(VISION_START),
            vision_end_token_id=token(VISION_END), tie_word_embeddings=True,
        )
    )  # fmt: skip
    return _saved(model, folder)


def _saved(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    save_processor(folder, model.config.vision_config)
    return str(folder)


def run_values(folder, teacher, **changes):
    """The configuration of a run of a few seconds."""
    steps = {f"stage{i}": {"steps": 2} for i in (1, 2, 3)}
    values = {
        "output": f"{folder}/r", "preset": "paper", "teacher": teacher, "max_new_tokens": 3,
        "data": {"batch_size": 2, "mixture": {"where": 1, "video": 1}},
        "evaluation": {"samples": {"where": 2, "video": 2}, "speed_lengths": [32, 64]},
        "checkpoint_every": 1, **steps,
    }  # fmt: skip
    return {**values, **changes}
