"""`gated_delta_scan` against its reference: every value and every gradient, over dtypes, directions, options, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linmu_ops
from linmu_ops import DeltaReverse
from linmu_ops._testing import check_against_reference, grouped
from tests.covering import covering
from tests.ops.cases.gated_delta_scan import (
    CASES,
    DIRECTIONS,
    DTYPES,
    OPTIONS,
    SMALL,
    by_reference,
    make_inputs,
    scan,
    used,
)
from tests.ops.cases.scans import check_empty, check_strided
from tests.ops.reruns import OLDER, assert_same_bits, rerun_with_isa


def check(i):
    check_against_reference(scan, by_reference, i, used(i))


@covering("case, dtype, direction, options", CASES, DTYPES, DIRECTIONS, [(), ("all",)])
def test_forward_and_backward(case, dtype, direction, options):
    check(make_inputs(case, dtype, direction, options) | dict(chunk_size=32))


@pytest.mark.parametrize("length", [63, 64, 65, 130])
def test_own_chunk_size(length):
    check(make_inputs((1, length, 2, 2, 1, 2, 40, 3), torch.float32, "both", ("all",)))


@pytest.mark.parametrize("silent", ["q", "v"])  # nothing but the initial state, or its gradient, is left of the rest
@pytest.mark.parametrize("chunk_size", [None, 128])
@pytest.mark.parametrize("K", [1, 2, 3, 4, 7, 8, 12, 16, 33])
def test_what_visits_overwrite_leaves_no_rounding(K, chunk_size, silent):
    """As many visits that overwrite nearly all that is under their keys as make a state many digits smaller."""
    options = ("initial_state", "return_final_state", "use_qk_l2norm_in_kernel")
    for dtype in (torch.float32, torch.float64):
        i = make_inputs((1, 64, 1, 1, 1, 1, K, 5), dtype, "forward", options) | dict(chunk_size=chunk_size)
        check(i | {silent: 0 * i[silent], "g": 0 * i["g"], "beta": 1 - i["beta"] / 100})


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_option_alone(direction, option):
    if (option.startswith("reverse_") and direction == "forward") or ("gate" in option and direction != "both"):
        pytest.skip(f"direction={direction!r} takes no {option}")
    check(make_inputs(SMALL, torch.float32, direction, (option,)))


@given(
    seed=st.integers(0, 10**6),
    groups=st.tuples(*[st.sampled_from([1, 2, 3, 6])] * 3),
    sizes=st.tuples(st.integers(1, 2), st.integers(0, 50), st.integers(1, 20), st.integers(1, 20)),
    direction=st.sampled_from(DIRECTIONS),
    options=st.sets(st.sampled_from(OPTIONS)),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_combination(seed, groups, sizes, direction, options):
    B, L, K, V = sizes
    check(make_inputs((B, L, 6, *groups, K, V), torch.float32, direction, options, seed))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "case",
    [(2, 0, 2, 1, 2, 2, 3, 4), (0, 5, 2, 1, 2, 2, 3, 4), (1, 5, 2, 1, 2, 2, 0, 4), (1, 5, 2, 1, 2, 2, 3, 0)],
    ids=["L0", "B0", "K0", "V0"],
)
def test_empty(case, direction):
    i = make_inputs((*case[:6], max(case[6], 1), max(case[7], 1)), torch.float32, direction, ("all",))
    narrow = {"q": case[6], "k": case[6], "v": case[7], "reverse_q": case[6], "reverse_k": case[6]}
    i |= {n: i[n][..., :size] for n, size in narrow.items() if n in i}
    i["initial_state"] = i["initial_state"][..., : case[6], : case[7]]
    check_empty(scan, by_reference, i, used(i))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_strided_inputs(direction):
    i = make_inputs(SMALL, torch.float32, direction, ("all",))
    check_strided(check, scan, i, direction, ("v", "q", "k"), "g", "reverse_k")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction):
    i = make_inputs((1, 5, 2, 2, 1, 2, 3, 2), torch.float64, direction, ("all",))
    names = used(i)

    def f(*leaves):
        return scan(**{**i, **dict(zip(names, leaves, strict=True))})

    assert torch.autograd.gradcheck(f, [i[k].clone().requires_grad_() for k in names])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opcheck(direction):
    i = make_inputs((2, 7, 4, 4, 2, 2, 5, 3), torch.float32, direction, ("all",))
    names = [a.name for a in torch.ops.linmu.gated_delta_scan.default._schema.arguments]
    given_ = {k: v.requires_grad_() if k in used(i) else v for k, v in i.items()} | dict(chunk_size=0)
    args = [given_.get(n) for n in names]
    torch.library.opcheck(torch.ops.linmu.gated_delta_scan.default, args)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compile_with_any_length(direction):
    torch._dynamo.reset()
    compiled = torch.compile(linmu_ops.gated_delta_scan, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 33):
        i = make_inputs((1, length, 4, 4, 2, 2, 8, 4), torch.float32, direction, ("all",))
        leaves = [{**i, "v": i["v"].clone().requires_grad_()} for _ in range(2)]
        y, state = compiled(**grouped(leaves[0], "gated_delta_scan"))
        expected, expected_state = scan(**leaves[1])
        assert torch.equal(y, expected) and torch.equal(state, expected_state)
        y.sum().backward(), expected.sum().backward()
        assert torch.equal(leaves[0]["v"].grad, leaves[1]["v"].grad)


@pytest.mark.parametrize("isa", OLDER)
def test_older_processors(isa):
    rerun_with_isa(isa, __file__, "test_forward_and_backward and all and 33 or test_own_chunk_size")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_same_bits_for_any_number_of_threads(direction):
    i = make_inputs((2, 70, 12, 6, 3, 12, 24, 16), torch.bfloat16, direction, ("all",))

    def run():
        leaves = {k: i[k].clone().requires_grad_() for k in used(i)}
        y, state = scan(**i | leaves)
        return [y, state, *torch.autograd.grad(y.float().sum() + state.sum(), list(leaves.values()))]

    assert_same_bits(run, threads=(1, 2, 3))


BAD = [
    (dict(q=torch.zeros(2, 3, 4)), ValueError, r"q must be \(B, L, Gq, K\)"),
    (dict(g=torch.zeros(2, 3, 8)), ValueError, r"g must be \(B, L, H\) with B=2, L=20, got shape \(2, 3, 8\)"),
    (dict(beta=torch.zeros(2, 20, 3)), ValueError, r"beta must be \(B, L, H\) with B=2, L=20, H=8"),
    (dict(q=torch.zeros(2, 20, 3, 6)), ValueError, "q's Gq=3 must divide H=8"),
    (dict(k=torch.zeros(2, 20, 3, 6)), ValueError, "k's Gk=3 must divide H=8"),
    (dict(v=torch.zeros(2, 20, 3, 5)), ValueError, "v's Gv=3 must divide H=8"),
    (dict(k=torch.zeros(2, 20, 2, 6).double()), TypeError, "k must be float32, got float64"),
    (dict(q=torch.zeros(2, 20, 8, 6).int()), TypeError, "q must be float32 or float64 or bfloat16 or float16, got int"),
    (dict(gate=torch.zeros(2, 20)), ValueError, r"gate must be \(B, L, H\)"),
    (dict(reverse_mask=torch.zeros(2, 20)), TypeError, r"reverse\.mask must be bool, got float32"),
    (dict(reverse_g=torch.zeros(2, 20, 7)), ValueError, r"reverse\.g must be \(B, L, H\) with B=2, L=20, H=8, got "),
    (dict(reverse_k=torch.zeros(2, 20, 2, 6).double()), TypeError, r"reverse\.k must be float32, got float64"),
    (dict(reverse=True), TypeError, "reverse must be a linmu_ops.DeltaReverse, got bool"),
    (dict(reverse=linmu_ops.Reverse()), TypeError, "reverse must be a linmu_ops.DeltaReverse, got Reverse"),
    (dict(seq_idx=torch.zeros(2, 20).long()), TypeError, "seq_idx must be int32, got int64"),
    (dict(initial_state=torch.zeros(2, 8, 6, 5).half()), TypeError, "initial_state must be float32, got float16"),
    (dict(initial_state=torch.zeros(2, 8, 5, 6)), ValueError, r"initial_state must be \(B, H, K, V\)"),
    (dict(v=[1.0]), TypeError, "v must be a Tensor, got list"),
    (dict(direction="sideways"), ValueError, "direction must be one of forward, reverse, both, got 'sideways'"),
    (dict(chunk_size=0), ValueError, "chunk_size must be >= 1, got 0"),
    (dict(token_order=torch.zeros(2, 20).int()), ValueError, "token_order must hold every position"),
    (dict(direction="forward", reverse=DeltaReverse()), ValueError, "reverse needs direction='reverse' or 'both', got"),
    (dict(direction="reverse", gate=torch.zeros(8)), ValueError, "gate needs direction='both', got direction='rev"),
]


@pytest.mark.parametrize("change,error,message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(change, error, message):
    i = make_inputs(SMALL)
    with pytest.raises(error, match=f"gated_delta_scan: {message}"):
        scan(**{**i, **change})


def test_what_reverse_leaves_out_is_the_forward_directions():
    """Field by field, in values and in gradients; a tensor given to both directions gets the gradients of both."""
    i = make_inputs(SMALL, torch.float64, "both", ("seq_idx", "reverse_mask", "gate"))
    names = [k for k in DeltaReverse._fields if k != "mask"]
    leaves = [i[k].requires_grad_() for k in ("q", "k", "v", "g", "beta", "gate")]

    def results(**own):
        y = scan(**i, **{f"reverse_{k}": v for k, v in own.items()})
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    want = results()
    for own in [*[[n] for n in names], names]:
        for got, expected in zip(results(**{n: i[n] for n in own}), want, strict=True):
            torch.testing.assert_close(got, expected)
