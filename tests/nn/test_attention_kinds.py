"""Attention modules of others become blocks that are the same attention, or are refused by the name of what is lost."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from blocks import block_class
from torch import nn

from linmu_ops import MMATE, ExactMMATE, LinmuWarning, MMATEConfig
from linmu_ops.nn import EXACT

hf = pytest.importorskip("transformers")
ALONE = MMATEConfig(branches="swin", text_window=16)  # the windows, which hold every token here, and nothing else
D, H, P, L = 32, 4, 8, 7


def make(path, config):
    """A module of transformers, its first layer's, its weights off their start."""
    made = _class(path)
    config._attn_implementation = "eager"
    layer = dict(layer_idx=0, layer_id=0, is_causal=True, attention_type=getattr(config, "attention_layers", [""])[0])
    takes = inspect.signature(made).parameters
    attention = made(config, **{k: v for k, v in layer.items() if k in takes}).eval()
    with torch.no_grad():
        for p in attention.parameters():
            p.normal_(std=0.3)
    return attention


def small(name, **more):
    sizes = dict(
        hidden_size=D, num_attention_heads=H, num_hidden_layers=2, intermediate_size=32, vocab_size=11,
        num_key_value_heads=2, head_dim=P, pad_token_id=0,
    )  # fmt: skip
    return getattr(hf, name)(**{**sizes, **more})


def gpt2(**more):
    return hf.GPT2Config(n_embd=D, n_head=H, n_layer=2, attn_pdrop=0, resid_pdrop=0, **more)


def falcon(**more):
    return hf.FalconConfig(hidden_size=D, num_attention_heads=H, num_hidden_layers=2, vocab_size=11, **more)


def bigcode(**more):
    return hf.GPTBigCodeConfig(n_embd=D, n_head=H, n_layer=2, attn_pdrop=0, resid_pdrop=0, **more)


def gpt_neo(*kinds):
    return hf.GPTNeoConfig(
        hidden_size=D, num_heads=H, num_layers=2, attention_types=[[list(kinds), 1]], window_size=8,
        attention_dropout=0.0, resid_dropout=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def ministral3():
    config = small("Ministral3Config")
    config.rope_parameters["llama_4_scaling_beta"] = 0.1
    return config


TAKEN = {
    "llama": ("llama.modeling_llama.LlamaAttention", lambda: small("LlamaConfig")),
    "qwen3": ("qwen3.modeling_qwen3.Qwen3Attention", lambda: small("Qwen3Config")),
    "phi3": ("phi3.modeling_phi3.Phi3Attention", lambda: small("Phi3Config")),
    "gpt2": ("gpt2.modeling_gpt2.GPT2Attention", gpt2),
    "gpt_neox": ("gpt_neox.modeling_gpt_neox.GPTNeoXAttention", lambda: small("GPTNeoXConfig")),
    "falcon_heads": (
        "falcon.modeling_falcon.FalconAttention", lambda: falcon(multi_query=False, new_decoder_architecture=False),
    ),
    "falcon_multi_query": (
        "falcon.modeling_falcon.FalconAttention", lambda: falcon(multi_query=True, new_decoder_architecture=False),
    ),
    "falcon_groups": (
        "falcon.modeling_falcon.FalconAttention", lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    ),
    "bigcode_multi_query": ("gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention", lambda: bigcode(multi_query=True)),
    "bigcode_heads": ("gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention", lambda: bigcode(multi_query=False)),
    "dia_scale_1": ("dia.modeling_dia.DiaSelfAttention", lambda: small("DiaEncoderConfig", num_key_value_heads=H)),
    "gpt_neo_without_a_scale": ("gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention", lambda: gpt_neo("global", "local")),
    "modernbert": (
        "modernbert.modeling_modernbert.ModernBertAttention",
        lambda: small("ModernBertConfig", global_attn_every_n_layers=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
@torch.no_grad()
def test_is_the_same_attention(name):
    path, config = TAKEN[name]
    attention = make(path, config())
    h = torch.randn(2, L, D)
    mask = torch.full((2, 1, L, L), -1e9).triu(1)
    given = dict(
        hidden_states=h, attention_mask=mask, position_embeddings=(torch.ones(2, L, P), torch.zeros(2, L, P)),
        alibi=None, layer_past=None,
    )  # fmt: skip
    takes = inspect.signature(attention.forward).parameters
    call = {k: v for k, v in given.items() if k in takes or (k == "position_embeddings" and "kwargs" in takes)}
    if "position_embeddings" not in takes:
        call.pop("position_embeddings", None)
    expected = attention(**call)[0]
    for config in (ALONE, EXACT):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            block = block_class(config).from_attention(attention, config=config)
        torch.testing.assert_close(block(h), expected, rtol=1e-4, atol=1e-5)


def _class(path):
    module, name = path.rsplit(".", 1)
    return getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)


REFUSED = {
    "olmo2": ("olmo2.modeling_olmo2.Olmo2Attention", lambda: small("Olmo2Config"), "q_norm must be a norm of one head"),
    "gemma2": (
        "gemma2.modeling_gemma2.Gemma2Attention", lambda: small("Gemma2Config"),
        "attn_logit_softcapping, softcapping of scores",
    ),
    "gpt_oss": ("gpt_oss.modeling_gpt_oss.GptOssAttention", lambda: small("GptOssConfig"), "sinks, a parameter"),
    "qwen3_next": (
        "qwen3_next.modeling_qwen3_next.Qwen3NextAttention", lambda: small("Qwen3NextConfig"),
        "no place for an output gate",
    ),
    "bloom": (
        "bloom.modeling_bloom.BloomAttention",
        lambda: hf.BloomConfig(hidden_size=D, n_head=H, n_layer=2, attention_dropout=0.0), "alibi, ALiBi",
    ),
    "falcon_alibi": ("falcon.modeling_falcon.FalconAttention", lambda: falcon(alibi=True), "alibi, ALiBi"),
    "mpt": ("mpt.modeling_mpt.MptAttention", lambda: hf.MptConfig(d_model=D, n_heads=H), "position_bias, ALiBi"),
    "olmo_clipped": ("olmo.modeling_olmo.OlmoAttention", lambda: small("OlmoConfig", clip_qkv=1.0), "clip_qkv"),
    "mistral": (
        "mistral.modeling_mistral.MistralAttention", lambda: small("MistralConfig", sliding_window=8),
        "sliding_window must not be shorter than the block's windows of 512 tokens, got 8",
    ),
    "gpt_neo_local": (
        "gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention", lambda: gpt_neo("local", "global"),
        "window_size must not be shorter than the block's windows of 512 tokens, got 8",
    ),
    "falcon_h1_scaled_keys": (
        "falcon_h1.modeling_falcon_h1.FalconH1Attention", lambda: small("FalconH1Config", key_multiplier=0.5),
        "key_multiplier, a scale of the keys",
    ),
    "ministral3": (
        "ministral3.modeling_ministral3.Ministral3Attention", ministral3,
        "llama_4_scaling_beta, a temperature by position",
    ),
    "codegen": (
        "codegen.modeling_codegen.CodeGenAttention", lambda: hf.CodeGenConfig(n_embd=D, n_head=H, rotary_dim=4),
        "qkv_proj must order queries, keys and values in a way that is known",
    ),
    "gpt2_scaled_by_layer": (
        "gpt2.modeling_gpt2.GPT2Attention", lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    path, config, words = REFUSED[name]
    attention = make(path, config())
    with pytest.raises(ValueError, match=words) as error:
        ExactMMATE.from_attention(attention, config=EXACT, **(dict(num_heads=H) if name == "codegen" else {}))
    assert "\n" not in str(error.value)


def test_a_sliding_window_that_holds_the_blocks():
    path, config, _ = REFUSED["mistral"]
    MMATE.from_attention(make(path, config()), config=MMATEConfig(text_window=8))


class Diffusers(nn.Module):
    """As diffusers' Attention."""

    def __init__(self, **more):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.heads, self.scale, self.norm_q, self.residual_connection = H, 0.4, None, False
        self.to_out = nn.ModuleList([nn.Linear(D, D), nn.Dropout(0.0)])
        for name, value in more.items():
            setattr(self, name, value)


def test_diffusers():
    attention, h = Diffusers(), torch.randn(2, L, D)
    q, k, v = (p(h).unflatten(2, (H, P)).transpose(1, 2) for p in (attention.to_q, attention.to_k, attention.to_v))
    y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4)
    block = MMATE.from_attention(attention, config=MMATEConfig(branches="swin", window=(1, 1, L), image_window=None))
    torch.testing.assert_close(block(h, grid=(1, 1, L)), attention.to_out[0](y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    "more, words",
    [
        (dict(norm_q=nn.RMSNorm(D), norm_k=nn.RMSNorm(D)), "norm_q must be a norm of one head of 8 channels"),
        (dict(norm_q=nn.RMSNorm(P)), "must have norms of both queries and keys"),
        (dict(group_norm=nn.GroupNorm(4, D)), "group_norm, a module"),
        (dict(add_k_proj=nn.Linear(D, D)), "add_k_proj, a module"),
        (dict(qk_norm=nn.RMSNorm(P, elementwise_affine=False)), "qk_norm, a module"),
        (dict(residual_connection=True), "residual_connection"),
        (dict(rescale_output_factor=2.0), "rescale_output_factor"),
        (dict(is_cross_attention=True), "is_cross_attention"),
        (dict(logit_scale=nn.Parameter(torch.ones(H))), "logit_scale, a parameter"),
        (dict(scale=nn.Parameter(torch.ones(()))), "scale, a parameter"),
        (dict(gate_proj=nn.Linear(D, D)), "gate_proj, a module"),
        (dict(softcap=30.0), "softcap, softcapping of scores, which a block cannot do, got 30.0"),
        (dict(to_q=nn.Linear(D, 2 * D)), "no place for an output gate"),
        (dict(to_out=nn.Sequential(nn.Linear(D, D), nn.GELU())), "must have a projection for o"),
    ],
)
def test_what_a_block_has_no_place_for(more, words):
    with pytest.raises(ValueError, match=words):
        MMATE.from_attention(Diffusers(**more))


def test_pytorchs_own():
    with pytest.raises(ValueError, match="bias_k, a parameter"):
        MMATE.from_attention(nn.MultiheadAttention(D, H, add_bias_kv=True))
    with pytest.raises(ValueError, match="add_zero_attn, a key of zeros"):
        MMATE.from_attention(nn.MultiheadAttention(D, H, add_zero_attn=True))
    with pytest.raises(ValueError, match="must have a projection for q, k, v"):
        MMATE.from_attention(nn.MultiheadAttention(D, H, kdim=5, vdim=6))
    with pytest.warns(LinmuWarning, match=r"MultiheadAttention.dropout of 0.1 is left out"):
        MMATE.from_attention(nn.MultiheadAttention(D, H, dropout=0.1))


def test_quantised_weights_are_refused():
    attention = Diffusers()
    attention.to_k.weight = nn.Parameter(torch.zeros(D, D, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"Diffusers.to_k.weight must be of a float dtype, got uint8"):
        MMATE.from_attention(attention)


def test_fused_rows_must_fit():
    attention = nn.Module()
    attention.num_heads, attention.qkv, attention.proj = H, nn.Linear(D, 3 * D + 1), nn.Linear(D, D)
    with pytest.raises(ValueError, match=r"qkv must have \(H \+ 2 G\) P rows with H P = 32 and P = 8, got 97"):
        MMATE.from_attention(attention)
