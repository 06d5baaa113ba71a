"""Inputs of `near_attention` of every kind, and what its reference gives."""

from __future__ import annotations

import torch

import linmu_ops
from linmu_ops import near_attention

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, H, G, P, tokens before, L, tokens of a window, tokens that read one list, its length
CASES = {
    "one of all": (1, 1, 1, 1, 0, 1, 1, 1, 1),
    "a window": (2, 4, 2, 16, 0, 37, 8, 5, 0),
    "a window and lists": (2, 4, 2, 16, 9, 70, 8, 5, 6),
    "as a prompt": (1, 14, 2, 64, 0, 190, 100, 64, 33),
    "as a later part": (2, 3, 3, 33, 150, 70, 70, 64, 20),
    "odd heads": (1, 5, 1, 37, 3, 50, 20, 7, 9),
    "wide heads": (1, 2, 1, 136, 0, 80, 30, 16, 5),
    "more keys than a block": (1, 2, 1, 8, 600, 70, 640, 64, 40),
    "one long list": (1, 2, 1, 8, 400, 70, 3, 400, 290),
    "no tokens": (2, 2, 1, 8, 3, 0, 4, 2, 2),
    "no rows": (0, 2, 1, 8, 0, 5, 4, 2, 2),
}
KINDS = ("steps", "random")


def make_inputs(case, dtype, kind="steps", seed=0, scale=None):
    """steps: as a block has it, where all that read together see the same list, of tokens before them. random: ranges
    and lists of anything, some of none, some of later tokens."""
    B, H, G, P, before, L, window, step, m = CASES[case]
    g = torch.Generator().manual_seed(seed)
    T, own = before + L, torch.arange(before, before + L)
    q, k, v = (torch.randn(B, n, h, P, generator=g, dtype=torch.float64).to(dtype) for n, h in ((L, H), (T, G), (T, G)))
    if kind == "random":
        ends = torch.randint(0, T + 1, (2, B, L), generator=g)
        low, high = torch.where(torch.rand(B, L, generator=g) < 0.8, ends.sort(0).values, ends)
        lists = 3
        which = torch.randint(-1, lists, (B, G, L), generator=g)
        listed = torch.randint(-1, max(T, 1), (lists, m), generator=g)
    else:
        low, high = ((own - window + 1).clamp(min=0) // step * step).expand(B, L), (own + 1).expand(B, L)
        number = low[:1, :] // step if B else low
        steps = T // step + 1
        which = torch.arange(B * G).view(B, G, 1) * steps + (number if B else 0)
        which = torch.where(number > 0, which, -1) if B else which.expand(B, G, L)
        ends = (torch.arange(steps) * step).clamp(min=1).repeat(B * G)[:, None]
        listed = (torch.rand(B * G * steps, m, generator=g) * 1.3 * ends).long()
        listed = torch.where(listed < ends, listed, -1)
    return dict(
        q=q, k=k, v=v, low=low.int(), high=high.int(), which=which.int(), listed=listed.int(), scale=scale,
    )  # fmt: skip


def by_reference(**inputs):
    with linmu_ops.use_impl("near_attention:reference"):
        return near_attention(**inputs)
