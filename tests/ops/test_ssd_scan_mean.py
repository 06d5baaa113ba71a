"""`ssd_scan` with `normalize`: means, their mass, and visits that have none. Values are judged in test_ssd_scan.py."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import linmu_ops
from linmu_ops import _registry
from tests.ops.cases.ssd_scan import ALL, DIRECTIONS, make_inputs, scan, used

CASE = (2, 70, 4, 2, 2, 4, 8, 12)
IMPLEMENTATIONS = ["cpu", "reference"]


@pytest.mark.parametrize("options", ["mean", "all-mean"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_mean_is_a_scan_of_x_divided_by_the_same_scan_of_ones(direction, options):
    i = make_inputs(CASE, torch.float64, direction, ALL[options])
    given = i | dict(normalize=False, return_final_state=True)
    ones = torch.ones(*i["x"].shape[:3], 1, dtype=torch.float64)
    state = i.get("initial_state")
    rows = [slice(0, -1), slice(-1, None)]
    starts = [{} if state is None else dict(initial_state=state[:, :, r].contiguous()) for r in rows]
    (sums, of_x), (mass, of_ones) = (
        scan(**given | dict(x=x) | start) for x, start in zip((i["x"], ones), starts, strict=True)
    )
    y, log_mass, final = scan(**i | dict(return_final_state=True))
    there = mass[..., 0] > 0
    assert there.any()
    torch.testing.assert_close(y, torch.where(there[..., None], sums / mass, 0.0))
    torch.testing.assert_close(log_mass, mass[..., 0].log())
    torch.testing.assert_close(final, torch.cat((of_x, of_ones), 2))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_where_nothing_was_written_the_mean_is_zero_and_no_gradient_is_nan(direction, dtype, impl):
    """Steps of exactly 0, as padding has; a mass too small to divide by; and a reverse scan that leaves visits out."""
    i = make_inputs(CASE, dtype, direction, ("normalize", "dt_softplus", "reverse_mask"))
    i["dt"][0, :40] = -1e4
    i["dt"][1] = -75.0  # its softplus is 2.7e-33, less than 2 ** -100
    names = used(i)
    leaves = {k: v.clone().requires_grad_() if k in names else v for k, v in i.items()}
    with linmu_ops.use_impl(f"ssd_scan:{impl}"):
        y, log_mass = scan(**leaves)
    empty = log_mass == -math.inf
    assert empty[1].all() and not empty[0].all()
    if direction == "forward":
        assert empty[0, :40].all() and not empty[0, 40:].any()
    if direction == "reverse":
        assert empty[~i["reverse_mask"]].all()
    assert (y[empty] == 0).all() and y.isfinite().all()
    for grad in torch.autograd.grad(y.sum() + log_mass[~empty].sum(), [leaves[k] for k in names], retain_graph=True):
        assert grad.isfinite().all() and (grad.dim() < 3 or not grad[1].any())
    # Not even where the caller's own gradient is none.
    bad = [torch.where(empty[..., None], math.nan, 1.0).to(dtype).expand_as(y), torch.where(empty, math.nan, 1.0)]
    for grad in torch.autograd.grad([y, log_mass], [leaves[k] for k in names], bad):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_mean_of_one_value_is_that_value(direction, dtype):
    i = make_inputs(CASE, dtype, direction, ("normalize", "D", "gate", "token_order"))
    i["x"] = torch.full_like(i["x"], 3.0)
    y, log_mass = scan(**i)
    assert log_mass.isfinite().all() and log_mass.dtype == torch.float32
    torch.testing.assert_close(
        y.float(), torch.full(y.shape, 3.0), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0
    )


def test_the_mass_of_16_bit_inputs_is_a_float32_sum():
    i = make_inputs((1, 70, 4, 2, 2, 4, 8, 12), torch.bfloat16, "both", ("all", "normalize"))
    with linmu_ops.use_impl("ssd_scan:reference"):
        want = scan(
            **{k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in i.items()}
        )
    torch.testing.assert_close(scan(**i)[1].double(), want[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_around_kernels_that_do_not_normalize_x_is_widened(direction, monkeypatch):
    """As on CUDA, by the same values, states and gradients."""
    i = make_inputs(CASE, torch.float32, direction, ("all", "normalize"))
    names = used(i)

    def results():
        leaves = {k: v.clone().requires_grad_() if k in names else v for k, v in i.items()}
        out = scan(**leaves)
        made = [o.masked_fill(o == -math.inf, 0.0) for o in out]
        return [*made, *torch.autograd.grad(sum(o.sum() for o in made), [leaves[k] for k in names])]

    want = results()
    monkeypatch.setattr(_registry, "serves", lambda op, x: "cuda")
    for got, expected in zip(results(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_means_are_differentiated_twice_forwards_and_mapped(direction):
    i = make_inputs((2, 4, 2, 1, 1, 2, 2, 3), torch.float64, direction, ("normalize", "D"))
    names = ["x", "dt", "B", "C", "D"]

    def f(*leaves):
        return scan(**i | dict(zip(names, leaves, strict=True)))

    leaves = [i[k].requires_grad_() for k in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linmu_ops.LinmuWarning)  # the reference does what kernels do not
        assert torch.autograd.gradgradcheck(f, leaves)
        y, pushed = torch.func.jvp(lambda x: f(x, *leaves[1:])[0], (i["x"].detach(),), (torch.ones_like(i["x"]),))
        torch.testing.assert_close(pushed, torch.ones_like(y))  # weights of a mean sum to one
        rows = torch.func.vmap(lambda x: f(x, *(t.detach() for t in leaves[1:]))[1])(torch.stack([i["x"].detach()] * 2))
    torch.testing.assert_close(rows[1], f(*leaves)[1])


def test_explain_says_how_cuda_normalizes():
    x = torch.empty(1, 1, 1, 8)
    for op in ("ssd_scan", "ssd_step"):
        rows = {r.impl: r.note for r in linmu_ops.explain(op, device="cuda", normalize=True)}
        assert rows["cuda"] == "normalize=True scans x with channels of ones: its kernels do not normalize"
        assert not any(rows[impl] for impl in rows if impl != "cuda")
        assert not any(r.note for r in linmu_ops.explain(op, device="cuda"))
    assert _registry.serves("ssd_scan", x) == "cpu"
