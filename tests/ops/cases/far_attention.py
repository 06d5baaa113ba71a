"""Inputs of `far_attention` of every kind, and what its reference gives."""

from __future__ import annotations

import torch

import linmu_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, L, tokens before, H, G, P, N, tokens that enter at a time.
CASES = {
    "one of all": (1, 1, 0, 1, 1, 1, 1, 1),
    "one at a time": (2, 9, 4, 4, 2, 16, 16, 1),
    "a few at a time": (2, 40, 13, 6, 3, 17, 5, 7),
    "seven heads to a group, as a block": (1, 300, 100, 14, 2, 64, 64, 64),
    "more at a time than a product sums": (2, 270, 40, 5, 1, 33, 37, 130),
    "large heads": (1, 150, 0, 4, 1, 128, 96, 64),
    "no tokens": (2, 0, 0, 2, 1, 4, 4, 2),
    "no rows": (0, 3, 2, 2, 1, 4, 4, 2),
}
OPTIONS = {
    "plain": (),
    "gated": ("z_gate",),
    "on and on": ("initial_state", "last", "z_gate"),
    "state alone": ("last",),
}


def make_inputs(case, dtype, options=("initial_state", "last", "z_gate")):
    """As of a block: fewer enter than come, in an order that is not that of tokens, and not all tokens read."""
    B, L, before, H, G, P, N, leave = CASES[case]
    acc, T = torch.float64 if dtype == torch.float64 else torch.float32, before + L
    step = torch.arange(T) // leave
    entered = (step + torch.randint(0, 3, (B, G, T))).clamp(max=T)
    when = step[before:] + torch.randint(-2, 2, (B, L))
    inputs = dict(
        y=torch.randn(B, L, H, P).to(dtype), lse=torch.randn(B, L, H), rest=torch.randn(B, L, H) + 2,
        q=torch.randn(B, L, H, P).to(dtype), k=torch.randn(B, T, G, P).to(dtype), v=torch.randn(B, T, G, P).to(dtype),
        steps=torch.rand(B, T, G, H // G, dtype=acc),
        entered=entered.masked_fill(torch.rand(B, G, T) < 0.2, -1).int(), when=when.clamp(-1, T).int(),
        b_map=torch.randn(G, P, N), c_map=torch.randn(H, P, N), scale=1 + torch.rand(H), rates=0.1 * torch.rand(H),
    )  # fmt: skip
    if "z_gate" in options:
        inputs["z_gate"] = torch.randn(B, L, H * P).to(dtype)
    if "initial_state" in options:
        inputs["initial_state"] = torch.rand(B, H, P + 1, N, dtype=acc)
        inputs["initial_state"][..., :P, :] -= 0.5
    if "last" in options:
        inputs["last"] = torch.randint(0, T + 1, (B,)).int()
    return inputs


def mixed(y, *args, **inputs):
    """What the op gives, and what it writes to."""
    state = linmu_ops.far_attention(y, *args, **inputs)
    return (y,) if state is None else (y, state)


def by_reference(**inputs):
    with linmu_ops.use_impl("far_attention:reference"):
        return mixed(**inputs)


def cloned(inputs):
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
