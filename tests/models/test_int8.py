"""Weights of 8 bits are the values that they stand for, in every layer that has them, and leave all else as it is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import DynamicCache

import linmu_models
from linmu_models.generate import WEIGHTS, generate_text, load
from linmu_models.int8 import FEW, Int8Linear, has_kernel
from linmu_ops import LinmuWarning

from . import tiny
from .folders import run, tokenizer

# Rows of 64 and 96 weights are read by torch's kernel; of 48, as in other tiny models, they are not.
SIZES = tiny.SIZES | dict(hidden_size=64, intermediate_size=96)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def qwen(block=None, keep=(), dtype=torch.float32, **changes):
    torch.manual_seed(0)
    teacher = hf.Qwen2ForCausalLM(hf.Qwen2Config(**(SIZES | changes))).eval()
    model = teacher if block is None else linmu_models.convert(teacher, block, keep).eval()
    return model.to(dtype)


def with_plain_maps(model):
    """A copy whose maps are plain again, and of the values that the 8 bits stand for."""
    plain = copy.deepcopy(model)
    for name, held in model.named_modules():
        if isinstance(held, Int8Linear):
            linear = nn.Linear(held.in_features, held.out_features, bias=held.bias is not None)
            values = held.quantized.double() * held.scale.double()[:, None]
            linear.weight, linear.bias = nn.Parameter(values.to(held.scale.dtype), requires_grad=False), held.bias
            plain.set_submodule(name, linear)
    return plain


@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("sizes", [(96, 33), (32, 1), (50, 7)])
def test_a_map(sizes, dtype, rows):
    torch.manual_seed(0)
    linear = nn.Linear(*sizes).to(dtype).requires_grad_(False)
    linear.weight[0] = 0
    held = Int8Linear(linear)
    assert held.quantized.dtype == torch.int8 and held.quantized.shape == linear.weight.shape
    assert not held.quantized[0].any() and held.quantized[1:].abs().amax(1).ge(126).all()
    values = held.quantized.double() * held.scale.double()[:, None]
    step = linear.weight.double().abs().amax(1, keepdim=True) / 127
    assert ((values - linear.weight.double()).abs() <= 0.8 * step).all()
    x = torch.randn(2, rows, sizes[0], dtype=dtype)[:1].expand(1, -1, -1)
    y, want = held(x), torch.nn.functional.linear(x.double(), values, linear.bias.double())
    assert y.dtype == dtype and y.shape == want.shape
    rounded = torch.bfloat16 if rows <= FEW and sizes[0] % 32 == 0 and dtype != torch.float64 else dtype
    assert (y.double() - want).norm() <= 2 * torch.finfo(rounded).eps * want.norm()
    assert held(x[:, :0]).shape == (1, 0, sizes[1])


def test_a_map_is_differentiated_by_its_input():
    held = Int8Linear(nn.Linear(64, 5).double())
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(held, (x,))
    narrow = x.detach().float().requires_grad_()
    Int8Linear(nn.Linear(64, 5))(narrow).sum().backward()
    assert narrow.grad.isfinite().all() and narrow.grad.any()


def test_without_a_kernel_weights_are_made_wide_and_it_is_said(monkeypatch):
    model = qwen(tiny.NARROW)
    monkeypatch.setattr("linmu_models.int8.has_kernel", lambda: False)
    with pytest.warns(LinmuWarning, match="no int8 kernel"):
        held = linmu_models.int8_weights(model)
    text = tiny.example("qwen2", "text")
    with torch.no_grad():
        torch.testing.assert_close(held(**text).logits, with_plain_maps(held)(**text).logits)


BLOCKS = {"teacher": None, "exact": tiny.NARROW, "paper": {"preset": "paper"}, "literal": {"preset": "literal"}}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_model(name, dtype):
    """A prompt and steps are those of plain maps of the same values, and near those of the weights; so is the state."""
    block = BLOCKS[name]
    whole = qwen(block, (1,) if name == "exact" else (), dtype)
    held = linmu_models.int8_weights(copy.deepcopy(whole))
    plain = with_plain_maps(held)
    ids = torch.tensor([tiny.text_ids(24)] * 2)

    def use(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 1, 1], 1)]
        return torch.cat(parts, 1).float(), cache

    (out, cache), (same, wanted), (near, _) = use(held), use(plain), use(whole)
    assert (out - same).norm() < 0.02 * same.norm()
    assert (out - near).norm() < 0.05 * near.norm()
    for mine, theirs in zip(cache.layers, wanted.layers, strict=True):
        tensors = mine.state if hasattr(mine, "state") else (mine.keys, mine.values)
        others = theirs.state if hasattr(theirs, "state") else (theirs.keys, theirs.values)
        kinds = [[None if t is None else (t.dtype, t.shape) for t in each] for each in (tensors, others)]
        assert kinds[0] == kinds[1]


def test_what_must_keep_its_bits_does():
    whole = qwen({"preset": "literal"}, (1,), tie_word_embeddings=True)
    held = linmu_models.int8_weights(copy.deepcopy(whole))
    kept = {n for n, m in held.named_modules() if isinstance(m, nn.Linear)}
    names = {n.removeprefix("model.layers.0.self_attn.") for n in kept if ".layers.0." in n}
    assert names == {"mix_proj", "scan.dt_proj", "scan.reverse_dt_proj", "scan.gate_proj"} and not any(
        ".layers.1." in n for n in kept
    )
    assert isinstance(held.lm_head, Int8Linear) and type(held.model.embed_tokens) is nn.Embedding
    left = dict(held.named_parameters())
    for name, p in whole.named_parameters():
        assert name not in left or torch.equal(left[name], p), name
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.scan.A_log", "model.norm.weight"} <= set(left)
    exact = linmu_models.int8_weights(qwen(tiny.NARROW)).model.layers[0].self_attn
    assert [n for n, m in exact.named_modules() if isinstance(m, nn.Linear)] == [
        "scan.dt_proj",
        "share",
    ]
    assert exact.scan.b_map.dtype == torch.float32


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_model_with_eyes(family):
    whole = linmu_models.convert(tiny.teacher(family), tiny.NARROW).eval()
    inputs = tiny.example(family, "image")
    with torch.no_grad():
        want = whole(**inputs).logits
        held = linmu_models.int8_weights(whole)
        tower = [m for n, m in held.named_modules() if "vision" in n or "visual" in n]
        assert tower and not any(isinstance(m, Int8Linear) for m in tower)
        assert (held(**inputs).logits - want).norm() < 0.05 * want.norm()
        options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert held.generate(**inputs, **options).shape[1] == inputs["input_ids"].shape[1] + 4


def test_beams_and_a_static_cache():
    held = linmu_models.int8_weights(qwen(tiny.NARROW))
    ids, options = torch.tensor([tiny.text_ids(9)]), dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    first = held.generate(ids, **options)
    assert torch.equal(first, held.generate(ids, cache_implementation="static", disable_compile=True, **options))
    assert held.generate(ids, num_beams=2, **options).shape == first.shape


@pytest.mark.skipif(not has_kernel(), reason="torch has no int8 kernel for this processor")
def test_a_step_compiles():
    held = linmu_models.int8_weights(qwen(tiny.NARROW, num_hidden_layers=1))
    x = torch.randn(2, 1, 64)
    map_ = held.model.layers[0].mlp.up_proj
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(map_, fullgraph=True, backend="aot_eager")(x), map_(x))


def broken(model, value):
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = value
    return model


def test_errors():
    refuse = linmu_models.int8_weights
    with pytest.raises(TypeError, match=r"^int8_weights: model must be a transformers model, got Linear$"):
        refuse(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^int8_weights: model\.layers\.1\.mlp\.up_proj\.weight must be finite, got"):
        refuse(damaged := broken(qwen(), float("nan")))
    assert type(damaged.model.layers[0].mlp.up_proj) is nn.Linear  # all or nothing
    with pytest.raises(ValueError, match=r"weight must be on a CPU, got meta$"):
        refuse(qwen().to("meta"))
    held = refuse(qwen())
    with pytest.raises(ValueError, match=r"^int8_weights: model must have float weights, got a quantised one$"):
        refuse(held)
    with pytest.raises(ValueError, match=r"^convert: teacher must not be quantised"):
        linmu_models.convert(held)
    with pytest.raises(ValueError, match=r"^int8_weights: a model must have float weights to be saved, got 8 bits"):
        held.state_dict()


def test_from_the_shell(tmp_path):
    qwen().save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    run("convert", tmp_path / "teacher", tmp_path / "student")
    ask = ("--prompt", "abc", "--max-new-tokens", 4)
    for folder in ("teacher", "student"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", LinmuWarning)
            model, processor = load(tmp_path / folder, "cpu", weights="int8")
        answer = generate_text(model, processor, "abc", max_new_tokens=4, do_sample=False)
        assert run("generate", tmp_path / folder, *ask, "--weights", "int8").stdout.rstrip("\n") == answer.text
    for wrong in ("", "int4", "INT8", "auto"):
        said = run("generate", tmp_path / "student", *ask, "--weights", wrong, status=1).stderr
        assert said == f"linmu: weights must be {' or '.join(WEIGHTS)}, got {wrong!r}\n"
    with pytest.raises(ValueError, match=r"^weights must be float or int8, got None$"):
        load(tmp_path / "student", weights=None)
