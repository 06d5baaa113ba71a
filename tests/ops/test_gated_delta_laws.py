"""What the gated delta rule must do by itself: laws, limits, and what transformers computes."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference, run_op

scan = functools.partial(run_op, "gated_delta_scan")


def by_reference(**inputs):
    with linmu_ops.use_impl("gated_delta_scan:reference"):
        return scan(**inputs)


def inputs(B=2, L=70, H=4, G=2, K=16, V=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    normal = functools.partial(torch.randn, generator=g)
    uniform = functools.partial(torch.rand, generator=g)
    return dict(
        q=normal(B, L, G, K).to(dtype), k=normal(B, L, G, K).to(dtype), v=normal(B, L, H, V).to(dtype),
        g=-uniform(B, L, H).to(acc), beta=uniform(B, L, H).to(acc), use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def tokens(i, where):
    return {k: v[:, where] if torch.is_tensor(v) and v.dim() > 2 else v for k, v in i.items()}


def state_of(i, seed=1):
    B, _, H, V = i["v"].shape
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, i["k"].shape[3], V, generator=g).to(i["g"].dtype)


def test_a_scan_of_a_concatenation_carries_the_state():
    i, state = inputs(dtype=torch.float64), state_of(inputs(dtype=torch.float64))
    whole, last = scan(**i, initial_state=state, return_final_state=True)
    found = []
    for a, b in ((0, 1), (1, 33), (33, 33), (33, 70)):
        y, state = scan(**tokens(i, slice(a, b)), initial_state=state, return_final_state=True)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), whole)
    torch.testing.assert_close(state, last)


def test_steps_are_the_scan():
    i, state = inputs(L=9, dtype=torch.float64), state_of(inputs(L=9, dtype=torch.float64))
    whole, last = scan(**i, initial_state=state, return_final_state=True)
    found = [linmu_ops.gated_delta_step(state, **tokens(i, t)) for t in range(9)]
    torch.testing.assert_close(torch.stack(found, 1), whole)
    torch.testing.assert_close(state, last)


def test_segments_are_scans_of_their_own():
    i = inputs(B=1)
    cut = (torch.arange(70)[None] >= 37).int()
    y = scan(**i, seq_idx=cut)
    parts = [scan(**tokens(i, where)) for where in (slice(0, 37), slice(37, 70))]
    torch.testing.assert_close(y, torch.cat(parts, 1))


def test_the_reverse_scan_is_the_forward_one_of_flipped_tokens():
    i = inputs()
    torch.testing.assert_close(scan(**i, direction="reverse"), scan(**tokens(i, torch.arange(69, -1, -1))).flip(1))


def test_an_order_is_a_permutation_of_the_tokens():
    i, order = inputs(B=1), torch.randperm(70)
    y = scan(**i, token_order=order[None].int())
    torch.testing.assert_close(y[:, order], scan(**tokens(i, order)))


def test_masked_tokens_are_as_if_left_out():
    i, mask = inputs(B=1), torch.rand(1, 70) < 0.6
    y = scan(**i, direction="reverse", reverse_mask=mask)
    torch.testing.assert_close(y[mask][None], scan(**tokens(i, mask[0]), direction="reverse"))
    assert (y[~mask] == 0).all()


def test_with_beta_1_a_key_answers_with_its_last_value():
    i = inputs(B=1, H=2, dtype=torch.float64) | dict(g=torch.zeros(1, 70, 2).double(), scale=1.0)
    i = i | dict(beta=torch.ones_like(i["beta"])[:, :, :2], q=i["k"])
    # But for the epsilon of the norms: 1e-6 over a length of about 16.
    torch.testing.assert_close(scan(**i), i["v"], rtol=1e-6, atol=1e-5)


LIMITS = {
    "beta 1": dict(beta=1.0),
    "beta 0": dict(beta=0.0),
    "beta 2": dict(beta=2.0),
    "no decay": dict(g=0.0),
    "hardly a decay": dict(g=-1e-7),
    "a steep decay": dict(g=-90.0),
    "nothing is left": dict(g=-math.inf),
    "beta 1, no decay": dict(beta=1.0, g=0.0),
}


@pytest.mark.parametrize("keys", ["random", "equal", "opposite"])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit, keys):
    i = inputs(B=1, L=70, K=8)
    i |= {k: torch.full_like(i[k], value) for k, value in LIMITS[limit].items()}
    if keys != "random":
        i["k"] = i["k"][:, :1].expand(i["k"].shape)
        if keys == "opposite":
            i["k"] = i["k"] * (1 - 2 * (torch.arange(70) % 2)).view(1, -1, 1, 1)
    wrt = ["q", "k", "v", "g", "beta"]
    if i["g"][0, 0, 0].isinf():
        wrt.remove("g")  # of the reference it is 0 times what is infinite
    check_against_reference(scan, by_reference, i, wrt)


def test_padding_with_no_learning_rate_and_no_decay_changes_nothing():
    i, state = inputs(), state_of(inputs())
    i["g"], i["beta"] = (torch.where(torch.arange(70)[:, None] < 11, 0.0, i[k]) for k in ("g", "beta"))
    y, last = scan(**i, initial_state=state, return_final_state=True)
    want, want_last = scan(**tokens(i, slice(11, None)), initial_state=state, return_final_state=True)
    torch.testing.assert_close(y[:, 11:], want)
    torch.testing.assert_close(last, want_last)


def transformers_rules():
    module = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    return [module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule]


@pytest.mark.parametrize("rule", [0, 1], ids=["chunked", "recurrent"])
@pytest.mark.parametrize("carried", [False, True], ids=["from nothing", "carried"])
@pytest.mark.parametrize("normed", [False, True], ids=["as they are", "normalised"])
def test_what_transformers_computes(rule, carried, normed):
    """Of lengths that its chunks do not divide, of grouped heads, and of a state that is carried on."""
    theirs = transformers_rules()[rule]
    for length in (1, 65, 130):
        i = inputs(L=length) | dict(use_qk_l2norm_in_kernel=normed)
        if not normed:
            i["k"] = torch.nn.functional.normalize(i["k"], dim=-1)
        start = state_of(i) if carried else None
        arguments = dict(initial_state=start, use_qk_l2norm_in_kernel=normed)
        given = [i[k].clone().requires_grad_() for k in ("q", "k", "v", "g", "beta")]
        want, want_state = theirs(*given, **arguments, output_final_state=True)
        expected = torch.autograd.grad(want.sum() + want_state.square().sum(), given)
        y, state = linmu_ops.gated_delta_scan(*given, **arguments, return_final_state=True)
        found = torch.autograd.grad(y.sum() + state.square().sum(), given)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-4)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_what_transformers_computes_in_bfloat16():
    i = inputs(L=100, dtype=torch.bfloat16)
    given = [i[k] for k in ("q", "k", "v", "g", "beta")]
    want, state = transformers_rules()[1](*given, output_final_state=True, use_qk_l2norm_in_kernel=True)
    y, last = scan(**i, return_final_state=True)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


@pytest.mark.sweep
def test_a_long_row():
    """131072 visits, against a scan in float64 of the last of them, which remember nothing before."""
    i = inputs(B=1, L=131072, H=2, G=1, K=32, V=32)
    y, last = scan(**i, return_final_state=True)
    end = {k: v.double() if torch.is_tensor(v) else v for k, v in tokens(i, slice(-400, None)).items()}
    want, want_last = by_reference(**end, return_final_state=True)
    torch.testing.assert_close(y[:, -100:].double(), want[:, -100:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.double(), want_last, rtol=1e-4, atol=1e-5)
    leaves = {k: i[k].clone().requires_grad_() for k in ("q", "k", "v", "g", "beta")}
    y = scan(**i | leaves)
    near = {k: end[k].clone().requires_grad_() for k in leaves}
    grads = torch.autograd.grad(y[:, -50:].sum(), list(leaves.values()))
    wanted = torch.autograd.grad(by_reference(**end | near)[:, -50:].sum(), list(near.values()))
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g[:, -100:].double(), w[:, -100:], rtol=1e-3, atol=1e-4)
        assert g[:, :-400].abs().max() < 1e-6
