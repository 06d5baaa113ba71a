"""Gradients: with and without checkpointing, into every part of a block, and with adapters on top."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import linmu_models

from . import tiny

MLPS = (
    r"(?!.*vision).*\.layers\.\d+\.(mlp\.|feed_forward\.|feed_forward\.shared_expert\.)"
    r"(gate_proj|up_proj|gate_up_proj|down_proj|w[123])"
)


def grads(model, inputs):
    model.zero_grad()
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    return out.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


PAPERS = {"preset": "literal", "z_gate": True, "head_norm": True}


@pytest.mark.parametrize("options", [tiny.NARROW, PAPERS], ids=["exact", "paper"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma3"])
def test_gradients_reach_every_part_of_a_block(family, options):
    model = linmu_models.convert(tiny.teacher(family), options)
    _, found = grads(model, tiny.example(family, "images"))
    blocks = [n for n, _ in model.get_decoder().named_parameters() if ".self_attn." in n]
    prefix = next(n for n, m in model.named_modules() if m is model.get_decoder())
    for name in blocks:
        assert f"{prefix}.{name}" in found, name
        # k has no bias that matters: softmax does not see it; the scan does.
        if not name.endswith("windows.k_proj.bias"):
            assert found[f"{prefix}.{name}"].abs().max() > 0, name


@pytest.mark.parametrize(
    "family, reentrant", [*((f, False) for f in tiny.BUILDERS), ("qwen2_5_vl", True), ("llava_next", True)]
)
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    model = linmu_models.convert(tiny.teacher(family), tiny.NARROW, keep_attention=[1])
    inputs = tiny.example(family, "images") or tiny.example(family, "text")
    model.train()
    loss, expected = grads(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, found = grads(model, inputs)
    assert loss == again and expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_cache_inside_a_checkpoint_is_refused(reentrant):
    """The layer's second run would start from what its first had added."""
    model = linmu_models.convert(tiny.teacher("qwen2"), tiny.NARROW)
    hidden = torch.randn(1, 5, model.config.hidden_size, requires_grad=True)
    block, cache = model.model.layers[0].self_attn, DynamicCache(config=model.config)

    def train():
        checkpoint(lambda h: block(h, cache=cache)[0], hidden, use_reentrant=reentrant).sum().backward()

    with pytest.raises(RuntimeError, match="cache must be None inside a checkpoint"):
        train()


@pytest.mark.parametrize("family", list(tiny.BUILDERS))
def test_adapters_train_and_merge(family, tmp_path):
    model = linmu_models.convert(tiny.teacher(family), tiny.NARROW)
    inputs = tiny.example(family, "images") or tiny.example(family, "text")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=MLPS))
    for name, p in adapted.named_parameters():
        if ".self_attn." in name and "vision" not in name and "visual" not in name:
            p.requires_grad_(True)
    adapted.enable_input_require_grads()
    adapted.train()
    before = copy.deepcopy({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {n for n, p in adapted.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert any("lora_B" in n for n in moved) and any("windows.q_proj" in n for n in moved)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**inputs).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path)
        loaded = tiny.aligned(getattr(tiny.hf, model.auto_class).from_pretrained(tmp_path))
        assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)
