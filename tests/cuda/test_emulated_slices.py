"""The scans by slices, the kernels of sm_90a that keep their states in registers, run by the emulator."""

from __future__ import annotations

import ctypes
import math
import random

import pytest
import torch

from linmu_ops._testing import check_implementation, run_op
from tests.covering import covering
from tests.ops.cases import ssd_scan as scan_cases

pytestmark = pytest.mark.usefixtures("by_emulator")
PLAIN, FORWARD = (), ("D", "dt_softplus", "dt_bias", "seq_idx", "initial_state", "return_final_state")
REVERSE = (*FORWARD, "reverse_dt", "reverse_A", "reverse_dt_bias", "reverse_mask", "reverse_seq_idx")
BOTH = (*REVERSE, "gate")  # B and C are those of the forward direction
OWN = (*BOTH, "reverse_B", "reverse_C")
SHARED = {"forward": FORWARD, "reverse": REVERSE, "both": BOTH}
SMALL = (1, 130, 2, 1, 1, 2, 64, 64)
# B, L, H, Gx, Gb, Gc, P, N
CASES = [
    ((1, 64, 2, 1, 1, 2, 128, 128), "forward", PLAIN),  # one whole chunk, the slices of a head
    ((2, 65, 4, 4, 1, 1, 64, 128), "forward", PLAIN),  # two heads of one B and C
    ((1, 127, 3, 1, 1, 3, 64, 64), "forward", FORWARD),  # a head without another, each with its C
    ((1, 300, 2, 1, 1, 2, 72, 72), "forward", FORWARD),  # tiles that are filled up with zeros
    ((2, 33, 4, 2, 2, 4, 8, 16), "forward", ("D", "seq_idx")),
    ((1, 150, 2, 2, 2, 2, 128, 40), "forward", ("initial_state",)),
    ((1, 200, 6, 3, 2, 6, 40, 128), "forward", ("return_final_state",)),
    ((1, 70, 3, 3, 1, 1, 136, 16), "forward", ("D", "token_order", "return_final_state")),  # three slices of a head
    ((1, 65, 2, 1, 1, 2, 128, 128), "reverse", PLAIN),
    ((2, 150, 3, 1, 3, 1, 40, 24), "reverse", REVERSE),
    ((1, 64, 4, 2, 2, 4, 72, 64), "reverse", (*REVERSE, "reverse_B", "reverse_C", "token_order")),
    ((1, 64, 2, 1, 1, 2, 128, 128), "both", PLAIN),  # a chunk without another
    ((1, 65, 2, 1, 1, 2, 128, 128), "both", BOTH),  # a pair, its right chunk of one visit
    ((2, 128, 4, 4, 1, 1, 64, 64), "both", ("head_gate", "seq_idx", "reverse_mask")),
    ((1, 150, 3, 1, 1, 3, 64, 64), "both", (*BOTH, "token_order")),  # each head with its C
    ((1, 140, 2, 2, 2, 2, 64, 128), "both", BOTH),  # the same, too large for three stages
    ((1, 129, 2, 1, 1, 1, 136, 40), "both", ("D", "gate", "token_order")),
    ((1, 65, 2, 1, 1, 2, 128, 128), "both", OWN),
    ((2, 100, 4, 2, 2, 4, 16, 72), "both", (*OWN, "token_order")),
]


@pytest.fixture(autouse=True)
def sliced(emulated, monkeypatch):
    """Each test of this file runs the kernel."""
    monkeypatch.setenv("LINMU_CUDA_ARCH", "90")
    emulated.probe_stored_matrices.restype = ctypes.c_int64
    before = emulated.probe_stored_matrices()
    yield
    assert emulated.probe_stored_matrices() > before


def make(case, direction, options=()):
    return scan_cases.make_inputs(case, torch.bfloat16, direction, options)


def check(inputs):
    check_implementation("ssd_scan", "cpu", inputs)


@pytest.mark.parametrize(("case", "direction", "options"), CASES, ids=str)
def test_scan(case, direction, options):
    check(make(case, direction, options))


@pytest.mark.parametrize("seed", [0, 1, *[pytest.param(s, marks=pytest.mark.sweep) for s in range(2, 80)]])
def test_options_and_sizes_crossed(seed):
    draw = random.Random(seed)
    H = draw.choice([1, 2, 3, 4, 6])
    groups = [draw.choice([g for g in range(1, H + 1) if H % g == 0]) for _ in range(3)]
    sizes = draw.choice([8, 64, 72, 80, 128, 136]), draw.choice([8, 40, 64, 72, 80, 128])
    direction = draw.choice(scan_cases.DIRECTIONS)
    every = {"forward": FORWARD, "reverse": OWN[:-3] + OWN[-2:], "both": OWN}[direction]
    options = [o for o in (*every, "token_order") if draw.random() < 0.5]
    if direction == "both" and draw.random() < 0.5:
        options = [o for o in options if o not in ("reverse_B", "reverse_C")]
    case = (draw.choice([1, 1, 2]), draw.choice([33, 64, 65, 127, 128, 129, 200, 300]), H, *groups, *sizes)
    check(make(case, direction, options))


@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
def test_a_mean(direction):
    """Of x with channels of ones: another slice of a head of 64 channels."""
    check(make((1, 70, 2, 1, 1, 2, 64, 40), direction, ("normalize", "initial_state", "return_final_state")))


@pytest.mark.parametrize("option", ["D", "dt_bias", "seq_idx", "initial_state", "return_final_state", "token_order"])
def test_one_option(option):
    check(make(SMALL, "forward", (option,)))


@pytest.mark.parametrize("option", ["gate", "head_gate", "reverse_mask", "reverse_seq_idx", "reverse_A", "token_order"])
def test_one_option_of_both(option):
    check(make((1, 130, 2, 1, 1, 2, 16, 24), "both", (option,)))


@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
@pytest.mark.parametrize("decay", [1e-6, 1.0, 50.0])
def test_decays_of_all_sizes(decay, direction):
    inputs = make((1, 140, 2, 1, 1, 2, 16, 64), direction, ("D",))
    check(inputs | dict(A=torch.full((2,), -decay), dt=torch.rand(1, 140, 2) * 0.5 + 0.5))


@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
def test_steps_that_grow(direction):
    inputs = make((1, 100, 2, 1, 1, 2, 64, 16), direction)
    inputs["dt"][:, ::3] *= -0.2
    check(inputs)


@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
@pytest.mark.parametrize("every", [64, 20])
def test_restarts_at_and_within_the_edges_of_chunks(every, direction):
    index = (torch.arange(200) // every).int().expand(1, 200)
    check(make((1, 200, 2, 1, 1, 2, 16, 64), direction) | dict(seq_idx=index))


@pytest.mark.parametrize(
    ("direction", "options"),
    [("forward", PLAIN), ("forward", FORWARD), ("reverse", REVERSE), ("both", BOTH), ("both", OWN)],
    ids=["forward", "forward-all", "reverse", "both", "own B and C"],
)
def test_scan_in_spans(direction, options):
    """Enough chunks for two spans."""
    check(make((1, 1100, 2, 1, 1, 2, 8, 8), direction, options))


@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
def test_twice_the_same_bits(direction):
    inputs = make((1, 130, 2, 1, 1, 2, 64, 16), direction, SHARED[direction])
    first, second = (run_op("ssd_scan", **inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", [1, 2, *[pytest.param(s, marks=pytest.mark.sweep) for s in range(3, 21)]])
@pytest.mark.parametrize(
    ("direction", "options"),
    [("reverse", ("token_order",)), ("both", BOTH), ("both", (*OWN, "token_order"))],
    ids=["reverse", "both", "own B and C"],
)
def test_the_order_in_which_warpgroups_run_changes_no_bit(direction, options, seed, monkeypatch):
    inputs = make((1, 270, 2, 1, 1, 2, 16, 16), direction, options)
    expected = run_op("ssd_scan", **inputs)
    monkeypatch.setenv("LINMU_EMULATED_SEED", str(seed))
    got = run_op("ssd_scan", **inputs)
    pairs = zip(*((o if isinstance(o, tuple) else (o,)) for o in (got, expected)), strict=True)
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("options", [BOTH, OWN], ids=["shared", "own B and C"])
def test_gathered_rows_are_those_that_tma_loads(options):
    inputs = make((1, 140, 2, 1, 1, 2, 40, 72), "both", options)
    in_order = run_op("ssd_scan", **inputs, token_order=torch.arange(140).int()[None])
    in_place = run_op("ssd_scan", **inputs)
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(in_place, in_order, strict=True))


@covering("direction, name, value", scan_cases.DIRECTIONS, ["x", "B", "C", "dt"], [math.nan, 1e30, math.inf])
def test_what_is_not_finite_reaches_what_sees_it(name, value, direction):
    """Between restarts: nothing comes through."""
    L, at = 150, 70
    inputs = make((1, L, 2, 1, 1, 2, 16, 16), direction, ("return_final_state",))
    inputs["seq_idx"] = ((torch.arange(L) >= 90).int() + (torch.arange(L) >= 10).int())[None]
    inputs[name][0, at, 0] = value
    y, state = run_op("ssd_scan", **inputs)
    expected, expected_state = scan_cases.by_reference(**inputs)

    def odd(t):
        return ~(t.float().abs() < 1e15)

    assert odd(y).flatten(2).any(-1).equal(odd(expected).flatten(2).any(-1))
    assert odd(state).equal(odd(expected_state))
    clean = ~odd(expected)
    torch.testing.assert_close(y[clean].float(), expected[clean].float(), rtol=0.05, atol=0.5)


def test_a_masked_visit_that_is_not_finite_is_not_seen():
    inputs = make((1, 150, 2, 1, 1, 2, 16, 16), "both", ("reverse_B", "reverse_C"))
    inputs["reverse_mask"] = (torch.arange(150) != 70)[None]
    for name in ("reverse_B", "reverse_C"):
        inputs[name][0, 70] = torch.nan
    y = run_op("ssd_scan", **inputs)
    assert y.isfinite().all()
    check(inputs)
