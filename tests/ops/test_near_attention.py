"""`near_attention` against its reference, against a masked softmax, and by what it says of itself."""

from __future__ import annotations

import math

import pytest
import torch

import linmu_ops
from linmu_ops import near_attention
from linmu_ops._testing import check_against_reference, to_double
from tests.ops.cases.near_attention import CASES, DTYPES, KINDS, by_reference, make_inputs
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa

WRT = ("q", "k", "v")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case, kind, dtype):
    scale = None if kind == "steps" else -0.3
    check_against_reference(near_attention, by_reference, make_inputs(case, dtype, kind, scale=scale), WRT)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_masked_softmax(kind, impl):
    i = make_inputs("a window and lists", torch.float64, kind)
    B, L, H, P = i["q"].shape
    T, G = i["k"].shape[1:3]
    own, place = torch.arange(T - L, T)[:, None], torch.arange(T)
    weight = ((place >= i["low"][..., None]) & (place < i["high"][..., None])).double()[:, None].repeat(1, G, 1, 1)
    for b in range(B):
        for g in range(G):
            for t in range(L):
                if i["which"][b, g, t] >= 0:
                    for j in i["listed"][i["which"][b, g, t]].tolist():
                        weight[b, g, t, j] += j >= 0
    weight = weight * (place <= own)
    leaves = [i[n].requires_grad_() for n in WRT]
    scores = torch.einsum("bigrp,bjgp->bgirj", i["q"].unflatten(2, (G, H // G)), i["k"]) * P**-0.5
    scores = scores + weight.log()[:, :, :, None]
    nothing = (weight.sum(-1) == 0)[:, :, :, None]
    want_lse = scores.masked_fill(nothing[..., None], 0).logsumexp(-1).masked_fill(nothing, 0)
    weights = (scores - want_lse[..., None]).exp().masked_fill(nothing[..., None], 0)
    want = torch.einsum("bgirj,bjgp->bigrp", weights, i["v"]).flatten(2, 3)
    want_lse = want_lse.permute(0, 2, 1, 3).flatten(2)
    with linmu_ops.use_impl(f"near_attention:{impl}"):
        y, lse = near_attention(**i)
    lse = lse.masked_fill(lse == -math.inf, 0)  # the log of nothing
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(lse, want_lse)
    given = torch.randn_like(y), torch.randn_like(lse)
    for a, b in zip(*(torch.autograd.grad(o, leaves, given) for o in ((y, lse), (want, want_lse))), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_token_that_sees_nothing(impl):
    i = make_inputs("a window and lists", torch.float32)
    i["high"][:, 5:9], i["which"][:, :, 5:9] = 0, -1
    for name in WRT:
        i[name].requires_grad_()
    with linmu_ops.use_impl(f"near_attention:{impl}"):
        y, lse = near_attention(**i)
    assert not y[:, 5:9].any() and (lse[:, 5:9] == -math.inf).all() and lse[:, 9:].isfinite().all()
    dq, dk, dv = torch.autograd.grad((y, lse), [i[n] for n in WRT], (torch.ones_like(y), torch.ones_like(lse)))
    assert not dq[:, 5:9].any() and all(d.isfinite().all() for d in (dq, dk, dv))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ["k", "v", "q"])
def test_what_is_not_seen_does_not_matter(name, value):
    """Neither for what a token gets nor for what it gives: among others of its tile, in the middle of a range, and of a
    list that others see."""
    clean = make_inputs("a window and lists", torch.float32, "random")
    dirty = {n: t.clone() if torch.is_tensor(t) else t for n, t in clean.items()}
    at = 30 if name == "q" else 39
    dirty[name][:, at] = value
    T, L = clean["k"].shape[1], clean["q"].shape[1]
    sees = (clean["low"] <= at) & (at < clean["high"])
    lists = torch.cat((clean["listed"], torch.full_like(clean["listed"][:1], -1)))[clean["which"].long()]
    sees = (sees | (lists == at).any(-1).any(1)) & (torch.arange(T - L, T) >= at)
    if name == "q":
        sees = (torch.arange(L) == at).expand(2, -1)
    assert sees.any() and not sees.all()
    results = []
    for inputs in (clean, dirty):
        inputs = {n: t.requires_grad_() if n in WRT else t for n, t in inputs.items()}
        y, lse = near_attention(**inputs)
        weight = (~sees).float()[..., None]
        grads = torch.autograd.grad((y, lse), [inputs["q"]], (weight[..., None].expand_as(y), weight.expand_as(lse)))
        results.append((y, lse, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a[~sees], b[~sees], rtol=2e-5, atol=2e-5)


def test_gradcheck():
    i = make_inputs("a window and lists", torch.float64)
    i = {n: t[:, :20] if n in ("q", "low", "high") else t for n, t in i.items()}
    i |= dict(k=i["k"][:, :29], v=i["v"][:, :29], which=i["which"][..., :20], listed=i["listed"].clamp(max=20))
    leaves = [i.pop(n)[:1, ..., :2].contiguous().requires_grad_() for n in WRT]
    i = {n: t[:1] if n in ("low", "high", "which") else t for n, t in i.items()}
    assert torch.autograd.gradcheck(lambda q, k, v: near_attention(q, k, v, **i), leaves, fast_mode=True)


def test_opcheck():
    for kind in KINDS:
        i = make_inputs("a window and lists", torch.float32, kind)
        args = [i[n] for n in (*WRT, "low", "high", "which", "listed")]
        for leaf in args[:3]:
            leaf.requires_grad_()
        torch.library.opcheck(torch.ops.linmu.near_attention, (*args, 0.3), rtol=1e-4, atol=1e-4)


def test_compile():
    f = torch.compile(near_attention, fullgraph=True, dynamic=True)
    for case in ("a window and lists", "odd heads"):
        i = make_inputs(case, torch.float32)
        torch.testing.assert_close(f(**i), near_attention(**i))


def test_strided():
    i = make_inputs("a window and lists", torch.float32)
    for name in (*WRT, "low", "high", "which", "listed"):
        i[name] = i[name].transpose(0, 1).contiguous().transpose(0, 1)
    check_against_reference(near_attention, by_reference, i, WRT)


def test_same_bits_for_any_number_of_threads():
    i = make_inputs("as a prompt", torch.float32)
    leaves = [i[n].requires_grad_() for n in WRT]

    def run():
        y, lse = near_attention(**i)
        return y, lse, *torch.autograd.grad((y, lse), leaves, (torch.ones_like(y), torch.ones_like(lse)))

    assert_same_bits(run, threads=(1, 2, 3))


def test_parts_of_the_backward_add_up():
    """A row of more tiles than a part has: its sums come from several."""
    i = make_inputs("a window", torch.float32)
    B, H, G, P, L = 1, 2, 1, 8, 1100
    steps = (torch.arange(34) * 30)[:, None].int()
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, L, n, P, generator=g) for n in (H, G, G))
    own = torch.arange(L)
    i = dict(
        q=q, k=k, v=v, low=(own - 9).clamp(min=0).int()[None], high=(own + 1).int()[None],
        which=torch.where(own >= 32, own // 32 - 1, -1).int()[None, None], listed=steps,
    )  # fmt: skip
    check_against_reference(near_attention, by_reference, i, WRT)


@pytest.mark.slow
@pytest.mark.parametrize("isa", OLDER)
def test_isa(isa):
    rerun_with_isa(isa, __file__, "test_forward_and_backward or does_not_matter")


BAD = {
    r"k must be \(B, T, G, P\) with B=2, P=16, got shape \(1,": lambda i: dict(k=i["k"][:1]),
    r"k's G=3 must divide H=4": lambda i: dict(k=torch.randn(2, 79, 3, 16), v=torch.randn(2, 79, 3, 16)),
    r"k must be of T >= L=70 tokens, got 69": lambda i: dict(k=i["k"][:, :69], v=i["v"][:, :69]),
    r"low must be \(B, L\)": lambda i: dict(low=i["low"][:, 1:]),
    r"low must be in 0..79, got -1": lambda i: dict(low=i["low"] - 1),
    r"high must be in 0..79, got 80": lambda i: dict(high=i["high"] + 1),
    r"which must be in -1..2, got 3": lambda i: dict(which=torch.full_like(i["which"], 3), listed=i["listed"][:3]),
    r"listed must be in -1..78, got 79": lambda i: dict(listed=i["listed"] + 79 - i["listed"].max()),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_values_and_shapes(impl, message):
    i = make_inputs("a window and lists", torch.float32)
    with pytest.raises(ValueError, match=f"near_attention: {message}"), linmu_ops.use_impl(f"near_attention:{impl}"):
        near_attention(**{**i, **BAD[message](i)})


def test_types():
    i = make_inputs("a window and lists", torch.float32)
    with pytest.raises(TypeError, match="near_attention: k must be float32, got float64"):
        near_attention(**{**i, "k": to_double(i["k"])})
    with pytest.raises(TypeError, match="near_attention: which must be int32, got int64"):
        near_attention(**{**i, "which": i["which"].long()})
