"""Whole linear layers of transformers on our kernels: decoded tokens leave the same states, and norms the same rows."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import transformers

from linmu_models import accelerate
from linmu_models.accelerate import CLASSES, FAMILIES, accelerate_transformers
from linmu_ops import LinmuWarning, use_impl
from tests.models.linear_teachers import cache_of, ids, model_of

NORMS = [(family, names[1]) for family, names in CLASSES.items() if len(names) > 1]


def decoded(model, tokens, cache, name="past_key_values"):
    """Logits of one token after another, and every state after them."""
    logits = [model(input_ids=tokens[:, t : t + 1], use_cache=True, **{name: cache}).logits for t in range(4)]
    states = [
        t
        for layer in cache.layers
        if hasattr(layer, "conv_states")
        for t in (layer.conv_states[0], layer.recurrent_states[0])
    ]
    return torch.cat(logits, 1), [t for t in states if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_after_decoding(family, dtype):
    """Of rows that were padded too. They stay where they were: nothing but the cache holds them."""
    model, tokens = copy.deepcopy(model_of(family)).to(dtype), ids(length=13)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    out = model(input_ids=tokens[:, :9], attention_mask=mask, use_cache=True)
    name, theirs = cache_of(out)
    ours = copy.deepcopy(theirs)
    places = {id(layer): layer.recurrent_states[0] for layer in ours.layers if hasattr(layer, "recurrent_states")}
    want, states = decoded(model, tokens[:, 9:], theirs, name)
    with accelerate_transformers(model):
        got, after = decoded(model, tokens[:, 9:], ours, name)
    exact = dtype == torch.float32
    near = dict(rtol=2e-4, atol=2e-5) if exact else dict(rtol=0.1, atol=0.05)
    torch.testing.assert_close(got, want, **near)
    assert len(after) == len(states) >= 2
    for mine, other in zip(after, states, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, **near)
    held = {id(layer): layer.recurrent_states[0] for layer in ours.layers if hasattr(layer, "recurrent_states")}
    assert all(held[layer] is place for layer, place in places.items())


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5"])
@torch.no_grad()
def test_other_implementations_serve_a_decoded_token(family):
    model, tokens = model_of(family), ids(length=8)
    with accelerate_transformers(model):
        want = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
        with use_impl("*:reference"):
            got = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5"])
@torch.no_grad()
def test_a_token_under_autocast(family):
    """After a prompt without it."""
    model, tokens = model_of(family), ids(length=10)
    out = model(input_ids=tokens[:, :9], use_cache=True)
    name, cache = cache_of(out)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(input_ids=tokens[:, 9:], use_cache=True, **{name: copy.deepcopy(cache)}).logits

    want = run()
    with accelerate_transformers(model):
        torch.testing.assert_close(run(), want, rtol=0.05, atol=0.02)


# Of more tokens of the delta rule transformers' own backward pass fails there.
AFTER_A_CACHE = [
    pytest.param(
        "mamba2", 1, marks=pytest.mark.skipif(transformers.__version__ < "5.24", reason="5.23's own pass fails too")
    ),
    ("mamba2", 3), ("qwen3_5", 1), ("qwen3_next", 1),
]  # fmt: skip


@pytest.mark.parametrize(("family", "length"), AFTER_A_CACHE)
def test_gradients_after_a_cache(family, length):
    """One token or more go through the layer's own forward, and the cache is written to before the backward pass."""
    model, tokens = model_of(family), ids(length=7 + length)

    def gradient():
        with torch.no_grad():
            out = model(input_ids=tokens[:, :7], use_cache=True)
        name, cache = cache_of(out)
        logits = model(input_ids=tokens[:, 7:], use_cache=True, **{name: cache}).logits
        weight = next(p for n, p in model.named_parameters() if n.endswith("in_proj.weight") or "in_proj_qkv" in n)
        return torch.autograd.grad(logits.square().sum(), weight)[0]

    want = gradient()
    with accelerate_transformers(model):
        torch.testing.assert_close(gradient(), want, rtol=2e-3, atol=2e-5)


def test_a_forward_that_we_do_not_know_stays(monkeypatch):
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    model, tokens = model_of("mamba2"), ids(length=6)

    def forward(self, *args, **kwargs):
        return 2 * theirs(self, *args, **kwargs)

    theirs = module.Mamba2Mixer.forward
    monkeypatch.setattr(module.Mamba2Mixer, "forward", forward)
    accelerate._registry._warned.discard(("accelerate_transformers", "Mamba2Mixer"))
    want = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with pytest.warns(LinmuWarning, match="accelerate_transformers: Mamba2Mixer.forward is not the one that we know"):
        accelerated = accelerate_transformers(model)
    with accelerated:
        assert module.Mamba2Mixer.forward is forward
        assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None), want)


@pytest.mark.parametrize(("family", "name"), NORMS)
@torch.no_grad()
def test_norms(family, name):
    """Of gates that lie in a wider tensor, and of values that are not finite."""
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    delta = "qwen" in family
    for groups in (1,) if delta else (1, 4):
        norm = kind(32, eps=1e-5) if delta else kind(32, group_size=32 // groups, eps=1e-5)
        torch.nn.init.normal_(norm.weight)
        x, gate = torch.randn(23, 32), torch.randn(23, 80)[:, 3:35]
        if not delta:
            x, gate = x[None], gate[None]
        with_nan = x.clone()
        with_nan[..., 5, 7], with_nan[..., 9, 3] = torch.nan, torch.inf
        for dtype in (torch.float32, torch.bfloat16):
            for values in (x, with_nan, 1e-8 * x, x[..., :0, :]):
                args = (values.to(dtype), gate[..., : values.shape[-2], :].to(dtype))
                want = norm(*args)
                with accelerate_transformers():
                    got = norm(*args)
                assert got.dtype == want.dtype
                torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-6)
    y = norm(x, gate)
    with accelerate_transformers():
        torch.testing.assert_close(norm(x.contiguous(), gate.contiguous()), y)
