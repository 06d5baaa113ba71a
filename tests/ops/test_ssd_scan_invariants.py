"""`ssd_scan` against itself, against `ssd_step`, and against code that others wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import linmu_ops
from linmu_ops._testing import assert_within_twice, to_double
from linmu_ops.ssd_scan import ARGUMENTS
from tests.ops.cases.ssd_scan import by_reference, make_inputs, scan, used
from tests.ops.reruns import assert_same_bits

CASE = (2, 150, 4, 2, 2, 4, 8, 12)
PER_TOKEN = ("x", "dt", "B", "C", "reverse_dt", "reverse_B", "reverse_C", "reverse_mask", "reverse_seq_idx", "seq_idx")
LINEAR = ("D", "dt_softplus", "dt_bias", "seq_idx")  # options whose tensors can be cut or flipped along L


def at_tokens(i, f):
    """`i` with f applied to every per-token tensor (a (B, L, H) gate among them)."""
    return {k: f(v) if k in PER_TOKEN or (k == "gate" and v.dim() == 3) else v for k, v in i.items()}


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def test_reverse_is_flip_forward_flip():
    i = make_inputs(CASE, options=(*LINEAR, "initial_state", "return_final_state"), direction="forward")
    y, state = scan(**{**i, "direction": "reverse"})
    flipped, flipped_state = scan(**at_tokens(i, lambda t: t.flip(1)))
    close(y, flipped.flip(1))
    close(state, flipped_state)


def test_token_order_is_a_gather():
    i = make_inputs(CASE, options=("all",))
    order = i.pop("token_order").long()

    def visit(t):
        return torch.gather(t, 1, order.view(*order.shape, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:]))

    y, state = scan(**i, token_order=order.int())
    moved, moved_state = scan(**at_tokens(i, visit))
    assert torch.equal(visit(y), moved) and torch.equal(state, moved_state)


def test_both_with_a_closed_gate_is_forward():
    i = make_inputs(CASE, options=("D", "dt_softplus", "reverse_mask", "reverse_dt"))
    forward = scan(**{k: v for k, v in i.items() if "reverse" not in k and k != "direction"})
    close(scan(**i, gate=torch.ones(4)), forward)
    close(scan(**i, gate=torch.ones(2, 150, 4)), forward)


def test_both_is_the_sum_of_its_directions():
    i = make_inputs(CASE, options=("dt_softplus", "reverse_mask", "reverse_A", "reverse_B", "seq_idx"))
    forward = scan(**{k: v for k, v in i.items() if "reverse" not in k and k != "direction"})
    close(scan(**i), forward + scan(**{**i, "direction": "reverse"}))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_pieces_with_carried_state_are_the_whole(direction, cut):
    i = make_inputs(CASE, options=("D", "dt_softplus", "dt_bias", "initial_state", "return_final_state"))
    i["direction"] = direction
    names = used(i)
    leaves = [{k: v.clone().requires_grad_() if k in names else v for k, v in i.items()} for _ in range(2)]
    whole, end = scan(**leaves[0])
    parts = [at_tokens(leaves[1], lambda t: t[:, :cut]), at_tokens(leaves[1], lambda t: t[:, cut:])]
    first, second = parts if direction == "forward" else parts[::-1]
    y1, middle = scan(**first)
    y2, last = scan(**{**second, "initial_state": middle})
    pieces = torch.cat([y1, y2] if direction == "forward" else [y2, y1], 1)
    close(pieces, whole)
    close(last, end)
    w, v = torch.randn_like(whole), torch.randn_like(end)
    want = torch.autograd.grad((whole * w).sum() + (end * v).sum(), [leaves[0][k] for k in names])
    got = torch.autograd.grad((pieces * w).sum() + (last * v).sum(), [leaves[1][k] for k in names])
    for g, e in zip(got, want, strict=True):
        close(g, e, 1e-4)


def test_steps_are_the_scan():
    i = make_inputs(CASE, options=("D", "dt_softplus", "dt_bias"), direction="forward")
    y, final = scan(**i, return_final_state=True)
    state = torch.zeros_like(final)
    token = [
        linmu_ops.ssd_step(
            state, i["x"][:, t], i["dt"][:, t], i["A"], i["B"][:, t], i["C"][:, t], D=i["D"], dt_bias=i["dt_bias"],
            dt_softplus=True,
        )
        for t in range(CASE[1])
    ]  # fmt: skip
    close(torch.stack(token, 1), y)
    close(state, final)


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "segments"])
def test_text_never_sees_a_later_token(masked):
    """Visual blocks at 20..60 and 80..140: nothing outside them, or before them, changes with what comes after."""
    i = make_inputs((1, 150, 4, 2, 2, 4, 8, 12), options=("dt_softplus", "gate", "D"))
    t = torch.arange(150)
    visual = ((t >= 20) & (t < 60)) | ((t >= 80) & (t < 140))
    i["reverse_mask"] = visual[None]
    block = (t >= 60).int() + (t >= 100).int()  # the second block restarts within, too
    i["reverse_seq_idx"] = (block if masked else torch.where(visual, block, 100 + t.int())).int()[None]
    before = scan(**i)
    for changed, same in ((145, t < 145), (90, t < 80), (30, t < 20), (120, (t < 80))):
        other = {**i, "x": i["x"].clone(), "B": i["B"].clone()}
        other["x"][:, changed] += 1
        other["B"][:, changed] += 1
        after = scan(**other)
        assert torch.equal(after[:, same], before[:, same])
        assert not torch.equal(after[:, changed], before[:, changed])


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_extreme_steps(direction):
    """dt A from 0 down to -1e4, mixed within a chunk: exact zeros where nothing survives, and never a NaN."""
    i = make_inputs((1, 70, 4, 2, 2, 4, 6, 5), direction=direction)
    g = torch.Generator().manual_seed(3)
    i["A"] = -torch.ones(4)
    pick = torch.randint(0, 5, (1, 70, 4), generator=g)
    i["dt"] = torch.tensor([0.0, 1e-6, 0.3, 80.0, 1e4])[pick]
    values = [{k: v.requires_grad_() if k in used(i) else v for k, v in to(i).items()} for to in (copy, copy, double)]
    results = []
    for f, v in zip((scan, by_reference, by_reference), values, strict=True):
        y = f(**v)
        w = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, [v[k] for k in used(i)], w)])
    for name, got, base, exact in zip(["y", *used(i)], *results, strict=True):
        assert_within_twice(got, exact, base, name)
    i["dt"] = torch.full((1, 70, 4), 1e4)
    alone = i["dt"][..., None] * i["x"].detach().repeat_interleave(2, 2)
    alone = alone * (i["B"].detach().repeat_interleave(2, 2) * i["C"].detach()).sum(-1, keepdim=True)
    close(scan(**i).detach(), alone * (2 if direction == "both" else 1))


def copy(i):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in i.items()}


def double(i):
    return {k: to_double(v) for k, v in copy(i).items()}


def test_growing_states():
    """A > 0 is outside the documented range, and still computed."""
    i = make_inputs((1, 40, 2, 1, 1, 2, 3, 4), direction="both", options=("gate",))
    i["A"] = torch.tensor([0.05, 0.3])
    close(scan(**i), by_reference(**i), 1e-4)


def test_a_long_sequence_does_not_drift():
    length, heads = 131072, 2
    i = make_inputs((1, length, heads, heads, 1, 1, 1, 2), options=("dt_softplus",))
    i["dt"] = i["dt"] - 4  # memories of hundreds of tokens
    y = scan(**i)
    assert y.isfinite().all()
    dt = np.logaddexp(0, i["dt"][0].double().numpy())
    A, x = i["A"].double().numpy(), i["x"][0, :, :, 0].double().numpy()
    B, C = i["B"][0, :, 0].double().numpy(), i["C"][0, :, 0].double().numpy()

    def recurrence(steps):
        h, out = np.zeros((heads, 2)), np.empty((length, heads))
        decay, u = np.exp(dt * A), (dt * x)[:, :, None] * B[:, None, :]
        for t in steps:
            h = decay[t][:, None] * h + u[t]
            out[t] = h @ C[t]
        return out

    expected = recurrence(range(length)) + recurrence(range(length - 1, -1, -1))
    error = np.abs(y[0, :, :, 0].numpy() - expected)
    assert error.max() <= 32 * np.finfo(np.float32).eps * np.abs(expected).max()
    quarters = error.reshape(4, -1).max(1)
    assert quarters[-1] <= 4 * quarters[:-1].max() + 1e-7


def test_offsets_beyond_32_bits():
    """A view whose second batch row, and last tokens, lie more than 2^31 elements from the first."""
    far = 2**31 + 64
    torch.utils.deterministic.fill_uninitialized_memory = False  # of 4 GiB, a few pages are touched
    try:
        storage = torch.empty(far + 4096, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("needs 4 GiB of address space")
    i = make_inputs((2, 3, 1, 1, 1, 1, 8, 8), torch.bfloat16, "both")
    storage[:4096] = 0
    storage[-4096:] = 0
    for stride in ((far, 16, 8, 1), (64, far // 2 // 8 * 8, 8, 1)):
        x = storage.as_strided((2, 3, 1, 8), stride)
        x.copy_(i["x"])
        assert torch.equal(scan(**{**i, "x": x}), scan(**i))


@pytest.mark.parametrize(
    "case", [(2, 150, 4, 2, 2, 4, 8, 12), (1, 100, 16, 16, 1, 1, 8, 8), (1, 90, 7, 1, 1, 7, 16, 16)]
)
def test_same_bits_always(case):
    i = make_inputs(case, options=("all",))
    names = used(i)

    def run():
        leaves = {k: v.clone().requires_grad_() if k in names else v for k, v in i.items()}
        y, state = scan(**leaves)
        return y, state, *torch.autograd.grad((y * y).sum() + (state * state).sum(), [leaves[k] for k in names])

    assert_same_bits(run, threads=(1, 2, 2, 3))


@pytest.mark.parametrize("chunk", [16, 48, 64, 128])
def test_chunks_do_not_matter(chunk):
    i = make_inputs(CASE, torch.float64, options=("all",))
    close(scan(**i, chunk_size=chunk)[0], scan(**i)[0], 1e-13)


def test_transformers_chunk_scan():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    i = make_inputs((2, 150, 8, 8, 2, 2, 16, 12), options=("D", "dt_bias", "initial_state"), direction="forward")
    theirs, their_state = modeling.mamba2_chunk_scan(
        i["x"], i["dt"], i["A"], i["B"], i["C"], 32, D=i["D"], dt_bias=i["dt_bias"], dt_softplus=True,
        initial_states=i["initial_state"], return_final_states=True,
    )  # fmt: skip
    ours, our_state = scan(**i, dt_softplus=True, return_final_state=True)
    close(ours, theirs, 1e-4)
    close(our_state, their_state, 1e-4)


def test_transformers_state_update():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    i = make_inputs((2, 1, 8, 8, 2, 2, 16, 12), options=("D", "dt_bias", "initial_state"), direction="forward")
    state = i["initial_state"].clone()
    rows = {k: i[k][..., None].expand(*i[k].shape, 16) for k in ("D", "dt_bias")}
    theirs = modeling.mamba2_selective_state_update(
        state, i["x"][:, 0], i["dt"][:, 0, :, None].expand(2, 8, 16), i["A"][:, None, None].expand(8, 16, 12),
        i["B"][:, 0], i["C"][:, 0], **rows, dt_softplus=True,
    )  # fmt: skip
    ours, our_state = scan(**i, dt_softplus=True, return_final_state=True)
    close(ours[:, 0], theirs)
    close(our_state, state)


def test_every_argument_reaches_the_kernel():
    """Changing any argument changes the output or the state; none is read past or ignored."""
    i = make_inputs(CASE, options=("all",))
    before = scan(**i)
    for name in ARGUMENTS:
        if name == "normalize":  # gives other outputs; tests of means compare them
            continue
        if name == "direction":
            changed = "forward"
        elif name == "dt_softplus":
            changed = False
        elif i[name].dtype == torch.int32:
            changed = torch.arange(150).int().expand(2, 150) if name == "token_order" else torch.zeros_like(i[name])
        else:
            changed = ~i[name] if i[name].dtype == torch.bool else i[name] * 0.5
        other = {**i, name: changed}
        if name == "direction":
            other = {k: v for k, v in other.items() if "reverse" not in k and k != "gate"}
        after = scan(**other)
        assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), name
