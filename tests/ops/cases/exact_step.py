"""Inputs of `exact_step` of every kind, and what its reference gives."""

from __future__ import annotations

import torch

import linmu_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, H, G, P, N, R, sinks, window, kept, and how many tokens each row has behind it, in turns.
CASES = {
    "one of all": (1, 1, 1, 1, 1, 0, 0, 1, 0, (0,)),
    "at the first tokens": (5, 2, 1, 16, 16, 16, 3, 4, 2, (0, 1, 2, 3, 4)),
    "around the first steps of leaving": (6, 3, 3, 17, 5, 8, 2, 5, 3, (4, 5, 8, 9, 10, 14)),
    "where the kept fill up": (5, 4, 2, 24, 40, 6, 4, 6, 9, (11, 12, 17, 23, 24)),
    "around the ring": (4, 10, 2, 33, 37, 32, 1, 7, 5, (97, 98, 99, 100)),
    "seven heads to a group, default sizes": (2, 14, 2, 64, 64, 64, 4, 256, 128, (200, 5000)),
    "large heads": (1, 6, 1, 128, 96, 128, 4, 70, 33, (1000,)),
    "no sinks": (3, 5, 1, 48, 64, 12, 0, 8, 6, (0, 15, 60)),
    "none kept": (3, 6, 2, 40, 24, 0, 2, 3, 0, (1, 5, 40)),
    "more sinks than the window": (3, 2, 2, 8, 8, 4, 30, 4, 2, (3, 29, 90)),
    "no rows": (0, 2, 1, 4, 4, 2, 1, 2, 1, (0,)),
}
OPTIONS = {
    "plain": {},
    "interleaved, gated, padded": dict(interleaved=True, gate=True, padded=True, softmax_scale=0.3),
    "one rotary, wide map": dict(one_rotary=True, gate=True, wide_map=True),
    "nothing beyond": dict(nothing_beyond=True),
    "more far than the limit": dict(far_limit=2, gate=True),
}


def make_inputs(
    case, dtype, interleaved=False, gate=False, padded=False, one_rotary=False, wide_map=False, nothing_beyond=False,
    softmax_scale=None, far_limit=2**62,
):  # fmt: skip
    B, H, G, P, N, R, s, window, kept, seen = CASES[case]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    n = s + window + min(window, 64) + kept
    inputs = dict(
        keys=torch.randn(B, G, n, P).to(dtype), values=torch.randn(B, G, n, P).to(dtype),
        steps=torch.rand(B, G, n - s, H // G, dtype=acc), seen=torch.tensor((seen * B)[:B], dtype=torch.int64),
        ssm=torch.rand(B, H, P + 1, N, dtype=acc), q=torch.randn(B, H, P).to(dtype), k=torch.randn(B, G, P).to(dtype),
        v=torch.randn(B, G, P).to(dtype), dt=torch.randn(B, H), dt_bias=torch.randn(H), rest=torch.randn(B, H),
        c_map=torch.randn(H, P, N).to(acc if wide_map else dtype), scale=1 + torch.rand(H), window=window,
        softmax_scale=softmax_scale, interleaved=interleaved, nothing_beyond=nothing_beyond,
        far_limit=far_limit,
    )  # fmt: skip
    inputs["ssm"][..., :P, :] -= 0.5
    if s:
        inputs |= dict(sinks=(torch.rand(B, s) < 0.7) & (torch.arange(s) < inputs["seen"][:, None]))
    if R:
        angle = 3 * torch.randn(1 if one_rotary else B, R)
        inputs |= dict(cos=angle.cos(), sin=angle.sin())
    if gate:
        inputs |= dict(z_gate=torch.randn(B, H * P).to(dtype))
    if padded:
        inputs |= dict(real=torch.arange(B) % 3 != 1)
    return inputs


def stepped(keys, values, steps, seen, sinks=None, **inputs):
    """What the op gives, and all that it writes to."""
    out = linmu_ops.exact_step(keys, values, steps, seen, sinks=sinks, **inputs)
    return (*out, keys, values, steps, seen, *(() if sinks is None else (sinks,)))


def by_reference(**inputs):
    with linmu_ops.use_impl("exact_step:reference"):
        return stepped(**inputs)


def cloned(inputs):
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
