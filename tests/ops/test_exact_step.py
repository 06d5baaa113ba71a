"""`exact_step` against its reference, and by what it says of itself."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference
from tests.ops.cases.exact_step import CASES, DTYPES, OPTIONS, by_reference, cloned, make_inputs, stepped
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa

DEFAULT = "seven heads to a group, default sizes"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype, options):
    check_against_reference(stepped, by_reference, make_inputs(case, dtype, **OPTIONS[options]))


@pytest.mark.parametrize("heads", range(1, 8))
def test_each_number_of_heads_to_a_group(heads, monkeypatch):
    monkeypatch.setitem(CASES, "heads", (2, 2 * heads, 2, 19, 21, 18, 2, 9, 4, (7, 77)))
    check_against_reference(stepped, by_reference, make_inputs("heads", torch.float32, gate=True))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_many_steps_go_around_the_ring(impl):
    """Each token is at its place, those of padding nowhere; a row is due when its window has moved on."""
    inputs = make_inputs("around the ring", torch.float64)
    inputs |= dict(seen=torch.tensor([0, 0, 3, 50]), sinks=torch.zeros(4, 1, dtype=torch.bool))
    inputs["cos"], inputs["sin"] = torch.ones_like(inputs["cos"]), torch.zeros_like(inputs["sin"])
    tokens, due = [[] for _ in range(4)], [[] for _ in range(4)]
    before = inputs["seen"].tolist()
    with linmu_ops.use_impl(f"exact_step:{impl}"):
        for step in range(40):
            real = torch.tensor([True, step % 3 != 0, True, step % 2 == 0])
            inputs |= dict(k=torch.randn_like(inputs["k"]), v=torch.randn_like(inputs["v"]), real=real)
            y, left = linmu_ops.exact_step(**inputs)
            assert not y[~real].any() and y[real].abs().min() > 0
            for row in range(4):
                tokens[row] += [(inputs["k"][row], inputs["v"][row])] * bool(real[row])
                due[row] += [before[row] + len(tokens[row])] * bool(left[row])
    assert inputs["seen"].tolist() == [b + len(t) for b, t in zip(before, tokens, strict=True)]
    assert inputs["sinks"][:, 0].tolist() == [True, True, False, False]
    for row in range(4):
        # The ring has 14 places, of which 7 leave at a time, first after 13 tokens.
        assert due[row] == [n for n in range(before[row] + 1, int(inputs["seen"][row]) + 1) if n >= 13 and n % 7 == 6]
        for i, (k, v) in list(enumerate(tokens[row], before[row]))[-14:]:
            assert torch.equal(inputs["keys"][row, :, 1 + i % 14], k)
            assert torch.equal(inputs["values"][row, :, 1 + i % 14], v)
    assert torch.equal(inputs["keys"][0, :, 0], tokens[0][0][0])


def test_what_is_not_seen_is_not_read():
    """NaN in places of no token, in a sink that is none, and in a state of nothing."""
    inputs = make_inputs("at the first tokens", torch.float32, gate=True)
    clean = cloned(inputs)
    for row, seen in enumerate(inputs["seen"].tolist()):
        last = 3 + torch.arange(8)[seen + 1 :]
        inputs["keys"][row, :, last] = inputs["values"][row, :, last] = torch.nan
        inputs["keys"][row, :, 11:] = inputs["values"][row, :, :3] = torch.nan
    inputs["ssm"][:] = torch.nan
    for got, want in zip(linmu_ops.exact_step(**inputs), linmu_ops.exact_step(**clean), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(value):
    inputs = make_inputs("where the kept fill up", torch.float32)
    clean = cloned(inputs)
    inputs["values"][1, 0, 4:] = value
    got, want = linmu_ops.exact_step(**inputs)[0], linmu_ops.exact_step(**clean)[0]
    others = torch.arange(5) != 1
    assert torch.equal(got[others], want[others]) and torch.equal(got[1, 48:], want[1, 48:])
    assert not got[1, :48].isfinite().any()


def test_a_state_without_mass_is_far_and_empty():
    inputs = make_inputs("around the ring", torch.float32)
    inputs["ssm"][:] = 0
    inputs["rest"] = torch.full_like(inputs["rest"], 200.0)  # for all that is far
    y, _ = linmu_ops.exact_step(**inputs)
    assert not y.any()


def test_opcheck():
    for options in ({}, OPTIONS["interleaved, gated, padded"]):
        i = make_inputs("around the ring", torch.float32, **options)
        names = [a.name for a in torch.ops.linmu.exact_step.default._schema.arguments]
        args = (*(i.get(n) for n in names[:18]), i["window"], 0.3, False, False, 3)
        torch.library.opcheck(torch.ops.linmu.exact_step, args)


def test_compile():
    f = torch.compile(linmu_ops.exact_step, fullgraph=True, dynamic=True)
    for case in ("around the ring", "where the kept fill up"):
        i = make_inputs(case, torch.float32, gate=True)
        after = cloned(i)
        want = by_reference(**after)[:2]
        torch.testing.assert_close(f(**i), want)
        torch.testing.assert_close(i, after)


def test_strided():
    i = make_inputs("around the ring", torch.float32, gate=True)
    for name in ("ssm", "q", "k", "v", "dt", "rest", "c_map", "cos", "sin"):
        i[name] = i[name].transpose(0, 1).contiguous().transpose(0, 1)
    check_against_reference(stepped, by_reference, i)


def test_same_bits_for_any_number_of_threads():
    i = make_inputs(DEFAULT, torch.float32, gate=True)
    assert_same_bits(lambda: stepped(**cloned(i)), threads=(1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OLDER)
def test_isa(isa):
    rerun_with_isa(isa, __file__, "test_forward or test_each_number")


BAD = {
    r"dt must be \(B, H\) with B=4, H=10, got shape \(3, 10\)": lambda i: dict(dt=i["dt"][:3]),
    r"k's G=3 must divide H=10": lambda i: dict(k=torch.randn(4, 3, 33)),
    r"steps must be \(B, G, n-s, H/G\) with .*, got": lambda i: dict(steps=i["steps"][:, :, 1:]),
    r"cos must be given with sin, got one of them": lambda i: dict(sin=None),
    r"sin must be \(B, R\) with B=4, R=32, got": lambda i: dict(sin=i["sin"][:, :30]),
    r"cos must be of even R <= P=33, got R=34": lambda i: dict(cos=torch.ones(4, 34), sin=torch.ones(4, 34)),
    r"window must be >= 1, got 0": lambda i: dict(window=0),
    r"far_limit must be >= 1, got 0": lambda i: dict(far_limit=0),
    r"keys must be of n >= 21 places, got 20": lambda i: dict(window=10),
    r"keys must be contiguous": lambda i: dict(keys=i["keys"].transpose(0, 1).contiguous().transpose(0, 1)),
    r"seen must be from 0 to": lambda i: dict(seen=i["seen"] - 98),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_values_and_shapes(impl, message):
    i = make_inputs("around the ring", torch.float32)
    with pytest.raises(ValueError, match=f"exact_step: {message}"), linmu_ops.use_impl(f"exact_step:{impl}"):
        linmu_ops.exact_step(**{**i, **BAD[message](i)})


def test_a_call_that_raises_writes_nothing():
    i = make_inputs("around the ring", torch.float32)
    i["seen"][2] = 2**62
    before = cloned(i)
    for impl in ("cpu", "reference"):
        with pytest.raises(ValueError, match="seen must be"), linmu_ops.use_impl(f"exact_step:{impl}"):
            linmu_ops.exact_step(**i)
        assert all(torch.equal(v, before[k]) for k, v in i.items() if torch.is_tensor(v))


def test_types_and_gradients():
    i = make_inputs("around the ring", torch.float32)
    with pytest.raises(TypeError, match="exact_step: keys must be float32, got float64"):
        linmu_ops.exact_step(**{**i, "keys": i["keys"].double()})
    with pytest.raises(TypeError, match="exact_step: sinks must be bool, got uint8"):
        linmu_ops.exact_step(**{**i, "sinks": i["sinks"].byte()})
    with pytest.raises(RuntimeError, match="exact_step: has no gradient"):
        linmu_ops.exact_step(**{**i, "q": i["q"].requires_grad_()})
