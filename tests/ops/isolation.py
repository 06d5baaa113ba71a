"""What a result does not depend on, asked of the reference in float64: an element that stays the same bit by bit when
the spoiled values become other, ordinary ones.
"""

from __future__ import annotations

import functools
import math

import torch

import linmu_ops
from linmu_ops import TokenLayout
from linmu_ops._testing import results_of, run_op, to_double

LENGTH, AT, CHUNK = 45, 21, 16  # three chunks of the scan; the middle one is spoiled


def scan(direction, segments=False, masked=False, gate=False, own=False, softplus=False, mean=False):
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    def unit(*shape):
        return 0.05 + 0.3 * torch.rand(shape, generator=g)

    B, L, H, P, N = 1, LENGTH, 4, 5, 6
    inputs = dict(
        x=normal(B, L, 2, P), dt=unit(B, L, H), A=-unit(H), B=normal(B, L, 1, N), C=normal(B, L, 2, N), D=normal(H),
        direction=direction, initial_state=normal(B, H, P, N), return_final_state=True, chunk_size=CHUNK,
    )  # fmt: skip
    at = torch.arange(L)
    if segments:
        inputs["seq_idx"] = (at // 7).int()[None]
    if masked:
        inputs["reverse_mask"] = ((at // 5) % 3 != 2)[None] & (at != AT)
    if gate:
        inputs["gate"] = unit(B, L, H)
    if own:
        order = torch.randperm(L, generator=g).int()[None]
        inputs |= dict(reverse_dt=unit(B, L, H), reverse_A=-unit(H), token_order=order)
        inputs |= dict(reverse_B=normal(B, L, 1, N), reverse_C=normal(B, L, 2, N))
    if softplus:
        inputs |= dict(dt_softplus=True, dt_bias=normal(H))
    if mean:  # no weight is below 0
        weights = ("B", "C", "D", "reverse_B", "reverse_C")
        inputs |= {k: inputs[k].abs() for k in weights if k in inputs}
        state = torch.cat((inputs["initial_state"], unit(B, H, 1, N)), 2)
        inputs |= dict(initial_state=state, normalize=True)
        if segments:  # none begins where a value is spoiled: a mean of one value has no gradient to speak of
            inputs["seq_idx"] = (at // 10).int()[None]
    return inputs


def delta(direction, segments=False, masked=False, gate=False, own=False, normed=False):
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    def unit(*shape):
        return 0.05 + 0.3 * torch.rand(shape, generator=g)

    B, L, H, K, V = 1, LENGTH, 4, 6, 5
    inputs = dict(
        q=normal(B, L, 2, K), k=0.4 * normal(B, L, 2, K), v=normal(B, L, 1, V), g=-unit(B, L, H), beta=unit(B, L, H),
        direction=direction, initial_state=normal(B, H, K, V), return_final_state=True, chunk_size=CHUNK,
        use_qk_l2norm_in_kernel=normed,
    )  # fmt: skip
    at = torch.arange(L)
    if segments:
        inputs["seq_idx"] = (at // 7).int()[None]
    if masked:
        inputs["reverse_mask"] = ((at // 5) % 3 != 2)[None] & (at != AT)
    if gate:
        inputs["gate"] = unit(B, L, H)
    if own:
        order = torch.randperm(L, generator=g).int()[None]
        inputs |= dict(reverse_g=-unit(B, L, H), reverse_beta=unit(B, L, H), token_order=order)
        inputs |= dict(reverse_q=normal(B, L, 2, K), reverse_k=0.4 * normal(B, L, 2, K))
    return inputs


def windows(**options):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 30, n, 5, generator=g) for n in (4, 2, 2))
    return dict(q=q, k=k, v=v, bias=torch.randn(4, 3, 5, generator=g), window=(2, 3), return_lse=True) | options


def one_window(**options):
    """A causal one of a few blocks of queries and of keys, whose middle is spoiled."""
    g = torch.Generator().manual_seed(1)
    L = 2 * LENGTH
    q, k, v = (torch.randn(1, L, n, 5, generator=g) for n in (2, 1, 1))
    angle = torch.randn(1, L, 2, generator=g).repeat(1, 1, 2)
    inputs = dict(q=q, k=k, v=v, grid=(L,), window=(L,), shift=(9,), cos=angle.cos(), sin=angle.sin())
    return inputs | dict(causal=True, return_lse=True) | options


def near(**options):
    """Tokens of two tiles, each of which sees a window and a list; token 12 stands in some lists."""
    g = torch.Generator().manual_seed(1)
    own = torch.arange(3, 33)
    q, k, v = (torch.randn(2, t, n, 5, generator=g) for t, n in ((30, 4), (33, 2), (33, 2)))
    which = torch.where(own < 15, -1, own % 8 // 4).expand(2, 2, -1)
    low = (own - 6).clamp(min=0)
    listed = torch.tensor([[0, 1, -1], [12, 2, 12]])
    inputs = dict(q=q, k=k, v=v, low=low.expand(2, -1).int(), high=(own + 1).expand(2, -1).int())
    return inputs | dict(which=which.int(), listed=listed.int()) | options


def other_calls():
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    at = torch.arange(30)
    mask = (at % 3 != 0).expand(2, 30)
    blocks = TokenLayout([(0, 1, 4, 3), (1, 1, 2, 6)], [*range(2, 14), *range(8, 20)], 2, 30)
    conv = dict(x=normal(2, 30, 9), weight=normal(9, 4), bias=normal(9), initial_state=normal(2, 3, 9),
                return_final_state=True)  # fmt: skip
    mix = dict(a=normal(2, 30, 9), b=normal(2, 30, 9), mask=mask, weight=normal(9), bias=normal(9))
    gated = dict(x=normal(2, 30, 9), z=normal(2, 30, 9), weight=normal(9), group_size=3)
    return {
        "conv": ("causal_conv1d", conv | dict(activation="silu")),
        "conv, from nothing": ("causal_conv1d", dict(x=conv["x"][:, :15], weight=conv["weight"])),
        "conv, segments": ("causal_conv1d", conv | dict(seq_idx=(at // 7).int().expand(2, 30))),
        "conv, order": ("causal_conv1d", conv | dict(token_order=at.flip(0).int().expand(2, 30))),
        "mix by token": ("branch_mix_norm", mix | dict(mix=torch.rand(2, 30, generator=g))),
        "mix by channel": ("branch_mix_norm", mix | dict(mix=torch.rand(9, generator=g))),
        "mix, no norm": ("branch_mix_norm", {**mix, "mix": torch.rand(1, generator=g), "norm": "none", "bias": None,
                                             "weight": None}),
        "gate, then norm": ("gated_norm", gated),
        "norm, then gate": ("gated_norm", gated | dict(norm_before_gate=True)),
        "windows": ("window_attention", windows(grid=(5, 6), shift=(1, 1), wrap="mask")),
        "windows of blocks": ("window_attention", windows(layout=blocks)),
        "windows, causal": ("window_attention", windows(grid=(5, 6), shift=(1, 1), causal=True)),
        "windows of blocks, causal": ("window_attention", windows(layout=blocks, causal=True)),
        "near": ("near_attention", near()),
        "near, of a negative scale": ("near_attention", near(scale=-0.3)),
        "one window, causal": ("window_attention", one_window(scale=-0.3)),
    }  # fmt: skip


CALLS = {
    "forward": ("ssd_scan", scan("forward")),
    "forward, segments": ("ssd_scan", scan("forward", segments=True, softplus=True)),
    "reverse, masked": ("ssd_scan", scan("reverse", masked=True)),
    "reverse, segments, masked": ("ssd_scan", scan("reverse", segments=True, masked=True, own=True)),
    "both": ("ssd_scan", scan("both", softplus=True)),
    "both, masked, gate": ("ssd_scan", scan("both", masked=True, gate=True)),
    "both, segments, masked, gate": ("ssd_scan", scan("both", segments=True, masked=True, gate=True, own=True)),
    "forward, mean": ("ssd_scan", scan("forward", segments=True, mean=True)),
    "both, mean": ("ssd_scan", scan("both", masked=True, gate=True, own=True, mean=True)),
    "delta, forward": ("gated_delta_scan", delta("forward", normed=True)),
    "delta, reverse, segments, masked": ("gated_delta_scan", delta("reverse", segments=True, masked=True, own=True)),
    "delta, both, segments, masked, gate": (
        "gated_delta_scan",
        delta("both", segments=True, masked=True, gate=True, own=True),
    ),
    **other_calls(),
}


# What has a value per token, and so can be spoiled at one; `weights` are the gradients of the outputs.
BY_TOKEN = ("x", "dt", "B", "C", "gate", "reverse_dt", "reverse_B", "reverse_C", "a", "b", "mix", "q", "k", "v",
           "g", "beta", "reverse_q", "reverse_k", "reverse_g", "reverse_beta")  # fmt: skip
PAIRS = [
    (c, n)
    for c, (_, i) in CALLS.items()
    for n in (*BY_TOKEN, "weights")
    if n == "weights" or (n in i and i[n].dim() > 1)
]


def call(op, impl, inputs, wrt, weights):
    def run(**values):
        with linmu_ops.use_impl(f"{op}:{impl}"):
            out = run_op(op, **values)
        # A log-sum-exp of -inf says that a token is in no window.
        if op in ("window_attention", "near_attention") and isinstance(out, tuple):
            return tuple(o.masked_fill(o == -math.inf, 0.0) if i else o for i, o in enumerate(out))
        return out

    return results_of(run, inputs, wrt, lambda _: weights)


def spoiled(inputs, weights, name, value):
    length = inputs.get("x", inputs.get("q", inputs.get("a"))).shape[1]
    at = {LENGTH: AT, 2 * LENGTH: 70, 15: 1}.get(length, 14 if "x" in inputs else 12)  # 14: a segment's start
    source = weights[0] if name == "weights" else inputs[name]
    changed = source.clone()
    changed[:1, at] = value if isinstance(value, float) else changed[:1, at] * value[0] + value[1]
    if name == "weights":
        return inputs, [changed, *weights[1:]]
    return {**inputs, name: changed}, weights


@functools.cache
def clean_call(which, dtype):
    """(inputs, what to differentiate, weights of the outputs, exact results)."""
    op, inputs = CALLS[which]
    narrow = ("x", "z", "B", "C", "reverse_B", "reverse_C", "a", "b", "q", "k", "v", "reverse_q", "reverse_k")
    narrow += ("initial_state",) * ("conv" in op)
    inputs = {k: v.to(dtype) if k in narrow else v for k, v in inputs.items()}
    if dtype == torch.float64:
        inputs = {k: to_double(v) for k, v in inputs.items()}
    wrt = [k for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point() and k not in ("cos", "sin")]
    if inputs.get("direction") == "reverse":
        wrt = [k for k in wrt if f"reverse_{k}" not in inputs]
    exact = {k: to_double(v) for k, v in inputs.items()}
    g = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=g).to(dtype) for o in call(op, "reference", exact, (), ())]
    return inputs, wrt, weights, call(op, "reference", exact, wrt, [w.double() for w in weights])


@functools.cache
def free_of(which, name, dtype):
    """Per result, what does not depend on the values of `name` at the token."""
    inputs, wrt, weights, before = clean_call(which, dtype)
    exact = {k: to_double(v) for k, v in inputs.items()}, [w.double() for w in weights]
    free = [torch.ones_like(b, dtype=torch.bool) for b in before]
    for other in ((1.5, 0.25), (0.5, 0.125)):
        values, given = spoiled(*exact, name, other)
        for i, after in enumerate(call(CALLS[which][0], "reference", values, wrt, given)):
            free[i] &= after == before[i]
    return free


@functools.cache
def clean_results(which, impl, dtype):
    inputs, wrt, weights, _ = clean_call(which, dtype)
    return call(CALLS[which][0], impl, inputs, wrt, weights)


def check(which, name, value, impl, dtype=torch.float32):
    inputs, wrt, weights, _ = clean_call(which, dtype)
    values, given = spoiled(inputs, weights, name, value)
    got, clean = call(CALLS[which][0], impl, values, wrt, given), clean_results(which, impl, dtype)
    names = [f"output {i}" for i in range(len(weights))] + [f"gradient of {k}" for k in wrt]
    for result, g, c, f in zip(names, got, clean, free_of(which, name, dtype), strict=True):
        if not f.any():
            continue
        # The rest of the chunk may be summed in another order.
        bound = 100 * torch.finfo(dtype).eps * c[f].double().abs().max().clamp(min=1e-6)
        bad = ~((g - c).double().abs() <= bound) & f
        assert not bad.any(), (
            f"{result}: {int(bad.sum())} of {int(f.sum())} changed, {int((bad & g.isnan()).sum())} to NaN"
        )


def nothing_is_hidden(which, name, impl, dtype=torch.float32):
    """What is NaN by the reference is so by the implementation."""
    inputs, wrt, weights, _ = clean_call(which, dtype)
    values, given = spoiled(inputs, weights, name, math.nan)
    op = CALLS[which][0]
    got, want = (call(op, i, values, wrt, given) for i in (impl, "reference"))
    assert any(w.isnan().any() for w in want)
    assert all(g.isnan()[w.isnan()].all() for g, w in zip(got, want, strict=True))
