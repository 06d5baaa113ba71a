"""The CUDA kernels of `window_attention`, run by the emulator, against the float64 reference: forward and gradients."""

from __future__ import annotations

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference
from tests.covering import covering
from tests.ops.cases.window_attention import CASES, LSE_CASES, by_reference, make_inputs, with_lse

pytestmark = pytest.mark.usefixtures("by_emulator")
SLOW = {"several-key-blocks", "causal-key-blocks", "3d-shift", "blocks-scale"}  # of their kind, others are smaller
# Its second window starts with 65 tokens of the sequence's end: whole steps of keys that the queries after them,
# tokens 0 to 99, do not see.
LATE_KEYS_FIRST = dict(B=1, H=2, G=1, grid=(330,), window=(165,), shift=(100,), bias=True, causal=True)
WITH_LSE = {n: LSE_CASES[n] for n in (
    "one-token", "1d-shift-bias", "3d-gqa", "2d-interleaved", "causal", "causal-joined-bias", "blocks-causal",
)}  # fmt: skip
WITH_LSE["late-keys-first"] = LATE_KEYS_FIRST | dict(P=8)


def check(case, dtype, change=None, results=lambda attend: attend):
    inputs = make_inputs(case, dtype)
    if change:
        inputs |= {k: change(inputs[k]) for k in "qkv"}
    wrt = [k for k in ("q", "k", "v", "bias") if k in inputs]
    check_against_reference(results(linmu_ops.window_attention), results(by_reference), inputs, wrt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n not in SLOW])
def test_forward_and_backward(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_LSE)
def test_log_sum_exp(name, dtype):
    check(WITH_LSE[name], dtype, results=with_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_causal_keys_that_come_in_parts(dtype, monkeypatch):
    monkeypatch.setenv("LINMU_EMULATED_SHARED", "48000")
    check(LATE_KEYS_FIRST | dict(P=32), dtype, results=with_lse)


@pytest.mark.parametrize("P", [64, 128, 256])
def test_causal_of_larger_heads(P):
    check(dict(B=1, H=2, G=1, P=P, grid=(70,), window=(35,), shift=(9,), causal=True), torch.bfloat16, None, with_lse)


@pytest.mark.parametrize("P", [32, 64, 96, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_head_sizes(P, dtype):
    rotary = dict(rotary=P if P != 200 else 48, interleaved=P == 96)
    check(dict(B=1, H=2, G=1, P=P, grid=(4, 9), window=(4, 5), shift=(1, 2), bias=P == 64) | rotary, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("P, shared", [(32, 48_000), (128, 99 * 1024)])  # bytes a block may have
def test_keys_come_in_parts_where_shared_memory_is_small(P, shared, dtype, monkeypatch):
    monkeypatch.setenv("LINMU_EMULATED_SHARED", str(shared))
    check(dict(B=1, H=4, G=2, P=P, grid=(330,), window=(300,), shift=(7,), bias=True, rotary=P), dtype)


@covering(
    "case, dtype, shared",
    [
        dict(B=1, H=7, G=1, P=64, grid=(7, 14), window=(7, 7), shift=(3, 3), bias=True),
        dict(B=2, H=4, G=2, P=128, grid=(4, 5, 6), window=(3, 4, 4), shift=(1, 2, 2), wrap="mask", rotary=128),
        dict(B=1, H=2, G=1, P=36, grid=(150,), window=(150,), bias=True, rotary=24, interleaved=True),
        CASES["blocks-scale"] | dict(P=72),
        dict(B=1, H=2, G=1, P=40, grid=(150,), window=(40,), image_window=(150,), rotary=40),  # longer than expected
        LATE_KEYS_FIRST | dict(P=64),
    ],
    [torch.bfloat16, torch.float16],
    [227 * 1024, 60_000],
    ids=[lambda c: f"P{c['P']}" + "-causal" * ("causal" in c), str, str],
)
def test_forward_of_sm90(case, dtype, shared, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", "90")
    monkeypatch.setenv("LINMU_EMULATED_SHARED", str(shared))
    inputs = make_inputs(case, dtype)
    check_against_reference(with_lse(linmu_ops.window_attention), with_lse(by_reference), inputs)


def test_windows_longer_than_the_host_expects():
    check(CASES["blocks-image-window"] | dict(window=(1, 1, 2), image_window=(1, 5, 4)), torch.bfloat16)


def test_a_table_of_biases_too_large_for_shared_memory():
    check(dict(B=1, H=2, G=1, P=8, grid=(3, 4), window=(60, 60), bias=True), torch.bfloat16)


@pytest.mark.parametrize("P, extra", [(16, 8), (16, 3), (12, 0)])  # rows of 16 bytes' multiples, and not
def test_strided_and_unaligned_rows(P, extra):
    def inside_a_larger(t):
        larger = torch.full((*t.shape[:-1], t.shape[-1] + extra), torch.nan, dtype=t.dtype)
        larger[..., extra:] = t
        return larger[..., extra:]

    case = dict(B=2, H=2, G=1, P=P, grid=(5, 6), window=(3, 4), shift=(1, 1), rotary=8)
    check(case, torch.bfloat16, inside_a_larger)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("arch, dtype, P", [("80", torch.float32, 16), ("90", torch.bfloat16, 64)])
def test_a_corrupt_table_stays_inside(arch, dtype, P, causal, monkeypatch):
    monkeypatch.setenv("LINMU_CUDA_ARCH", arch)
    q = torch.randn(1, 8, 1, P).to(dtype)
    tokens = torch.tensor([0, 99, -7, 3] + [-1] * 36, dtype=torch.int32)
    offsets = torch.tensor([0, 3, 77], dtype=torch.int32)
    coords = torch.tensor([0, 2**31 - 1, -(2**31), 5] + [0] * 36, dtype=torch.int32)
    bias = torch.zeros(1, 1, 1, 79)
    args = (tokens, offsets, coords, [1, 1, 40], 1.0, bias, None, None, False, causal)
    out, lse = torch.ops.linmu_emulated.window_attention(q, q, q, *args)
    torch.testing.assert_close(out[:, [0, 3]], q[:, [0, 3]])  # each alone with itself
    assert not out[:, [1, 2, 4, 5, 6, 7]].any()
    grad_lse = torch.full_like(lse, torch.nan)  # of no token
    grad_lse[[0, 3]] = 1.0
    grads = torch.ops.linmu_emulated.window_attention_bwd(torch.randn_like(q), grad_lse, q, q, q, out, lse, *args)
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[:, [1, 2, 4, 5, 6, 7]].any() for g in grads[:3])


def by_table(arch, dtype, P, monkeypatch, tokens, bias):
    """Output, log-sum-exp and gradients of one window over a table, straight from the op."""
    monkeypatch.setenv("LINMU_CUDA_ARCH", arch)
    q = torch.randn(1, 40, 1, P).to(dtype)
    table = torch.tensor(tokens, dtype=torch.int32)
    offsets, coords = torch.tensor([0, len(tokens)]).int(), torch.arange(len(tokens)).int()
    args = (table, offsets, coords, [1, 1, 40], 1.0, bias, None, None, False, False)
    out, lse = torch.ops.linmu_emulated.window_attention(q, q, q, *args)
    grads = torch.ops.linmu_emulated.window_attention_bwd(torch.randn_like(q), None, q, q, q, out, lse, *args)
    return [out, *grads[:3]], lse


KINDS = [("80", torch.float32, 16), ("90", torch.bfloat16, 64)]


@pytest.mark.parametrize("arch, dtype, P", KINDS)
def test_a_token_that_a_full_table_leaves_out_is_0(arch, dtype, P, monkeypatch):
    tokens = [*range(38), 5, -1]  # as many entries as tokens; 38 and 39 are not among them
    tensors, _ = by_table(arch, dtype, P, monkeypatch, tokens, torch.zeros(1, 1, 1, 79))
    assert not any(t[:, 38:].any() for t in tensors)


@pytest.mark.parametrize("arch, dtype, P", KINDS)
def test_a_query_that_no_key_answers_is_0(arch, dtype, P, monkeypatch):
    bias = torch.full((1, 1, 1, 79), -torch.inf)
    tensors, lse = by_table(arch, dtype, P, monkeypatch, [*range(40)], bias)
    assert not any(t.any() for t in tensors) and (lse == -torch.inf).all()


def test_keys_in_one_place_all_count_in_the_gradient_of_the_bias():
    q, k, v = torch.randn(3, 1, 40, 1, 16).unbind(0)
    tokens, offsets = torch.arange(40).int(), torch.tensor([0, 40]).int()
    coords = torch.arange(40).int() // 3 * 2  # three keys in each
    bias = torch.randn(1, 1, 1, 79)
    args = (tokens, offsets, coords, [1, 1, 40], 0.25, bias, None, None, False, False)
    out, lse = torch.ops.linmu_emulated.window_attention(q, k, v, *args)
    grad = torch.randn_like(q)
    got = torch.ops.linmu_emulated.window_attention_bwd(grad, None, q, k, v, out, lse, *args)[3]
    wanted = torch.ops.linmu_reference.window_attention_bwd(grad, None, q, k, v, out, lse, *args)[3]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_same_bits_every_time():
    inputs = make_inputs(CASES["3d-shift"], torch.bfloat16)
    leaves = [inputs[k].requires_grad_() for k in ("q", "k", "v", "bias")]
    runs = []
    for _ in range(2):
        out = linmu_ops.window_attention(**inputs)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


def test_larger_heads_are_refused():
    q = torch.randn(1, 4, 1, 264)
    with pytest.raises(ValueError, match="at most P=256, got P=264"):
        linmu_ops.window_attention(q, q, q, grid=(4,), window=(2,))


@pytest.mark.parametrize("B, L", [(0, 6), (2, 6)])
def test_empty(B, L):
    q = torch.randn(B, L, 2, 8)
    layout = linmu_ops.TokenLayout([], [], B, L)
    out = linmu_ops.window_attention(q.requires_grad_(), q, q, layout=layout, window=(2, 2))
    assert out.shape == q.shape and not out.any()
    assert not torch.autograd.grad(out.sum(), q)[0].any()
