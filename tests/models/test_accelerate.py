"""transformers' own linear models give the same with our kernels: logits, states, tokens and gradients."""

from __future__ import annotations

import functools
import gc
import importlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import linmu_models
from linmu_models.accelerate import FAMILIES, OURS, accelerate_transformers, families_of

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


def with_and_without(run):
    """What `run` gives by transformers alone, and by ours; none of theirs may have been called then."""
    want = run()
    with accelerate_transformers():
        got = run()
    return got, want


def close(got, want):
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_left_padding(family):
    model, tokens = model_of(family), ids()
    mask = torch.ones_like(tokens)
    mask[0, :11] = 0
    with torch.no_grad():
        close(*with_and_without(lambda: model(input_ids=tokens).logits))
        got, want = with_and_without(lambda: model(input_ids=tokens, attention_mask=mask).logits)
    close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_and_single_tokens_with_a_cache(family):
    model, tokens = model_of(family), ids()

    def run():
        out, logits = model(input_ids=tokens[:, :20], use_cache=True), []
        cache = out.past_key_values if hasattr(out, "past_key_values") else out.cache_params
        name = "past_key_values" if hasattr(out, "past_key_values") else "cache_params"
        for a, b in ((20, 33), (33, 34), (34, 35), (35, 37)):
            logits.append(model(input_ids=tokens[:, a:b], use_cache=True, **{name: cache}).logits)
        return torch.cat(logits, 1)

    with torch.no_grad():
        close(*with_and_without(run))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens(family):
    model, tokens = model_of(family), ids(length=9)
    run = functools.partial(model.generate, tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    got, want = with_and_without(run)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient(family):
    model, tokens = model_of(family), ids()

    def run():
        model.train()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        model.eval()
        return {n: g for n, g in zip(names, grads, strict=True) if g is not None}

    got, want = with_and_without(run)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_run_in_place_of_theirs(family, monkeypatch):
    """Every function of the family is reached by prefill, or by a step."""
    called = set()
    for name, ours in OURS.items():
        monkeypatch.setitem(OURS, name, functools.partial(record, called, name, ours))
    model, tokens = model_of(family), ids(length=5)
    with accelerate_transformers(model), torch.no_grad():
        model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert called == set(FAMILIES[family])


def record(called, name, ours, *args, **kwargs):
    called.add(name)
    return ours(*args, **kwargs)


def functions():
    modules = {f: importlib.import_module(f"transformers.models.{f}.modeling_{f}") for f in FAMILIES}
    return {(f, name): getattr(modules[f], name) for f, names in FAMILIES.items() for name in names}


def test_undone_again_and_nested():
    gc.collect()  # a hybrid student has its kernels as long as it lives
    before = functions()
    outer = accelerate_transformers()
    assert not any(f is before[k] for k, f in functions().items())
    inner = accelerate_transformers(model_of("mamba2"))
    outer.undo()
    left = {k for k, f in functions().items() if f is not before[k]}
    assert left == {("mamba2", name) for name in FAMILIES["mamba2"]}
    outer.undo(), inner.undo(), inner.undo()
    assert functions() == before


def test_packed_rows_are_kept_apart():
    """Without a package of kernels transformers refuses them."""
    model, tokens = model_of("qwen3_5").model.layers[0].linear_attn, torch.randn(1, 30, 32)
    with accelerate_transformers(), torch.no_grad():
        packed = model(tokens, cu_seq_lens_q=torch.tensor([0, 12, 30]), seq_idx=(torch.arange(30) >= 12).int()[None])
        parts = [model(tokens[:, :12]), model(tokens[:, 12:])]
    torch.testing.assert_close(packed, torch.cat(parts, 1))


def test_refusals(monkeypatch):
    tiny = LlamaForCausalLM(LlamaConfig(**COMMON | dict(num_hidden_layers=1)))
    assert families_of(tiny) == []
    with pytest.raises(ValueError, match=r"accelerate_transformers: model must have layers of bamba, .*, got LlamaFor"):
        linmu_models.accelerate_transformers(tiny)
    with pytest.raises(TypeError, match=r"accelerate_transformers: model must be a torch.nn.Module, got str"):
        linmu_models.accelerate_transformers("mamba2")
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    before = functions()
    monkeypatch.delattr(module, "mamba2_chunk_scan")
    with pytest.raises(ImportError, match=r"must be 5\.24 or like it, got .*, whose mamba2 has no mamba2_chunk_scan"):
        linmu_models.accelerate_transformers()
    monkeypatch.undo()
    assert functions() == before
