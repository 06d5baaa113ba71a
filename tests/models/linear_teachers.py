"""Tiny language models of transformers with linear layers of their own."""

from __future__ import annotations

import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, intermediate_size=48, tie_word_embeddings=False,
)  # fmt: skip
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2, mamba_expand=2, mamba_chunk_size=16)
DELTA = dict(
    layer_types=["linear_attention", "full_attention"], head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
# Small numbers of each configuration, the type of its language model, and the layers that are linear.
CONFIGS = {
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=64, head_dim=8),
    "granitemoehybrid": MAMBA | dict(
        layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=48
    ),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=16, n_groups=2, expand=2, chunk_size=16),
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention"], head_dim=8, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16,
        n_groups=2, chunk_size=16,
    ),
    "zamba2": dict(
        layers_block_type=["mamba", "hybrid"], mamba_ngroups=2, n_mamba_heads=8, mamba_headdim=8, mamba_d_state=16,
        num_mem_blocks=1, chunk_size=16, attention_head_dim=16, adapter_rank=4,
    ),
    "qwen3_5": DELTA,
    "qwen3_5_moe": DELTA | EXPERTS,
    "qwen3_next": DELTA | EXPERTS,
}  # fmt: skip
TEXT = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}


@functools.cache
def model_of(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(TEXT.get(family, family), **COMMON | CONFIGS[family])
    return AutoModelForCausalLM.from_config(config).eval()


def ids(rows=2, length=37):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def cache_of(out):
    """(name, cache) of what a model returns; with layers that are all linear, the name is another."""
    name = "past_key_values" if hasattr(out, "past_key_values") else "cache_params"
    return name, getattr(out, name)
