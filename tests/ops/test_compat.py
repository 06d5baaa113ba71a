"""The functions of mamba_ssm and causal-conv1d, against their equations written out token by token in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from linmu_ops import LinmuWarning, _registry
from linmu_ops.compat import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_chunk_scan_combined,
    selective_state_update,
)

FLOAT64 = dict(rtol=1e-9, atol=1e-10)


def noise(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scan_inputs(dtype=torch.float64, length=11, rows=2):
    heads, size, groups, state = 4, 3, 2, 5
    return dict(
        x=noise(rows, length, heads, size, dtype=dtype), dt=noise(rows, length, heads, dtype=dtype, seed=1),
        A=-noise(heads, seed=2).exp().to(dtype), B=noise(rows, length, groups, state, dtype=dtype, seed=3),
        C=noise(rows, length, groups, state, dtype=dtype, seed=4),
    )  # fmt: skip


def plain_step(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, limit=(0.0, float("inf"))):
    """One token of state (B, H, P, N): every tensor with all its axes; dt (B, H, P), A (H, P, N)."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*limit) if limit else dt
    B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    state = state * (dt[..., None] * A).exp() + (dt * x)[..., None] * B[:, :, None]
    y = (state * C[:, :, None]).sum(-1)
    y = y if D is None else y + D * x
    return state, y if z is None else y * F.silu(z)


def plain_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, softplus=False,
               limit=(0.0, float("inf"))):  # fmt: skip
    rows, length, heads, size = x.shape
    state = x.new_zeros(rows, heads, size, B.shape[3]) if initial_states is None else initial_states
    D = D[:, None] if D is not None and D.dim() == 1 else D
    bias = None if dt_bias is None else dt_bias[:, None]
    ys, states = [], []
    for t in range(length):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).to(state)[:, None, None, None]
        state, y = plain_step(
            state, x[:, t], dt[:, t, :, None], A[:, None, None], B[:, t], C[:, t], D, None if z is None else z[:, t],
            bias, softplus, limit,
        )  # fmt: skip
        ys.append(y)
        states.append(state)
    return torch.stack(ys, 1), states


def extras(x, names, dtype=torch.float64):
    rows, length, heads, size = x.shape
    every = dict(
        D=noise(heads, seed=5), by_channel=noise(heads, size, seed=6), z=noise(*x.shape, seed=7),
        dt_bias=noise(heads, seed=8), initial_states=noise(rows, heads, size, 5, seed=9),
        seq_idx=(torch.arange(length) > 4).expand(rows, length),
    )  # fmt: skip
    return {("D" if n == "by_channel" else n): every[n].to(torch.int64 if n == "seq_idx" else dtype) for n in names}


@pytest.mark.parametrize(
    ("names", "softplus", "limit"),
    [
        ((), True, None), (("D", "z"), True, (0.0, float("inf"))), (("by_channel", "dt_bias"), True, (0.2, 0.7)),
        (("by_channel", "z", "initial_states"), False, (0.1, 1.0)), (("dt_bias", "seq_idx"), True, None),
    ],
)  # fmt: skip
def test_scan_and_its_gradients(names, softplus, limit):
    inputs = scan_inputs()
    inputs |= extras(inputs["x"], names)
    inputs = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
    how = {} if limit is None else {"dt_limit": limit}
    y, state = mamba_chunk_scan_combined(
        **inputs, chunk_size=4, dt_softplus=softplus, return_final_states=True, **how
    )  # fmt: skip
    want, states = plain_scan(**inputs, softplus=softplus, limit=limit or (0.0, float("inf")))
    torch.testing.assert_close(y, want, **FLOAT64)
    torch.testing.assert_close(state, states[-1], **FLOAT64)
    wrt = [t for t in inputs.values() if t.requires_grad]
    cotangents = [noise(*y.shape, seed=10), noise(*state.shape, seed=11)]
    got, right = (torch.autograd.grad(out, wrt, cotangents) for out in ((y, state), (want, states[-1])))
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)
    alone = mamba_chunk_scan_combined(**inputs, chunk_size=64, dt_softplus=softplus, **how)
    torch.testing.assert_close(alone, want, **FLOAT64)


def test_states_after_each_sequence_of_a_row():
    inputs = scan_inputs(rows=1)
    bounds = torch.tensor([0, 3, 3, 7, 11], dtype=torch.int32)
    seq_idx = torch.tensor([[0] * 3 + [1] * 4 + [2] * 4], dtype=torch.int32)
    ways = dict(chunk_size=4, dt_softplus=True, seq_idx=seq_idx)
    y, state, ends = mamba_chunk_scan_combined(
        **inputs, **ways, cu_seqlens=bounds, return_final_states=True, return_varlen_states=True
    )
    want, states = plain_scan(**inputs, seq_idx=seq_idx, softplus=True)
    torch.testing.assert_close(y, want, **FLOAT64)
    torch.testing.assert_close(state, states[-1], **FLOAT64)
    empty = torch.zeros_like(states[0])
    torch.testing.assert_close(ends, torch.cat([states[2], empty, states[6], states[10]]), **FLOAT64)
    y, ends = mamba_chunk_scan_combined(**inputs, **ways, cu_seqlens=bounds, return_varlen_states=True)
    assert ends.shape[0] == 4
    # Sequences at the end without a token are before none.
    last, ends = mamba_chunk_scan_combined(
        **inputs, **ways, cu_seqlens=torch.tensor([0, 3, 7, 11, 11]), return_final_states=True,
        return_varlen_states=True,
    )[1:]  # fmt: skip
    torch.testing.assert_close(last, states[-1], **FLOAT64)
    torch.testing.assert_close(ends, torch.cat([states[2], states[6], states[10], empty]), **FLOAT64)
    for changes, words in (
        (dict(seq_idx=None), r"seq_idx must change where cu_seqlens does, at \[3, 7\], got none"),
        (dict(seq_idx=seq_idx.roll(1, 1)), r"seq_idx must change where cu_seqlens does, at \[3, 7\], got \[1, 4, 8\]"),
        (dict(cu_seqlens=bounds[:-1]), r"cu_seqlens must rise from 0 to L=11, got \[0, 3, 3, 7\]"),
        (dict(cu_seqlens=None), "cu_seqlens must be given with return_varlen_states, and not without, got none"),
        (dict(initial_states=noise(1, 4, 3, 5)), "initial_states must be None with cu_seqlens, got a state"),
    ):
        with pytest.raises(ValueError, match=f"^mamba_chunk_scan_combined: {words}"):
            mamba_chunk_scan_combined(
                **inputs, **{**ways, "cu_seqlens": bounds, "return_varlen_states": True} | changes
            )


def test_sequences_whose_numbers_differ_beyond_32_bits():
    inputs, parts = scan_inputs(), (torch.arange(11) > 4).expand(2, 11)
    far_apart, near = 2**32 * parts.long() + 7, parts.int()
    ys = [mamba_chunk_scan_combined(**inputs, chunk_size=4, seq_idx=s) for s in (far_apart, near)]
    assert torch.equal(*ys)
    x, weight = noise(2, 5, 11), noise(5, 4, seed=1)
    assert torch.equal(*(causal_conv1d_fn(x, weight, seq_idx=s) for s in (far_apart, near)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    inputs = scan_inputs(dtype)
    inputs |= extras(inputs["x"], ("by_channel", "z"), dtype)
    y, state = mamba_chunk_scan_combined(**inputs, chunk_size=64, dt_softplus=True, return_final_states=True)
    want, states = plain_scan(**{n: t.double() for n, t in inputs.items()}, softplus=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(state.double(), states[-1], rtol=1e-5, atol=1e-5)


def step_inputs(kind, heads=True, dtype=torch.float64):
    """kind: how A and dt differ within a head. "head": not; "channel": along channels; "all": along the state too."""
    rows, count, size, groups, state = 3, 4 if heads else 1, 3, 2 if heads else 1, 5
    x, z = noise(rows, count, size, dtype=dtype), noise(rows, count, size, dtype=dtype, seed=1)
    wide = lambda t, *shape: t.to(dtype).expand(*shape)  # noqa: E731
    shape = {"head": (1,), "channel": (size,), "all": (size,)}[kind]
    A = -noise(count, *shape, state if kind == "all" else 1, seed=2).exp()
    out = dict(
        x=x, z=z, dt=wide(noise(rows, count, *shape, seed=3), rows, count, size), A=wide(A, count, size, state),
        B=noise(rows, groups, state, dtype=dtype, seed=4), C=noise(rows, groups, state, dtype=dtype, seed=5),
        D=wide(noise(count, *shape, seed=6), count, size), dt_bias=wide(noise(count, *shape, seed=7), count, size),
    )  # fmt: skip
    return out, noise(rows, count, size, state, dtype=torch.float64, seed=8).to(dtype)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("kind", ["head", "channel", "all"])
@pytest.mark.parametrize("left_out", [(), ("z",), ("D", "dt_bias")])
def test_step(kind, heads, left_out):
    inputs, state = step_inputs(kind, heads)
    inputs = {n: t for n, t in inputs.items() if n not in left_out}
    want, y = plain_step(state, **inputs, dt_softplus=True)
    if not heads:
        state, y = state[:, 0], y[:, 0]
        inputs = {n: t[0] if n in ("A", "D", "dt_bias") else t[:, 0] for n, t in inputs.items()}
        want = want[:, 0]
    got = selective_state_update(state, **inputs, dt_softplus=True)
    torch.testing.assert_close(got, y, **FLOAT64)
    torch.testing.assert_close(state, want, **FLOAT64)


@pytest.mark.parametrize("kind", ["head", "channel", "all"])
def test_step_in_rows_of_a_larger_state_and_in_bfloat16(kind):
    for dtype, error in ((torch.float64, FLOAT64), (torch.bfloat16, dict(rtol=0.02, atol=0.02))):
        inputs, state = step_inputs(kind, dtype=dtype)
        pool, slots = noise(7, *state.shape[1:], seed=9).to(dtype), torch.tensor([5, -1, 2], dtype=torch.int32)
        pool = pool.transpose(1, 2).contiguous().transpose(1, 2)  # with other strides
        before = pool.clone()
        got = selective_state_update(pool, **inputs, dt_softplus=True, state_batch_indices=slots)
        wide = {n: t.double() for n, t in inputs.items()}
        want, y = plain_step(before[[5, 0, 2]].double(), **wide, dt_softplus=True)
        y[1] = 0
        torch.testing.assert_close(got.double(), y, **error)
        torch.testing.assert_close(pool[[5, 2]].double(), want[[0, 2]], **error)
        others = [0, 1, 3, 4, 6]
        assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("kind", ["head", "channel", "all"])
def test_a_step_of_no_row_changes_nothing(kind):
    inputs, state = step_inputs(kind)
    before, slots = state.clone(), torch.full(inputs["x"].shape[:1], -1)
    assert not selective_state_update(state, **inputs, state_batch_indices=slots).any()
    assert torch.equal(state, before)


@pytest.mark.parametrize("kind", ["head", "channel", "all"])
def test_a_step_of_a_half_precision_state_that_is_a_negative_view(kind):
    inputs, state = step_inputs(kind)
    inputs, state = {n: t.float() for n, t in inputs.items()}, state.half()
    plain, negative = state.clone(), torch._neg_view(-state)
    ys = [selective_state_update(s, **inputs, dt_softplus=True) for s in (plain, negative)]
    assert torch.equal(*ys) and torch.equal(plain, negative)


def test_the_plain_step_warns_once():
    _registry._warned.discard("selective_state_update")
    inputs, state = step_inputs("all")
    with pytest.warns(LinmuWarning, match="selective_state_update: A differs along the state"):
        selective_state_update(state, **inputs)


def plain_convolution(x, weight, bias=None, activation=None, before=None, seq_idx=None):
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if before is None else before
    whole = torch.cat([before, x], -1)
    index = None if seq_idx is None else F.pad(seq_idx, (width - 1, 0), value=-9)
    ys = []
    for t in range(x.shape[2]):
        taps = whole[:, :, t : t + width]
        if index is not None:
            taps = taps * (index[:, t : t + width] == seq_idx[:, t : t + 1])[:, None]
        y = (taps * weight).sum(-1) + (0 if bias is None else bias)
        y = y if activation is None else F.silu(y)
        ys.append(y if seq_idx is None else y * (seq_idx[:, t : t + 1] >= 0))
    return torch.stack(ys, -1), whole[:, :, whole.shape[2] - width + 1 :]


@pytest.mark.parametrize("case", ["plain", "silu", "swish", "state", "segments", "short"])
def test_convolution_and_its_gradients(case):
    length = 2 if case == "short" else 9
    x, weight, bias = noise(2, 3, length), noise(3, 4, seed=1), noise(3, seed=2)
    how = {"silu": dict(activation="silu"), "swish": dict(activation="swish")}.get(case, {})
    before = noise(2, 3, 3, seed=3) if case == "state" else None
    segments = torch.tensor([[0, 0, 1, 1, 1, -1, 2, 2, -1], [0] * 9]) if case == "segments" else None
    wrt = [t.requires_grad_() for t in (x, weight, bias, before) if t is not None]
    y = causal_conv1d_fn(x, weight, bias, segments, before, **how)
    want, last = plain_convolution(x, weight, bias, how.get("activation"), before, segments)
    torch.testing.assert_close(y, want, **FLOAT64)
    seed = noise(*y.shape, seed=4)
    for a, b in zip(torch.autograd.grad(y, wrt, seed), torch.autograd.grad(want, wrt, seed), strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)
    if segments is None:
        out = torch.empty(2, 3, 3, dtype=x.dtype)
        with torch.no_grad():
            y, state = causal_conv1d_fn(x, weight, bias, None, before, True, out, **how)
        assert state is out
        torch.testing.assert_close(out, last, **FLOAT64)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("slots", [None, (4, -1, 0)])
def test_convolution_of_a_few_more_tokens(size, circular, slots):
    """One token, four, then more than the state holds: as the convolution of all of them."""
    rows, whole = 3, noise(3, 2, 15)
    weight, bias = noise(2, 4, seed=1), noise(2, seed=2)
    want, _ = plain_convolution(whole, weight, bias, "silu")
    state = torch.zeros(rows if slots is None else 6, 2, size, dtype=whole.dtype)
    indices = None if slots is None else torch.tensor(slots)
    if slots is not None:
        want[1] = 0
    at = 0
    for tokens in (1, 4, 1, 8, 1):
        seen = torch.full((rows,), at, dtype=torch.int32) if circular else None
        x = whole[:, :, at : at + tokens]
        x = x[..., 0] if tokens == 1 else x
        y = causal_conv1d_update(x, state, weight, bias, "silu", seen, indices)
        torch.testing.assert_close(y.reshape(3, 2, tokens), want[:, :, at : at + tokens], **FLOAT64)
        at += tokens
    row = state[0 if slots is None else 4]
    inputs = [whole[0, :, 15 - size + i] for i in range(size)]
    if circular:
        inputs = [inputs[(place - 15) % size] for place in range(size)]
    assert torch.equal(row, torch.stack(inputs, -1))


def test_what_is_refused():
    scan, (step, state) = scan_inputs(), step_inputs("head")
    x, weight = noise(2, 3, 9), noise(3, 4)
    conv = dict(x=x[..., 0], conv_state=noise(2, 3, 3), weight=weight)
    for call, words in (
        (lambda: mamba_chunk_scan_combined(**scan, chunk_size=0), "mamba_chunk_scan_combined: chunk_size must be >= 1"),
        (lambda: mamba_chunk_scan_combined(**scan | {"B": scan["B"][:, :, :0]}, chunk_size=4),
         r"mamba_chunk_scan_combined: C must be \(B, L, G, N\)"),
        (lambda: mamba_chunk_scan_combined(**scan, chunk_size=4, D=noise(3)),
         r"mamba_chunk_scan_combined: D must be \(H,\) with H=4, got shape \(3,\)"),
        (lambda: selective_state_update(state[:2], **step),
         "selective_state_update: state must have B=3 rows without state_batch_indices, got 2"),
        (lambda: selective_state_update(state, **step | {"A": step["A"][..., :2]}),
         r"selective_state_update: A must be \(H, P, N\) with H=4, P=3, N=5, got shape \(4, 3, 2\)"),
        (lambda: causal_conv1d_fn(x, weight, activation="relu"), "causal_conv1d_fn: activation must be None or"),
        (lambda: causal_conv1d_fn(x, weight, final_states_out=noise(2, 3, 3)),
         "causal_conv1d_fn: final_states_out must be None without return_final_states"),
        (lambda: causal_conv1d_update(**conv | {"conv_state": noise(2, 3, 2)}),
         "causal_conv1d_update: conv_state must hold n >= 3 inputs, got 2"),
        (lambda: causal_conv1d_update(**conv | {"conv_state": noise(5, 3, 3)}),
         "causal_conv1d_update: conv_state must have B=2 rows without conv_state_indices, got 5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{words}"):
            call()
    with pytest.raises(TypeError, match="state_dtype must be None or float32, got bfloat16"):
        mamba_chunk_scan_combined(**scan, chunk_size=4, state_dtype=torch.bfloat16)
    for call in (
        lambda: selective_state_update(state, **step | {"x": step["x"].requires_grad_()}),
        lambda: causal_conv1d_update(**conv | {"weight": weight.requires_grad_()}),
    ):
        with pytest.raises(RuntimeError, match=r"has no gradient; run it under torch\.no_grad"):
            call()
