"""`ssd_scan` against its reference: every value and every gradient, over dtypes, directions, options and sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linmu_ops
from linmu_ops import Reverse
from linmu_ops._testing import grouped
from tests.covering import covering
from tests.ops.cases.ssd_scan import (
    ALL,
    CASES,
    DIRECTIONS,
    DTYPES,
    SMALL,
    check,
    check_strided_inputs,
    check_without_tokens,
    make_inputs,
    scan,
    used,
)
from tests.ops.reruns import OLDER, rerun_with_isa


@covering("case, dtype, direction, options", CASES, DTYPES, DIRECTIONS, list(ALL))
def test_forward_and_backward(case, dtype, direction, options):
    check(make_inputs(case, dtype, direction, ALL[options]) | dict(chunk_size=32))


@pytest.mark.parametrize("length", [63, 64, 65, 130])
@pytest.mark.parametrize("mean", [(), ("normalize",)], ids=["", "mean"])
def test_own_chunk_size(length, mean):
    check(make_inputs((1, length, 2, 1, 1, 2, 3, 4), torch.float32, "both", ("all", *mean)))


@pytest.mark.parametrize(
    "option",
    [
        "D", "dt_bias", "dt_softplus", "seq_idx", "token_order", "initial_state", "return_final_state", "chunk_size",
        "reverse_dt", "reverse_A", "reverse_B", "reverse_C", "reverse_dt_bias", "reverse_mask", "reverse_seq_idx",
        "gate", "head_gate",
    ],
)  # fmt: skip
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mean", [(), ("normalize",)], ids=["", "mean"])
def test_each_option_alone(direction, option, mean):
    if (option.startswith("reverse_") and direction == "forward") or ("gate" in option and direction != "both"):
        pytest.skip(f"direction={direction!r} takes no {option}")
    check(make_inputs(SMALL, torch.float32, direction, (option, *mean)))


@given(
    seed=st.integers(0, 10**6),
    groups=st.tuples(*[st.sampled_from([1, 2, 3, 6])] * 3),
    sizes=st.tuples(st.integers(1, 2), st.integers(0, 50), st.integers(1, 20), st.integers(1, 20)),
    direction=st.sampled_from(DIRECTIONS),
    options=st.sets(
        st.sampled_from(
            ["D", "dt_bias", "dt_softplus", "seq_idx", "token_order", "initial_state", "return_final_state",
             "chunk_size", "reverse_dt", "reverse_A", "reverse_B", "reverse_C", "reverse_mask", "reverse_seq_idx",
             "gate", "normalize"]
        )
    ),
)  # fmt: skip
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_combination(seed, groups, sizes, direction, options):
    B, L, P, N = sizes
    check(make_inputs((B, L, 6, *groups, P, N), torch.float32, direction, options, seed))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", [(2, 0, 2, 1, 2, 2, 3, 4), (0, 5, 2, 1, 2, 2, 3, 4)], ids=["L0", "B0"])
def test_empty(case, direction):
    check_without_tokens(case, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_strided_inputs(direction):
    check_strided_inputs(direction)


@pytest.mark.parametrize("mean", [(), ("normalize",)], ids=["", "mean"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction, mean):
    i = make_inputs((1, 5, 2, 1, 2, 2, 2, 3), torch.float64, direction, ("all", *mean))
    names = used(i)

    def f(*leaves):
        return scan(**{**i, **dict(zip(names, leaves, strict=True))})

    assert torch.autograd.gradcheck(f, [i[k].clone().requires_grad_() for k in names])


@pytest.mark.parametrize("mean", [(), ("normalize",)], ids=["", "mean"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opcheck(direction, mean):
    i = make_inputs((2, 7, 4, 2, 2, 4, 3, 5), torch.float32, direction, ("all", *mean))
    names = [a.name for a in torch.ops.linmu.ssd_scan.default._schema.arguments]
    defaults = dict(dt_softplus=False, normalize=False, return_final_state=False, chunk_size=0)
    given_ = {k: v.requires_grad_() if k in used(i) else v for k, v in i.items()}
    args = [given_.get(n, defaults.get(n)) for n in names]
    torch.library.opcheck(torch.ops.linmu.ssd_scan.default, args)


@pytest.mark.parametrize("mean", [(), ("normalize",)], ids=["", "mean"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compile_with_any_length(direction, mean):
    torch._dynamo.reset()
    compiled = torch.compile(linmu_ops.ssd_scan, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 70, 33):
        i = make_inputs((1, length, 4, 2, 2, 4, 4, 8), torch.float32, direction, ("all", *mean))
        leaves = [{**i, "x": i["x"].clone().requires_grad_()} for _ in range(2)]
        outputs, expected = compiled(**grouped(leaves[0])), scan(**leaves[1])
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        outputs[0].sum().backward(), expected[0].sum().backward()
        assert torch.equal(leaves[0]["x"].grad, leaves[1]["x"].grad)


@pytest.mark.parametrize("isa", OLDER)
def test_older_processors(isa):
    rerun_with_isa(isa, __file__, "test_forward_and_backward and all and 33 or test_own_chunk_size or any_combination")


BAD = [
    (dict(x=torch.zeros(2, 3, 4)), ValueError, r"x must be \(B, L, Gx, P\)"),
    (dict(dt=torch.zeros(2, 3, 8)), ValueError, r"dt must be \(B, L, H\) with B=2, L=20, got shape \(2, 3, 8\)"),
    (dict(A=torch.zeros(3)), ValueError, r"A must be \(H,\) with H=8"),
    (dict(x=torch.zeros(2, 20, 3, 6)), ValueError, "x's Gx=3 must divide H=8"),
    (dict(B=torch.zeros(2, 20, 3, 5)), ValueError, "B's Gb=3 must divide H=8"),
    (dict(C=torch.zeros(2, 20, 3, 5)), ValueError, "C's Gc=3 must divide H=8"),
    (dict(B=torch.zeros(2, 20, 2, 5).double()), TypeError, "B must be float32, got float64"),
    (dict(x=torch.zeros(2, 20, 2, 6).int()), TypeError, "x must be float32 or float64 or bfloat16 or float16, got int"),
    (dict(D=torch.zeros(8, 6)), ValueError, r"D must be \(H,\)"),
    (dict(gate=torch.zeros(2, 20)), ValueError, r"gate must be \(B, L, H\)"),
    (dict(reverse_mask=torch.zeros(2, 20)), TypeError, r"reverse\.mask must be bool, got float32"),
    (dict(reverse_dt=torch.zeros(2, 20, 7)), ValueError, r"reverse\.dt must be \(B, L, H\) with B=2, L=20, H=8, got "),
    (dict(reverse_B=torch.zeros(2, 20, 2, 5).double()), TypeError, r"reverse\.B must be float32, got float64"),
    (dict(reverse_A=torch.zeros(8, device="meta")), ValueError, r"reverse\.A must be on cpu, got meta"),
    (dict(reverse=True), TypeError, "reverse must be a linmu_ops.Reverse, got bool"),
    (dict(reverse=(torch.zeros(2, 20, 8),)), TypeError, "reverse must be a linmu_ops.Reverse, got tuple"),
    (dict(seq_idx=torch.zeros(2, 20).long()), TypeError, "seq_idx must be int32, got int64"),
    (dict(initial_state=torch.zeros(2, 8, 6, 5).bfloat16()), TypeError, "initial_state must be float32, got bfloat16"),
    (dict(initial_state=torch.zeros(2, 8, 5, 6)), ValueError, r"initial_state must be \(B, H, P, N\)"),
    (dict(D=torch.zeros(8, device="meta")), ValueError, "D must be on cpu, got meta"),
    (dict(x=[1.0]), TypeError, "x must be a Tensor, got list"),
    (dict(direction="sideways"), ValueError, "direction must be one of forward, reverse, both, got 'sideways'"),
    (
        dict(normalize=True, initial_state=torch.zeros(2, 8, 6, 5)),
        ValueError,
        r"initial_state must be \(B, H, P\+1, N\) with B=2, H=8, P\+1=7, N=5, got shape \(2, 8, 6, 5\)",
    ),
    (dict(chunk_size=0), ValueError, "chunk_size must be >= 1, got 0"),
    (dict(token_order=torch.arange(20).expand(2, 20).int() + 1), ValueError, "token_order must hold every position"),
    (dict(token_order=torch.zeros(2, 20).int()), ValueError, "token_order must hold every position"),
    (dict(token_order=torch.full((2, 20), -(2**31)).int()), ValueError, "token_order must hold every position"),
    (dict(direction="forward", reverse=Reverse()), ValueError, "reverse needs direction='reverse' or 'both', got dir"),
    (dict(direction="reverse", gate=torch.zeros(8)), ValueError, "gate needs direction='both', got direction='rev"),
]


@pytest.mark.parametrize("change,error,message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(change, error, message):
    i = make_inputs(SMALL)
    with pytest.raises(error, match=f"ssd_scan: {message}"):
        scan(**{**i, **change})


def test_what_reverse_leaves_out_is_the_forward_directions():
    """Field by field, in values and in gradients; a tensor given to both directions gets the gradients of both."""
    i = make_inputs(SMALL, torch.float64, "both", ("dt_bias", "seq_idx", "reverse_mask", "gate"))
    names = [k for k in ("dt", "A", "B", "C", "dt_bias", "seq_idx") if k in i]
    leaves = [i[k].requires_grad_() for k in ("x", "dt", "A", "B", "C", "dt_bias")]

    def results(**own):
        y = scan(**i, **{f"reverse_{k}": v for k, v in own.items()})
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    want = results()
    for own in [*[[n] for n in names], names]:
        for got, expected in zip(results(**{n: i[n] for n in own}), want, strict=True):
            torch.testing.assert_close(got, expected)
    assert set(names) | {"mask"} == set(Reverse._fields)


def test_the_parts_of_reverse_are_no_arguments():
    i = make_inputs(SMALL)
    for name in Reverse._fields:
        with pytest.raises(TypeError, match=f"unexpected keyword argument 'reverse_{name}'"):
            linmu_ops.ssd_scan(**i, **{f"reverse_{name}": None})
