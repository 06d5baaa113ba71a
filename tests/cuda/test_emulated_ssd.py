"""The CUDA kernels of `ssd_step` and `ssd_scan`, run by the emulator, against the float64 reference."""

from __future__ import annotations

import ctypes

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_implementation, run_op
from tests.covering import covering
from tests.ops.cases import ssd_scan as scan_cases
from tests.ops.cases import ssd_step as step_cases

pytestmark = pytest.mark.usefixtures("by_emulator")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARED = ("dt_softplus", "reverse_dt", "reverse_A", "gate", "reverse_mask", "reverse_seq_idx", "token_order", "D")
OPTIONS = dict(shared=SHARED, all=("all",), B=("seq_idx", "head_gate", "reverse_B"))


def check(op, inputs, wrt=()):
    check_implementation(op, "cpu", inputs, wrt)


def check_scan(inputs):
    check("ssd_scan", inputs, scan_cases.used(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", step_cases.CASES[:4], ids=str)
def test_step(case, dtype):
    check("ssd_step", step_cases.make_inputs(case, dtype, softplus=True, skip=True))


SIZES = [(1, 70, 2, 1, 1, 2, 20, 40), (2, 33, 4, 2, 2, 4, 5, 7)]


@covering("case, dtype, direction, options", SIZES, DTYPES, scan_cases.DIRECTIONS, [(), ("all",)])
def test_scan(case, dtype, direction, options):
    check_scan(scan_cases.make_inputs(case, dtype, direction, options) | dict(chunk_size=32))


@pytest.mark.parametrize("chunk_size", [1, 64, 128, None])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scan_as_the_model_calls_it(dtype, chunk_size):
    """Shared B and C, rows of whole 16 bytes, more than one chunk and more than one tile of every size."""
    inputs = scan_cases.make_inputs((1, 150, 2, 1, 1, 2, 72, 48), dtype, "both", SHARED)
    check_scan(inputs | dict(chunk_size=chunk_size))


SM90_SIZES = [(1, 150, 2, 1, 1, 2, 72, 48), (2, 61, 2, 2, 1, 1, 5, 7)]


@covering("case, dtype, direction, options", SM90_SIZES, DTYPES[1:], scan_cases.DIRECTIONS, list(OPTIONS))
def test_scan_of_sm90(case, dtype, direction, options, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", "90")
    check("ssd_scan", scan_cases.make_inputs(case, dtype, direction, OPTIONS[options]))


@pytest.mark.parametrize(
    ("case", "direction", "options"),
    [
        ((2, 140, 4, 2, 1, 4, 128, 64), "both", ()),
        ((2, 100, 4, 2, 2, 4, 64, 64), "both", ("reverse_B", "reverse_C", "head_gate", "D")),
        ((1, 300, 6, 6, 1, 1, 64, 128), "reverse", ("seq_idx",)),
        ((2, 100, 3, 1, 3, 1, 40, 24), "reverse", ("reverse_B", "seq_idx", "D")),
    ],
    ids=["grouped", "own B and C", "a head's own x", "rows shorter than a box"],
)
def test_tma_loads_what_threads_gather(case, direction, options, monkeypatch):
    """Tokens in place come by TMA, through the same kernel as tokens in an order: the same bits."""
    monkeypatch.setenv("LINMU_CUDA_ARCH", "90")
    inputs = scan_cases.make_inputs(case, torch.bfloat16, direction, options)
    B, L = case[:2]
    in_order = run_op("ssd_scan", **inputs, token_order=torch.arange(L).int().expand(B, L).contiguous())
    in_place = run_op("ssd_scan", **inputs)
    assert in_place.isfinite().all() and in_place.equal(in_order)
    check("ssd_scan", inputs)


@pytest.mark.parametrize("option", ["reverse_B", "reverse_C", "head_gate", "initial_state", "seq_idx"])
@pytest.mark.parametrize("direction", ["reverse", "both"])
def test_scan_with_one_option(direction, option):
    if option == "head_gate" and direction == "reverse":
        pytest.skip("the gate is of both directions")
    check_scan(scan_cases.make_inputs(scan_cases.SMALL, torch.float32, direction, (option,)))


@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
def test_scan_in_spans(direction):
    """Enough chunks per head that the states are walked in spans."""
    options = ("initial_state", "return_final_state", "seq_idx")
    check_scan(
        scan_cases.make_inputs((1, 530, 1, 1, 1, 1, 3, 4), torch.float32, direction, options) | dict(chunk_size=32)
    )


@pytest.mark.parametrize("options", [("all",), ("reverse_B", "initial_state")], ids=["all", "own B"])
@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
def test_the_gradient_comes_in_ranges_where_memory_is_short(direction, options, monkeypatch):
    monkeypatch.setenv("LINMU_EMULATED_WORKSPACE", "100000")
    inputs = scan_cases.make_inputs((2, 150, 2, 1, 1, 2, 5, 7), torch.float32, direction, options)
    check_scan(inputs | dict(chunk_size=32))


@pytest.mark.parametrize(
    ("dtype", "sizes", "chunk_size", "why"),
    [
        (torch.bfloat16, (33, 8, 128), None, None),
        (torch.bfloat16, (40, 200, 8), 64, None),
        (torch.float16, (40, 8, 8), None, "x is float16, not bfloat16"),
        (torch.bfloat16, (32, 8, 8), None, "L=32 is not above 32"),
        (torch.bfloat16, (40, 8, 136), None, "N=136 is not a multiple of 8 up to 128"),
        (torch.bfloat16, (40, 8, 12), None, "N=12 is not a multiple of 8 up to 128"),
        (torch.bfloat16, (40, 20, 8), None, "P=20 is not a multiple of 8"),
        (torch.bfloat16, (40, 8, 8), 32, "chunk_size=32 is not 64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
def test_explain_says_what_slices_do_not_scan(direction, dtype, sizes, chunk_size, why, emulated, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", "90")
    L, P, N = sizes
    inputs = scan_cases.make_inputs((1, L, 2, 1, 1, 2, P, N), dtype, direction, ("token_order",))
    inputs["chunk_size"] = chunk_size
    emulated.probe_stored_matrices.restype = ctypes.c_int64
    before = emulated.probe_stored_matrices()
    run_op("ssd_scan", **inputs)
    assert (emulated.probe_stored_matrices() > before) == (why is None)
    (note,) = (c.note for c in linmu_ops.explain("ssd_scan", device="cuda", **inputs) if c.impl == "cuda")
    prefix = "on sm_90a the general kernels scan, not those by slices, which are faster: "
    assert note == (None if why is None else prefix + why)


@pytest.mark.parametrize("layout", ["expanded", "odd strides", "odd offset"])
def test_tma_serves_however_rows_lie(layout, emulated, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", "90")
    inputs = scan_cases.make_inputs((2, 100, 2, 1, 1, 1, 64, 64), torch.bfloat16, "both", ())
    given = dict(inputs)
    for name in ("x", "B", "C"):
        t = inputs[name]
        if layout == "expanded":
            inputs[name] = t[:1].expand(t.shape).contiguous()
            given[name] = t[:1].expand(t.shape)
        elif layout == "odd strides":  # of the one group
            given[name] = torch.as_strided(t, t.shape, (t.stride(0), t.stride(1), 3, 1))
        else:
            given[name] = torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    emulated.probe_boxes.restype = ctypes.c_int64
    before = emulated.probe_boxes()
    y = run_op("ssd_scan", **given)
    middle = emulated.probe_boxes()
    assert y.equal(run_op("ssd_scan", **inputs))
    assert middle > before and emulated.probe_boxes() - middle == middle - before


@pytest.mark.parametrize("case", [(2, 0, 2, 1, 2, 2, 3, 4), (0, 5, 2, 1, 2, 2, 3, 4)], ids=["L0", "B0"])
def test_empty_scan(case):
    scan_cases.check_without_tokens(case, "both")


def test_strided_scan():
    scan_cases.check_strided_inputs("both")


@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
def test_scan_is_deterministic(direction):
    inputs = scan_cases.make_inputs(scan_cases.SMALL, torch.bfloat16, direction, ("all",))
    first, second = (run_op("ssd_scan", **inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("direction", scan_cases.DIRECTIONS)
def test_a_token_order_out_of_range_touches_nothing_outside(direction):
    """On a GPU its values are not looked at; they are clamped, and the emulator would see an access elsewhere crash."""
    inputs = scan_cases.make_inputs(scan_cases.SMALL, torch.float32, direction, ("all",))
    inputs["token_order"] = torch.randint(-(2**31), 2**31 - 1, inputs["token_order"].shape).int()
    leaf = inputs["x"].requires_grad_()
    y, state = run_op("ssd_scan", **inputs)
    y.nan_to_num().sum().backward()
    assert y.shape == (*inputs["dt"].shape, leaf.shape[3]) and state.isfinite().all()


def test_float64_is_refused():
    inputs = scan_cases.make_inputs(scan_cases.SMALL, torch.float64)
    with pytest.raises(ValueError, match="ssd_scan: the CUDA kernels take no float64"):
        run_op("ssd_scan", **inputs)
