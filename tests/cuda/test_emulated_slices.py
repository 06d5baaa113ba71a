"""The forward scan by slices, the kernel of sm_90a that keeps its states in registers, run by the emulator."""

from __future__ import annotations

import ctypes

import pytest
import torch

from linmu_ops._testing import check_implementation, run_op
from tests.ops.cases import ssd_scan as scan_cases

pytestmark = pytest.mark.usefixtures("by_emulator")
PLAIN, ALL = (), ("D", "dt_softplus", "dt_bias", "seq_idx", "initial_state", "return_final_state")
# B, L, H, Gx, Gb, Gc, P, N
CASES = [
    ((1, 64, 2, 1, 1, 2, 128, 128), PLAIN),  # one whole chunk, the slices of a head
    ((2, 65, 4, 4, 1, 1, 64, 128), PLAIN),  # two heads of one B and C
    ((1, 127, 3, 1, 1, 3, 64, 64), ALL),  # a head without another, each with its C
    ((1, 300, 2, 1, 1, 2, 72, 72), ALL),  # tiles that are filled up with zeros
    ((2, 33, 4, 2, 2, 4, 8, 16), ("D", "seq_idx")),
    ((1, 150, 2, 2, 2, 2, 128, 40), ("initial_state",)),
    ((1, 200, 6, 3, 2, 6, 40, 128), ("return_final_state",)),
]


@pytest.fixture(autouse=True)
def sliced(emulated, monkeypatch):
    """Each test of this file runs the kernel."""
    monkeypatch.setenv("LINMU_CUDA_ARCH", "90")
    emulated.probe_stored_matrices.restype = ctypes.c_int64
    before = emulated.probe_stored_matrices()
    yield
    assert emulated.probe_stored_matrices() > before


def check(inputs):
    check_implementation("ssd_scan", "cpu", inputs)


@pytest.mark.parametrize(("case", "options"), CASES, ids=str)
def test_scan(case, options):
    check(scan_cases.make_inputs(case, torch.bfloat16, "forward", options))


@pytest.mark.parametrize("option", ALL)
def test_one_option(option):
    check(scan_cases.make_inputs((1, 130, 2, 1, 1, 2, 64, 64), torch.bfloat16, "forward", (option,)))


@pytest.mark.parametrize("decay", [1e-6, 1.0, 50.0])
def test_decays_of_all_sizes(decay):
    inputs = scan_cases.make_inputs((1, 140, 2, 1, 1, 2, 64, 64), torch.bfloat16, "forward", ("D",))
    check(inputs | dict(A=torch.full((2,), -decay), dt=torch.rand(1, 140, 2) * 0.5 + 0.5))


def test_steps_that_grow():
    inputs = scan_cases.make_inputs((1, 100, 2, 1, 1, 2, 64, 64), torch.bfloat16, "forward")
    inputs["dt"][:, ::3] *= -0.2
    check(inputs)


@pytest.mark.parametrize("every", [64, 20])
def test_restarts_at_and_within_the_edges_of_chunks(every):
    index = (torch.arange(200) // every).int().expand(1, 200)
    check(scan_cases.make_inputs((1, 200, 2, 1, 1, 2, 64, 64), torch.bfloat16, "forward") | dict(seq_idx=index))


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
def test_scan_in_spans(options):
    """Enough chunks for two spans."""
    check(scan_cases.make_inputs((1, 1100, 2, 1, 1, 2, 8, 8), torch.bfloat16, "forward", options))


def test_twice_the_same_bits():
    inputs = scan_cases.make_inputs((1, 130, 2, 1, 1, 2, 64, 64), torch.bfloat16, "forward", ALL)
    first, second = (run_op("ssd_scan", **inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("name", ["x", "B", "C", "dt"])
def test_what_is_not_finite_reaches_what_sees_it(name, value):
    """With a restart after it: nothing comes through."""
    L, at = 150, 70
    inputs = scan_cases.make_inputs((1, L, 2, 1, 1, 2, 64, 64), torch.bfloat16, "forward", ("return_final_state",))
    inputs["seq_idx"] = (torch.arange(L) >= 90).int()[None]
    inputs[name][0, at, 0] = value
    y, state = run_op("ssd_scan", **inputs)
    expected, expected_state = scan_cases.by_reference(**inputs)

    def odd(t):
        return ~(t.float().abs() < 1e15)

    assert odd(y).flatten(2).any(-1).equal(odd(expected).flatten(2).any(-1))
    assert odd(state).equal(odd(expected_state))
    clean = ~odd(expected)
    torch.testing.assert_close(y[clean].float(), expected[clean].float(), rtol=0.05, atol=0.5)
