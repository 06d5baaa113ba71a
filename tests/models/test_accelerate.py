"""transformers' own linear models give the same with our kernels: logits, states, tokens and gradients."""

from __future__ import annotations

import functools
import gc
import importlib

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import linmu_models
from linmu_models import mixers
from linmu_models.accelerate import CLASSES, FAMILIES, FORWARDS, OURS, accelerate_transformers, families_of
from tests.models.linear_teachers import COMMON, cache_of, ids, model_of


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
        name, cache = cache_of(out)
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
    """Every forward that we know is reached; every function too, by a layer whose own forward stays."""
    called = set()
    for table in (OURS, FORWARDS):
        for name, ours in table.items():
            monkeypatch.setitem(table, name, functools.partial(record, called, ours.__name__, ours))
    model, tokens = model_of(family), ids(length=5)
    run = functools.partial(model.generate, tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with accelerate_transformers(model):
        run()
    names = [name for name in FAMILIES[family] if "split" not in name]  # of a layer in training
    prefill = {OURS[name].args[1] for name in names if "update" not in name and "recurrent" not in name}
    norm = {"norm_then_gate" if "qwen" in family else "gate_then_norm"} if len(CLASSES[family]) > 1 else set()
    assert called == prefill | norm | {"gated_delta" if "qwen" in family else "mamba2"}
    called.clear()
    monkeypatch.setattr(mixers, "_states", lambda *_: None)
    with accelerate_transformers(model):
        run()
    assert called >= {OURS[name].args[1] for name in names}


def record(called, name, ours, *args, **kwargs):
    called.add(name)
    return ours(*args, **kwargs)


def functions():
    modules = {f: importlib.import_module(f"transformers.models.{f}.modeling_{f}") for f in FAMILIES}
    found = {(f, name): getattr(modules[f], name) for f, names in FAMILIES.items() for name in names}
    return found | {(f, name): getattr(modules[f], name).forward for f, names in CLASSES.items() for name in names}


def test_undone_again_and_nested():
    # A hybrid student of another test has its kernels as long as it lives: its functions are left out.
    gc.collect()
    before = {k: f for k, f in functions().items() if getattr(f, "__module__", "").startswith("transformers.")}
    outer = accelerate_transformers()
    assert not any(functions()[k] is f for k, f in before.items())
    inner = accelerate_transformers(model_of("mamba2"))
    outer.undo()
    left = {k for k, f in before.items() if functions()[k] is not f}
    assert left == {("mamba2", name) for name in (*FAMILIES["mamba2"], *CLASSES["mamba2"])}
    outer.undo(), inner.undo(), inner.undo()
    assert before == {k: f for k, f in functions().items() if k in before}


def linear_layer(family):
    return next(m for m in model_of(family).modules() if type(m).__name__ == CLASSES[family][0])


def numbers_of(bounds, dtype=torch.int32):
    return torch.arange(len(bounds) - 1).repeat_interleave(torch.tensor(bounds).diff())[None].to(dtype)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_kept_apart(family, training):
    """By either name of what tells them, and by both. Without a package of kernels transformers refuses them."""
    layer, tokens = linear_layer(family), torch.randn(1, 30, 32)
    bounds, numbers = torch.tensor([0, 12, 30], dtype=torch.int32), numbers_of([0, 12, 30])
    ways = (dict(seq_idx=numbers), dict(cu_seq_lens_q=bounds), dict(seq_idx=numbers, cu_seq_lens_q=bounds))
    layer.train(training)
    with accelerate_transformers():
        want = torch.cat([layer(tokens[:, :12]), layer(tokens[:, 12:])], 1)
        for way in ways:
            torch.testing.assert_close(layer(tokens, **way), want, msg=lambda m, w=way: f"{sorted(w)}: {m}")
    layer.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [3, 7], ids=["shorter than the filter", "after a cache"])
@torch.no_grad()
def test_packed_rows_with_a_cache(family, cut):
    """The convolution then has inputs before the tokens of the row."""
    layer, tokens = linear_layer(family), torch.randn(1, 30, 32)
    end = 3 if cut == 3 else 30
    with accelerate_transformers():
        want = torch.cat([layer(tokens[:, : cut - 1]), layer(tokens[:, cut - 1 : end])], 1)
        for told in ("seq_idx", "cu_seq_lens_q"):
            cache, begin = DynamicCache(config=model_of(family).config), 0 if cut == 3 else 5
            before = [layer(tokens[:, :begin], cache)] if begin else []
            bounds = [0, cut - 1 - begin, end - begin]
            way = {told: numbers_of(bounds, torch.int64) if told == "seq_idx" else torch.tensor(bounds)}
            got = torch.cat([*before, layer(tokens[:, begin:end], cache, **way)], 1)
            torch.testing.assert_close(got, want, msg=lambda m, t=told: f"{t}: {m}")


@torch.no_grad()
def test_packed_rows_that_are_not_ours():
    """Of a filter that ours does not take: transformers refuses them, and is told of bounds too."""
    layer, tokens = linear_layer("qwen3_5"), torch.randn(2, 30, 32)
    bounds = torch.tensor([0, 12, 30])
    with accelerate_transformers():
        with pytest.raises(ValueError, match="hidden_states must be one row with cu_seq_lens_q, got 2"):
            layer(tokens, cu_seq_lens_q=bounds)
        convolve = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5").causal_conv1d_fn
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            convolve(torch.randn(1, 6, 30), torch.randn(6, 9), activation="silu", cu_seq_lens_q=bounds)


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
