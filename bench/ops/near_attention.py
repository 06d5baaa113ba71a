"""Cases, costs and peers of `near_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import linmu_ops
from bench.peers import Bench, Case, Inputs, Peer, Sizes, case, compiled

LEAVE = 64  # tokens that leave at a time, as in ExactMMATE
DEFAULT: Sizes = dict(window=256, listed=132)  # sinks and kept ones, as ExactConfig has them
CASES = {
    "tiny": case(B=2, H=4, G=2, P=16, L=320, window=128, listed=9),
    "0.5b": case(quick=True, B=1, H=14, G=2, P=64, L=4096, dtypes=("float32", "bfloat16"), backward=True, **DEFAULT),
    "7b": case(B=1, H=28, G=4, P=128, L=4096, dtypes=("float32", "bfloat16"), **DEFAULT),
}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    """A row of text: a window of `window` tokens or a few more, and a list after each 64 tokens."""
    B, L, G, m = c["B"], c["L"], c["G"], c["listed"]
    q, k, v = (torch.randn(B, L, h, c["P"], device=device).to(dtype) for h in (c["H"], G, G))
    own = torch.arange(L, device=device)
    step = (own + 1 - c["window"]).clamp(min=0) // LEAVE
    steps = int(step[-1]) + 1
    ends = (torch.arange(steps, device=device) * LEAVE).repeat(B * G)[:, None]
    listed = (torch.rand(B * G * steps, m, device=device) * ends).int()
    first = torch.arange(B * G, device=device).view(B, G, 1) * steps
    which = torch.where(step > 0, first + step, -1)
    low = (step * LEAVE).expand(B, -1)
    return dict(q=q, k=k, v=v, low=low.int(), high=(own + 1).expand(B, -1).int(), which=which.int(), listed=listed)


def _pairs(c: Case) -> int:
    """That one head of one row has."""
    own = torch.arange(c["L"])
    step = (own + 1 - c["window"]).clamp(min=0) // LEAVE
    return int((own + 1 - step * LEAVE + (step > 0) * c["listed"]).sum())


def flops(c: Case, backward: bool) -> float:
    return 4 * c["B"] * c["H"] * c["P"] * _pairs(c) * (3.5 if backward else 1)


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    token = (2 * c["H"] + 2 * c["G"]) * c["P"] * itemsize
    return c["B"] * c["L"] * token * (3.25 if backward else 1)


def _gathered(c: Case) -> Peer:
    """Chunks of queries with their keys in a row, and a mask; where they stand is prepared."""

    def prepare(inputs: Inputs) -> Inputs:
        low, which, listed = (inputs[n].long() for n in ("low", "which", "listed"))
        B, G, L = which.shape
        place = torch.arange(L, device=low.device).view(-1, LEAVE)  # (n, 64)
        span = c["window"] + 2 * LEAVE
        near = place[:, :1] + LEAVE - span + torch.arange(span, device=low.device)  # (n, span)
        of = low.view(B, 1, -1, LEAVE, 1)
        seen = (near[:, None] >= of) & (near[:, None] <= place[..., None])  # (B, 1, n, 64, span)
        which = which.view(B, G, -1, LEAVE)
        ends = torch.stack((which[..., 0], which[..., -1]), -1)  # at most two lists a chunk
        lists = listed[ends.clamp(min=0)]  # (B, G, n, 2, m)
        reads = (which[..., None] == ends[..., None, :]) & (which >= 0)[..., None]
        reads[..., 1] &= (ends[..., 0] != ends[..., 1])[..., None]
        reads = reads[..., None].expand(*reads.shape, lists.shape[-1]).flatten(4)
        keys = torch.cat((near.clamp(min=0).expand(B, G, -1, -1), lists.flatten(3)), -1)
        mask = torch.cat((seen.expand(-1, G, -1, -1, -1), reads), -1)
        return {n: inputs[n] for n in "qkv"} | dict(keys=keys, mask=mask)

    def run(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        B, L, H, P = q.shape
        G, chunks = k.shape[2], L // LEAVE
        rows, groups = (
            torch.arange(n, device=q.device).view(shape) for n, shape in ((B, (-1, 1, 1, 1)), (G, (-1, 1, 1)))
        )
        q = q.view(B, chunks, LEAVE, G, H // G, P).permute(0, 3, 1, 4, 2, 5).flatten(0, 2)
        k, v = (t[rows, keys, groups].flatten(0, 2)[:, None] for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 2)[:, None], enable_gqa=True)
        return y.view(B, G, chunks, H // G, LEAVE, P).permute(0, 2, 4, 1, 3, 5).reshape(B, L, H, P)

    return Peer(run, prepare)


def _values(**inputs: Any) -> Tensor:
    return linmu_ops.near_attention(**inputs)[0]


BENCH = Bench(
    "near_attention", CASES, make, flops, num_bytes,
    {"gathered chunks, SDPA": _gathered, "gathered chunks, SDPA, compiled": compiled(_gathered)},
    differentiable=("q", "k", "v"), call=_values,
)  # fmt: skip
