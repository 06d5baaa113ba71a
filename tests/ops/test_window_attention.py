"""`window_attention` against its definition, against SDPA and against transformers' Swin."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import linmu_ops
from linmu_ops import TokenLayout, window_attention
from linmu_ops._testing import check_against_reference, to_double
from tests.ops.cases.window_attention import CASES, DTYPES, LSE_CASES, by_reference, make_inputs, with_lse
from tests.ops.reruns import OLDER, assert_same_bits


def gradients(f, inputs, wrt, seed=0):
    leaves = {k: v.detach().clone().requires_grad_(k in wrt) if torch.is_tensor(v) else v for k, v in inputs.items()}
    out = f(**leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, [leaves[k] for k in wrt], weights)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_forward_and_backward(case, dtype):
    inputs = make_inputs(case, dtype)
    wrt = ["q", "k", "v", *(["bias"] if "bias" in inputs else [])]
    check_against_reference(window_attention, by_reference, inputs, wrt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LSE_CASES.values(), ids=list(LSE_CASES))
def test_log_sum_exp(case, dtype):
    inputs = make_inputs(case, dtype)
    wrt = ["q", "k", "v", *(["bias"] if "bias" in inputs else [])]
    check_against_reference(with_lse(window_attention), with_lse(by_reference), inputs, wrt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_log_sum_exp_of_biases_is_of_their_own_dtype(dtype):
    """Weights are rounded to the values' dtype; the sum of what they were before is not."""
    for seed in range(20):
        inputs = make_inputs(dict(B=1, H=4, G=1, P=1, grid=(3,), window=(2,), bias=True, causal=True), dtype, seed)
        inputs["q"] = 0 * inputs["q"]
        check_against_reference(with_lse(window_attention), with_lse(by_reference), inputs)


def test_the_log_sum_exp_alone_has_a_gradient():
    inputs = make_inputs(CASES["causal-joined-bias"], torch.float32)
    check_against_reference(
        lambda **i: window_attention(**i, return_lse=True)[1],
        lambda **i: by_reference(**i, return_lse=True)[1],
        inputs, ("q", "k", "bias"),
    )  # fmt: skip


@pytest.mark.parametrize("wrap", ["join", "mask"])
def test_causal_is_a_masked_softmax(wrap):
    grid, window, shift = (4, 6), (3, 4), (1, 3)
    q, k, v = (torch.randn(2, 24, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    at = torch.stack(torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij"), -1).flatten(0, 1)  # (L, 2)
    window_of = (at - torch.tensor(shift)) % torch.tensor(grid) // torch.tensor(window)
    if wrap == "mask":
        window_of = torch.cat((window_of, at < torch.tensor(shift)), -1)
    seen = (window_of[:, None] == window_of).all(-1) & torch.ones(24, 24, dtype=torch.bool).tril()
    assert (seen.sum(-1) == 1).any() and not seen[23].all()
    scores = torch.einsum("bigrp,bjgp->bgrij", q.unflatten(2, (2, 2)), k) * 8**-0.5
    scores = scores.masked_fill(~seen, -math.inf)
    want = torch.einsum("bgrij,bjgp->bigrp", scores.softmax(-1), v).flatten(2, 3)
    want_lse = scores.logsumexp(-1).flatten(1, 2).transpose(1, 2)
    out, lse = window_attention(q, k, v, grid=grid, window=window, shift=shift, wrap=wrap, causal=True, return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    weights = torch.randn_like(out), torch.randn_like(lse)
    for a, b in zip(*(torch.autograd.grad(t, (q, k, v), weights) for t in ((out, lse), (want, want_lse))), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp_outside_blocks(dtype):
    inputs = make_inputs(CASES["blocks"], dtype)
    out, lse = window_attention(**inputs, return_lse=True)
    text = ~inputs["layout"].visual_mask()
    assert lse.shape == out.shape[:3] and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (lse[text] == -math.inf).all() and lse[~text].isfinite().all()
    assert torch.equal(out, window_attention(**inputs))


def test_later_keys_do_not_matter():
    """What a causal token sees is as if the row ended with it."""
    inputs = make_inputs(CASES["causal-key-blocks"] | dict(shift=(0,), window=(700,)), torch.float32)
    before = window_attention(**inputs, return_lse=True)
    for n in "kv":
        inputs[n][:, 100:] = 1e4
    for a, b in zip(before, window_attention(**inputs, return_lse=True), strict=True):
        assert torch.equal(a[:, :100], b[:, :100]) and not torch.equal(a[:, 100:], b[:, 100:])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data):
    dims = data.draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(1, 7 if dims > 1 else 40)] * dims)
    grid, window, shift = data.draw(sizes), data.draw(sizes), data.draw(sizes)
    G, R = data.draw(st.integers(1, 3)), 2 * data.draw(st.integers(0, 3))
    # Rows enough for the baseline's largest error to say something: among two tokens it may be 0 by luck.
    case = dict(
        B=data.draw(st.integers(1, 2)) + 64 // math.prod(grid), G=G,
        H=G * data.draw(st.integers(1, 3)), P=R + data.draw(st.integers(1, 40)),
        grid=grid, window=window, shift=shift, wrap=data.draw(st.sampled_from(["join", "mask"])), rotary=R,
        bias=data.draw(st.booleans()), interleaved=data.draw(st.booleans()), causal=data.draw(st.booleans()),
    )  # fmt: skip
    inputs = make_inputs(case, data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    check_against_reference(
        with_lse(window_attention), with_lse(by_reference), inputs, ["q", "k", "v", *(["bias"] if case["bias"] else [])]
    )


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    case = dict(B=1, H=2, G=1, P=4, grid=(2, 3, 3), window=(2, 2, 2), shift=(1, 1, 1), bias=True, rotary=2)
    inputs = make_inputs(case, torch.float64)
    names = ("q", "k", "v", "bias")
    leaves = [inputs.pop(n).requires_grad_() for n in names]
    assert torch.autograd.gradcheck(
        lambda *t: window_attention(**dict(zip(names, t, strict=True)), **inputs, causal=causal, return_lse=True),
        leaves, fast_mode=True,
    )  # fmt: skip


def operands(case, dtype=torch.float32, grad=True):
    """Arguments of the dispatcher's op."""
    i = make_inputs(case, dtype)
    L = i["q"].shape[1]
    window = (1, 1, *i["window"])[-3:]
    layout = i.get("layout") or TokenLayout.from_grid((1, 1, *i["grid"])[-3:], i["q"].shape[0])
    assert layout.length == L
    table = layout.window_table(window, (0, 0, *i.get("shift", (0,)))[-3:])
    bias = i.get("bias")
    if bias is not None:
        bias = bias.reshape(bias.shape[0], *(2 * w - 1 for w in window)).requires_grad_(grad)
    rows = [i[n].requires_grad_(grad) for n in "qkv"]
    return [
        *rows, table.tokens, table.offsets, table.coords, list(window), 0.25, bias, i.get("cos"), i.get("sin"), False,
        i.get("causal", False),
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["2d-shift-mask-bias", "3d-gqa", "blocks", "blocks-causal"])
def test_opcheck(case):
    args = operands(CASES[case])
    torch.library.opcheck(torch.ops.linmu.window_attention, args)
    with torch.no_grad():
        out, lse = torch.ops.linmu.window_attention(*args)
    detached = [a.detach() if torch.is_tensor(a) else a for a in args]
    for grad_lse in (None, torch.randn_like(lse)):
        grads = torch.randn_like(out), grad_lse
        torch.library.opcheck(torch.ops.linmu.window_attention_bwd, (*grads, *detached[:3], out, lse, *detached[3:]))


def test_compile_with_dynamic_length():
    compiled = torch.compile(window_attention, fullgraph=True, dynamic=True)
    for n, window in ((24, 4), (31, 4), (50, 4)):
        q, k, v = (torch.randn(1, n + 3, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        layout = TokenLayout([(0, 1, 1, n)], range(1, n + 1), 1, n + 3)
        options = dict(layout=layout, window=(window,), shift=(2,), causal=True, return_lse=True)
        runs = []
        for attend in (window_attention, compiled):
            out, lse = attend(q, k, v, **options)
            loss = out.square().sum() + lse[:, 1:-2].square().sum()
            runs.append([out, lse, *torch.autograd.grad(loss, (q, k, v))])
        for expected, got in zip(*runs, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_window_is_full_attention(dtype):
    q, k, v = (torch.randn(2, 45, heads, 16).to(dtype) for heads in (6, 2, 2))

    def sdpa(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    check = dict(q=q, k=k, v=v)
    if dtype == torch.float64:
        torch.testing.assert_close(window_attention(**check, grid=(5, 9), window=(5, 9)), sdpa(**check))
    else:
        check_against_reference(
            lambda **i: window_attention(**i, grid=(5, 9), window=(8, 9), shift=(2, 3)), sdpa, check, "qkv"
        )


@pytest.mark.parametrize("height,width,shift", [(8, 8, 0), (8, 12, 2), (12, 4, 2), (4, 20, 0), (16, 8, 1)])
def test_is_swin(height, width, shift):
    """The whole attention path of transformers' SwinLayer: roll, partition, mask, bias, attention, reverse, roll."""
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = swin.SwinConfig(window_size=4, attn_implementation="eager", hidden_act="gelu")
    dim, heads = 48, 3
    layer = swin.SwinLayer(config, dim, (height, width), heads, shift_size=shift).eval()
    attention = layer.attention
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.layernorm_before = layer.layernorm_after = torch.nn.Identity()
    layer.mlp = torch.nn.Module()
    layer.mlp.forward = torch.zeros_like
    x = torch.randn(2, height * width, dim)
    layer.set_shift_and_window_size((height, width))
    w, h = int(layer.window_size), int(layer.shift_size)
    q, k, v = (p(x).view(2, -1, heads, dim // heads) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    table = attention.relative_position_bias.relative_position_bias_table
    bias = table.T.reshape(heads, 7, 7)
    assert w == 4
    got = window_attention(q, k, v, grid=(height, width), window=(w, w), shift=(h, h), wrap="mask", bias=bias)
    got = x + attention.o_proj(got.flatten(2))
    expected = layer(x, (height, width))[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    inputs = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, table)
    weights = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(t, inputs, weights) for t in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_tokens_outside_blocks():
    inputs = make_inputs(CASES["blocks"], torch.float32)
    layout = inputs["layout"]
    out, dq, dk, dv = gradients(window_attention, inputs, "qkv")
    text = ~layout.visual_mask()
    assert int(text.sum()) > 0
    for t in (out, dq, dk, dv):
        assert not t[text].any() and t[~text].any()


def test_text_is_never_read():
    inputs = make_inputs(CASES["blocks"], torch.float32)
    text = ~inputs["layout"].visual_mask()
    expected = gradients(window_attention, inputs, "qkv")
    for name in "qkv":
        inputs[name][text] = math.nan
    for got, want in zip(gradients(window_attention, inputs, "qkv"), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "B,grid,window", [(1, (0,), (4,)), (0, (3, 4), (2, 2)), (2, (1,), (4,)), (1, (3, 5), (1, 1))], ids=str
)
def test_degenerate(B, grid, window):
    L = math.prod(grid)
    q, k, v = (torch.randn(B, L, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    layout = TokenLayout([(b, *(1, 1, *grid)[-3:]) for b in range(B) if L], list(range(L)) * B, B, L)
    out = window_attention(q, k, v, layout=layout, window=window)
    assert out.shape == q.shape
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v)]
    if math.prod(window) == 1 or L == 1:
        assert torch.equal(out, v.repeat_interleave(2, 2))
        assert not grads[0].any() and not grads[1].any() and torch.equal(grads[2], torch.full_like(v, 2.0))


def test_no_visual_token():
    q, k, v, bias = (
        torch.randn(s, requires_grad=True) for s in ((2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8), (4, 3, 3, 3))
    )
    layout = TokenLayout([], [], 2, 6)
    out, lse = window_attention(q, k, v, layout=layout, window=(2, 2, 2), bias=bias, causal=True, return_lse=True)
    assert not out.any() and (lse == -math.inf).all()
    for g, t in zip(torch.autograd.grad(out.sum() + lse.exp().sum(), (q, k, v, bias)), (q, k, v, bias), strict=True):
        assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_are_read_where_they_lie(dtype):
    qkv = torch.randn(2, 30, 8, 16).to(dtype)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    call = dict(grid=(5, 6), window=(3, 3), shift=(1, 1))
    expected = gradients(window_attention, dict(q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), **call), "qkv")
    head_major = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    last_strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    for views in ((q, k, v), head_major, last_strided):
        leaves = [t.detach().requires_grad_() for t in views]
        out = window_attention(*leaves, **call)
        torch.manual_seed(0)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        weights = weights.transpose(1, 3).contiguous().transpose(1, 3)
        for a, b in zip([out, *torch.autograd.grad(out, leaves, weights)], expected, strict=True):
            assert torch.equal(a, b)
    one = dict(q=q, k=k[:, :, :1], v=v)  # one key head for both value heads: stride 0
    check_against_reference(
        lambda k, **i: window_attention(k=k.expand(-1, -1, 2, -1), **i, **call),
        lambda k, **i: by_reference(k=k.expand(-1, -1, 2, -1), **i, **call),
        one, "qkv",
    )  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype, sign):
    inputs = make_inputs(dict(B=1, H=2, G=1, P=16, grid=(12, 12), window=(12, 12), bias=True), dtype)
    inputs["q"] = inputs["q"] * 50
    inputs["k"] = inputs["k"] * 50 * sign
    scores = torch.einsum("blhp,bmgp->bhlm", inputs["q"].double(), inputs["k"].double()) / 4
    assert scores.abs().max() > 1e4
    if dtype == torch.float64:
        torch.testing.assert_close(window_attention(**inputs), by_reference(**inputs))
    else:
        check_against_reference(window_attention, by_reference, inputs, ["q", "k", "v", "bias"])


def test_a_bias_of_minus_infinity_is_a_mask():
    inputs = make_inputs(dict(B=1, H=2, G=1, P=8, grid=(20,), window=(10,), bias=True), torch.float32)
    inputs["bias"][:, 10:] = -math.inf  # only tokens at or after the query
    got = gradients(window_attention, inputs, "qkv")
    q, k, v = (inputs[n].unflatten(1, (2, 10)) for n in "qkv")
    mask = torch.arange(10)[:, None] <= torch.arange(10)
    offset = (torch.arange(10)[:, None] - torch.arange(10)).clamp(max=0) + 9
    scores = torch.einsum("bwihp,bwjgp->bwhij", q, k) * 8**-0.5 + inputs["bias"][:, offset]
    out = torch.einsum("bwhij,bwjgp->bwihp", scores.masked_fill(~mask, -math.inf).softmax(-1), v).flatten(1, 2)
    torch.testing.assert_close(got[0], out)
    assert all(g.isfinite().all() for g in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_every_run_and_thread_count(dtype):
    for name in ("3d-shift", "several-query-blocks", "several-key-blocks", "blocks", "causal-joined-bias"):
        inputs = make_inputs(CASES[name], dtype)
        wrt = ["q", "k", "v", *(["bias"] if "bias" in inputs else [])]
        assert_same_bits(functools.partial(gradients, window_attention, inputs, wrt), threads=(1, 2, 2, 5))


def test_windows_do_not_depend_on_each_other():
    """A window's bits are the same whatever else is in the batch."""
    q, k, v = (torch.randn(2, 200, heads, 16) for heads in (4, 2, 2))
    both = TokenLayout([(0, 1, 3, 4), (1, 1, 1, 190)], [*range(5, 17), *range(190)], 2, 200)
    alone = TokenLayout([(0, 1, 3, 4)], range(5, 17), 2, 200)
    window = (1, 3, 190)
    a, b = (gradients(window_attention, dict(q=q, k=k, v=v, layout=x, window=window), "qkv") for x in (both, alone))
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x[0], y[0])


ISA_SCRIPT = """
import sys, torch
from linmu_ops import _registry, window_attention
from linmu_ops._testing import check_against_reference
from tests.ops.cases.window_attention import CASES, by_reference, make_inputs, with_lse
assert _registry.binaries()["cpu"].info["isa"] == sys.argv[1], "not the wanted instruction set"
for name in ("2d-shift-mask-bias", "2d-rotary", "2d-interleaved", "odd-head", "several-query-blocks",
             "causal-joined-bias", "causal-key-blocks"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = make_inputs(CASES[name], dtype)
        wrt = ["q", "k", "v", *(["bias"] if "bias" in inputs else [])]
        check_against_reference(with_lse(window_attention), with_lse(by_reference), inputs, wrt)
"""


@pytest.mark.parametrize("isa", OLDER)
def test_lower_instruction_sets(isa):
    best = linmu_ops._registry.binaries()["cpu"].info.get("isa", "none")
    order = ["none", "avx2", "avx512", "avx512bf16"]
    if best not in order or order.index(best) <= order.index(isa):
        pytest.skip(f"the best instruction set here is {best}")
    subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT, isa],
        check=True,
        env={**os.environ, "LINMU_CPU_ISA": isa},
        cwd=Path(__file__).parents[2],
    )


def test_errors():
    i = make_inputs(CASES["2d-rotary"], torch.float32)
    bias, wide = torch.zeros(4, 7, 7), torch.zeros(2, 54, 18)
    layout = TokenLayout.from_grid((1, 9, 6), 2)
    wrong = [
        (ValueError, r"k must be \(B, L, G, P\) with B=2, L=54, P=16, got shape", dict(k=i["k"][:1])),
        (TypeError, "v must be float32, got float64", dict(v=i["v"].double())),
        (ValueError, "k's G=3 must divide H=4", dict(k=torch.zeros(2, 54, 3, 16), v=torch.zeros(2, 54, 3, 16))),
        (ValueError, "exactly one of layout and grid", dict(layout=layout)),
        (ValueError, "exactly one of layout and grid", dict(grid=None)),
        (ValueError, r"grid must hold L=54 tokens, got \(9, 7\)", dict(grid=(9, 7))),
        (ValueError, "layout must be of B=2, L=54", dict(grid=None, layout=TokenLayout.from_grid((1, 9, 6), 1))),
        (ValueError, "window must be one to three integers >= 1", dict(window=(4, 0))),
        (ValueError, "window must be one to three integers >= 1", dict(window=(4, -1))),
        (ValueError, "window must be one to three integers >= 1", dict(window=(4, float("nan")))),
        (ValueError, "window must be one to three integers >= 1", dict(window=4)),
        (ValueError, "shift must be one to three integers >= 0", dict(shift=(1, 1, 1, 1))),
        (ValueError, "wrap must be one of join, mask, got 'pad'", dict(wrap="pad")),
        (ValueError, "bias must be None with image_window", dict(bias=bias, image_window=(4, 4))),
        (ValueError, r"bias must be \(H, 2T-1, 2H-1, 2W-1\) with window", dict(bias=bias[:, :5])),
        (ValueError, r"bias must be \(H, .*\) with H=4, got shape", dict(bias=bias[:2])),
        (ValueError, "cos and sin must be given together", dict(sin=None)),
        (ValueError, "an even R of at most P=16, got R=18", dict(cos=wide, sin=wide)),
        (ValueError, r"sin must be \(B, L, R\)", dict(sin=i["sin"][:, :, :8])),
    ]  # fmt: skip
    for kind, message, change in wrong:
        with pytest.raises(kind, match=f"window_attention: .*{message}"):
            window_attention(**{**i, **change})


@pytest.mark.parametrize("impl", ["linmu", "linmu_reference"])
@pytest.mark.parametrize(
    "message,index,change",
    [
        ("tokens must be in 0..167", 3, lambda t: t.index_fill(0, torch.tensor([5]), 168)),
        ("tokens must be in 0..167", 3, lambda t: t.index_fill(0, torch.tensor([5]), -1)),
        ("tokens must hold each token at most once", 3, lambda t: t.index_fill(0, torch.tensor([5]), int(t[9]))),
        ("offsets must start with 0", 4, lambda t: t + 1),
        ("offsets must start with 0", 4, lambda t: t[:0]),
        ("offsets must not decrease", 4, lambda t: t.index_fill(0, torch.tensor([1]), 2**31 - 1)),
        ("offsets must end with 168", 4, lambda t: t[:-1]),
        ("coords must be in 0..31", 5, lambda t: t.index_fill(0, torch.tensor([0]), 32)),
        ("coords must be in 0..31", 5, lambda t: t.index_fill(0, torch.tensor([0]), -1)),
        ("bias needs coords", 5, lambda t: None),
    ],
)
def test_corrupt_tables(message, index, change, impl):
    args = operands(CASES["2d-shift-mask-bias"], grad=False)
    args[index] = change(args[index])
    with pytest.raises(ValueError, match=f"^window_attention: {message}"):
        getattr(torch.ops, impl).window_attention(*args)


def test_float64_is_computed_in_float64():
    inputs = make_inputs(CASES["2d-rotary"], torch.float64)
    single = {k: v.float() if torch.is_tensor(v) else v for k, v in inputs.items()}
    exact = by_reference(**inputs)
    assert (window_attention(**inputs) - exact).abs().max() < 1e-13
    assert (window_attention(**{k: to_double(v) for k, v in single.items()}) - exact).abs().max() > 1e-10
