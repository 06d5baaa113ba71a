"""The backward of `window_attention` for sm_90a, run by the emulator, against the float64 reference."""

from __future__ import annotations

import ctypes

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference
from tests.ops.cases.window_attention import CASES, by_reference, make_inputs, with_lse

pytestmark = pytest.mark.usefixtures("by_emulator")
DIFFERENTIABLE = ("q", "k", "v", "bias")
KINDS = {
    "bias, seven heads of a group": dict(B=1, H=7, G=1, P=64, grid=(7, 14), window=(7, 7), shift=(3, 3), bias=True),
    "rotary, two rows": dict(
        B=2, H=2, G=1, P=128, grid=(4, 5, 6), window=(3, 4, 4), shift=(1, 2, 2), wrap="mask", rotary=128,
    ),
    "three tiles of keys": dict(B=1, H=2, G=1, P=40, grid=(150,), window=(150,), rotary=24, interleaved=True),
    "scale below 0": CASES["blocks-scale"] | dict(P=72),
    "longer than expected": dict(B=1, H=2, G=1, P=40, grid=(150,), window=(40,), image_window=(150,), rotary=40),
    "keys in parts": dict(B=1, H=2, G=1, P=128, grid=(330,), window=(300,), shift=(7,)),
    "causal": dict(B=1, H=2, G=1, P=64, grid=(200,), window=(100,), shift=(70,), bias=True, causal=True),
}  # fmt: skip
SMALL = dict(B=1, H=2, G=1, P=48, grid=(150,), window=(75,), rotary=16)


@pytest.fixture
def products(emulated, monkeypatch):
    """How many products of warpgroups the emulator has made; the kernels for sm_90a serve."""
    monkeypatch.setenv("LINMU_CUDA_ARCH", "90")
    emulated.probe_products.restype = ctypes.c_int64
    return emulated.probe_products


def gradients(inputs, return_lse=True):
    leaves = {k: inputs[k].detach().clone().requires_grad_() for k in DIFFERENTIABLE if k in inputs}
    results = linmu_ops.window_attention(**(inputs | leaves), return_lse=return_lse)
    results = results if return_lse else (results,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return torch.autograd.grad(results, list(leaves.values()), grads)


def runs_by_warpgroups(products, inputs):
    """Whether the gradient makes products of warpgroups of its own: it has five for two of the forward."""
    before = products()
    with torch.no_grad():
        linmu_ops.window_attention(**inputs)
    forward = products() - before
    gradients(inputs)
    return products() - before > 4 * forward


def check(inputs):
    wrt = [k for k in DIFFERENTIABLE if k in inputs]
    check_against_reference(with_lse(linmu_ops.window_attention), with_lse(by_reference), inputs, wrt)


@pytest.mark.parametrize("name", KINDS)
def test_gradients(name, products):
    check(make_inputs(KINDS[name], torch.bfloat16))


@pytest.mark.parametrize("name", ["small", *[pytest.param(n, marks=pytest.mark.sweep) for n in KINDS]])
def test_gradients_of_halves(name, products):
    check(make_inputs((KINDS | dict(small=SMALL))[name], torch.float16))


@pytest.mark.parametrize("P, extra, served", [(48, 8, True), (48, 3, True), (44, 0, False)])
def test_rows_that_are_no_whole_pieces(P, extra, served, products):
    """q, k and v may be so; the output's gradient may not."""
    inputs = make_inputs(SMALL | dict(P=P), torch.bfloat16)
    for name in "qkv":
        larger = torch.full((*inputs[name].shape[:-1], P + extra), torch.nan, dtype=torch.bfloat16)
        larger[..., extra:] = inputs[name]
        inputs[name] = larger[..., extra:]
    assert runs_by_warpgroups(products, inputs) is served
    check(inputs)


@pytest.mark.parametrize("shared, served", [(227 * 1024, True), (100_000, False)])
def test_a_small_chip_takes_the_other_kernels(shared, served, products, monkeypatch):
    monkeypatch.setenv("LINMU_EMULATED_SHARED", str(shared))
    inputs = make_inputs(SMALL | dict(P=128), torch.bfloat16)
    assert runs_by_warpgroups(products, inputs) is served
    check(inputs)


@pytest.mark.parametrize("seed", [1, 2, *[pytest.param(s, marks=pytest.mark.sweep) for s in range(3, 21)]])
@pytest.mark.parametrize("bias", [False, True])
def test_the_order_in_which_warpgroups_run_changes_no_bit(bias, seed, products, monkeypatch):
    inputs = make_inputs(SMALL | dict(grid=(140,), window=(140,), bias=bias), torch.bfloat16)
    expected = gradients(inputs)
    monkeypatch.setenv("LINMU_EMULATED_SEED", str(seed))
    got = gradients(inputs)
    assert all(a.isfinite().all() and a.equal(b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("return_lse", [False, True])
def test_twice_the_same_bits(return_lse, products):
    inputs = make_inputs(SMALL, torch.bfloat16)
    first, second = (gradients(inputs, return_lse) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
