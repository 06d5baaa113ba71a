"""`far_attention` against its reference, and by what it says of itself."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference
from tests.ops.cases.far_attention import CASES, DTYPES, OPTIONS, by_reference, cloned, make_inputs, mixed
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa

BLOCK = "seven heads to a group, as a block"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype, options):
    check_against_reference(mixed, by_reference, make_inputs(case, dtype, OPTIONS[options]))


@pytest.mark.parametrize("heads", range(1, 9))
def test_each_number_of_heads_to_a_group(heads, monkeypatch):
    monkeypatch.setitem(CASES, "heads", (2, 31, 5, 2 * heads, 2, 19, 21, 6))
    check_against_reference(mixed, by_reference, make_inputs("heads", torch.float32))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_step_at_a_time_is_the_recurrence(impl):
    """h = exp(-rate step) h + step v f(k), token by token."""
    i = make_inputs("one at a time", torch.float64)
    B, T, G, P = i["k"].shape
    H, L = i["q"].shape[2], i["q"].shape[1]
    i["entered"] = torch.arange(T).expand(B, G, T).int()
    i["when"] = (torch.arange(T - L, T) + 1).expand(B, L).int()
    i["last"] = torch.full((B,), T, dtype=torch.int32)
    i = {k: v.double() if v.is_floating_point() else v for k, v in i.items()}
    near, h = i["y"].clone(), i["initial_state"].clone()
    with linmu_ops.use_impl(f"far_attention:{impl}"):
        y, final = mixed(**i)
    group = torch.arange(H) // (H // G)
    for t in range(T):
        f = torch.einsum("bhp,hpn->bhn", i["k"][:, t, group], i["b_map"][group]).softmax(-1)
        v = torch.cat((i["v"][:, t, group], torch.ones(B, H, 1, dtype=torch.float64)), -1)
        step = i["steps"][:, t].flatten(1)[..., None, None]
        h = h * (-i["rates"][:, None, None] * step).exp() + step * v[..., None] * f[:, :, None]
        if (own := t - (T - L)) < 0:
            continue
        g = torch.einsum("bhp,hpn->bhn", i["q"][:, own], i["c_map"])
        g = (g * (i["scale"] * P**-0.5)[:, None]).softmax(-1)
        out = torch.einsum("bhpn,bhn->bhp", h, g)
        share = (i["rest"][:, own] + out[..., P].log() - i["lse"][:, own]).sigmoid()[..., None]
        gate = torch.nn.functional.silu(i["z_gate"][:, own]).view(B, H, P)
        want = (1 - share) * near[:, own] + share * gate * out[..., :P] / out[..., P:]
        torch.testing.assert_close(y[:, own], want)
    torch.testing.assert_close(final, h)


def test_a_row_in_two_calls_is_one():
    i = make_inputs(BLOCK, torch.float64)
    T, L = i["k"].shape[1], i["q"].shape[1]
    middle = int(i["entered"].max()) // 2
    whole = cloned(i) | dict(last=torch.full((1,), T, dtype=torch.int32))
    first, second = cloned(whole), cloned(whole)
    first |= dict(last=torch.full((1,), middle, dtype=torch.int32), when=i["when"].masked_fill(i["when"] > middle, -1))
    y, final = mixed(**whole)
    part, state = mixed(**first)
    later = i["when"] > middle
    second["initial_state"] = state
    second["entered"] = torch.where(i["entered"] < middle, -1, i["entered"] - middle).int()
    second["when"] = torch.where(later, i["when"] - middle, -1).int()
    rest, end = mixed(**second)
    torch.testing.assert_close(torch.where(later[..., None, None], rest, part), y)
    torch.testing.assert_close(end, final)
    assert L > later.sum() > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_read_is_not_seen(dtype, value):
    """What never enters, what enters later, and other tokens' queries and shares."""
    i = make_inputs("a few at a time", dtype)
    i["last"].fill_(3)
    clean = cloned(i)
    never = (i["entered"] < 0) | (i["entered"] >= i["when"].max().clamp(min=3))
    reads = (i["when"] >= 0) & (i["when"] <= 3)
    never = never | (i["entered"] >= 3)
    i["when"] = clean["when"] = torch.where(reads, i["when"], -1)
    for name in ("k", "v", "steps"):
        t = i[name].transpose(1, 2)
        t[never] = value
    i["q"][:, 5], i["rest"][:, 6], i["z_gate"][:, 7] = value, value, value
    got, want = mixed(**i), mixed(**clean)
    others = torch.tensor([n not in (5, 6, 7) for n in range(i["q"].shape[1])])
    assert torch.equal(got[0][:, others], want[0][:, others])
    assert torch.equal(got[1], want[1]) and got[1].isfinite().all()


def test_what_is_not_finite_is_in_the_state_from_then_on():
    i = make_inputs("a few at a time", torch.float32)
    i["v"][0, 20, 1, 3] = torch.nan
    i["entered"][0, 1, 20] = 4
    clean = cloned(i)
    clean["v"][0, 20, 1, 3] = 0
    got, want = mixed(**i)[0], mixed(**clean)[0]
    bad = got.isnan()
    after = (i["when"] > 4)[0]
    assert bad[0, after][:, 2:4, 3].all() and int(bad.sum()) == 2 * int(after.sum())
    assert torch.equal(got[~bad], want[~bad])


def test_a_state_without_mass_is_far_and_empty():
    i = make_inputs("a few at a time", torch.float32, ())
    i["entered"].fill_(-1)
    i["when"].fill_(0)
    i["rest"].fill_(200.0)  # for all that is far
    assert not mixed(**i)[0].any()


def test_who_does_not_read_keeps_its_bits():
    i = make_inputs(BLOCK, torch.bfloat16)
    before, still = i["y"].clone(), i["when"] < 0
    y = mixed(**i)[0]
    assert still.any() and torch.equal(y[still], before[still]) and not torch.equal(y, before)


def test_opcheck():
    for options in (OPTIONS["plain"], OPTIONS["on and on"]):
        i = make_inputs("a few at a time", torch.float32, options)
        names = [a.name for a in torch.ops.linmu.far_attention.default._schema.arguments]
        torch.library.opcheck(torch.ops.linmu.far_attention, (*(i.get(n) for n in names[:-1]), 0.3))


def test_compile():
    f = torch.compile(linmu_ops.far_attention, fullgraph=True, dynamic=True)
    for case in ("a few at a time", "one at a time"):
        i = make_inputs(case, torch.float32)
        after = cloned(i)
        want = by_reference(**after)
        torch.testing.assert_close(f(**i), want[1])
        torch.testing.assert_close(i["y"], after["y"])


def test_strided():
    i = make_inputs("a few at a time", torch.float32)
    for name, t in i.items():
        if t.dim() > 1 and name != "y":
            i[name] = t.transpose(0, 1).contiguous().transpose(0, 1)
    i["k"] = torch.cat((i["k"], i["k"]), dim=-1)[..., : i["k"].shape[-1]]
    check_against_reference(mixed, by_reference, i)


def test_same_bits_for_any_number_of_threads():
    i = make_inputs(BLOCK, torch.float32)
    assert_same_bits(lambda: mixed(**cloned(i)), threads=(1, 2, 3))


@pytest.mark.sweep
@pytest.mark.parametrize("isa", OLDER)
def test_isa(isa):
    rerun_with_isa(isa, __file__, "test_each_number or test_what_is_not or (test_forward and on)")


BAD = {
    r"lse must be \(B, L, H\) with B=2, L=40, H=6, got shape \(2, 39, 6\)": lambda i: dict(lse=i["lse"][:, 1:]),
    r"k's G=4 must divide H=6": lambda i: dict(k=torch.randn(2, 53, 4, 17)),
    r"steps must be \(B, T, G, H/G\) with .*, got": lambda i: dict(steps=i["steps"][:, 1:]),
    r"z_gate must be \(B, L, HP\) with .*, got": lambda i: dict(z_gate=i["z_gate"][..., 1:]),
    r"initial_state must be \(B, H, P\+1, N\) with": lambda i: dict(initial_state=i["initial_state"][:, :, 1:]),
    r"y must be contiguous": lambda i: dict(y=i["y"].transpose(0, 1).contiguous().transpose(0, 1)),
    r"entered must be in -1..53": lambda i: dict(entered=i["entered"] + 54),
    r"when must be in -1..53": lambda i: dict(when=i["when"] - 2),
    r"last must be in 0..53": lambda i: dict(last=i["last"] - 54),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_values_and_shapes(impl, message):
    i = make_inputs("a few at a time", torch.float32)
    before = i["y"].clone()
    with pytest.raises(ValueError, match=f"far_attention: {message}"), linmu_ops.use_impl(f"far_attention:{impl}"):
        linmu_ops.far_attention(**{**i, **BAD[message](i)})
    assert torch.equal(i["y"], before)


def test_types_and_gradients():
    i = make_inputs("a few at a time", torch.float32)
    with pytest.raises(TypeError, match="far_attention: y must be float32, got float64"):
        linmu_ops.far_attention(**{**i, "y": i["y"].double()})
    with pytest.raises(TypeError, match="far_attention: when must be int32, got int64"):
        linmu_ops.far_attention(**{**i, "when": i["when"].long()})
    with pytest.raises(RuntimeError, match="far_attention: has no gradient"):
        linmu_ops.far_attention(**{**i, "q": i["q"].requires_grad_()})
