"""Cases, costs and peers of `window_attention`."""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Bench, Case, Inputs, Missing, Peer, case, compiled, need

VIDEO = dict(grid=(16, 16, 16), window=(16, 4, 4), shift=(0, 2, 2))
IMAGE = dict(grid=(1, 64, 64), window=(1, 8, 8), shift=(0, 4, 4))
CASES = {
    "tiny": case(B=1, H=4, G=2, P=16, grid=(2, 4, 4), window=(2, 2, 2), shift=(0, 1, 1)),
    "video": case(B=1, H=16, G=16, P=64, backward=True, **VIDEO),
    "video, not shifted": case(B=1, H=16, G=16, P=64, **(VIDEO | dict(shift=(0, 0, 0)))),
    "video, gqa": case(quick=True, B=1, H=28, G=4, P=128, dtypes=("float32", "bfloat16"), **VIDEO),
    "image": case(B=1, H=16, G=16, P=64, quick=True, backward=True, **IMAGE),
}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    L = math.prod(c["grid"])
    heads = (c["H"], c["G"], c["G"])
    q, k, v = (torch.randn(c["B"], L, h, c["P"], device=device).to(dtype) for h in heads)
    return dict(q=q, k=k, v=v, grid=c["grid"], window=c["window"], shift=c["shift"])


def _window_size(c: Case) -> int:
    return math.prod(min(s, w) for s, w in zip(c["grid"], c["window"], strict=True))


def flops(c: Case, backward: bool) -> float:
    pairs = c["B"] * math.prod(c["grid"]) * _window_size(c)  # the sizes of every case divide
    return 4 * c["H"] * c["P"] * pairs * (3.5 if backward else 1)


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    token = (2 * c["H"] + 2 * c["G"]) * c["P"] * itemsize
    return c["B"] * math.prod(c["grid"]) * token * (3.25 if backward else 1)


def _partition(t: Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """(B, L, H, P) -> (B * windows, H, tokens, P)."""
    (T, Y, X), (wt, wy, wx) = grid, window
    B, _, H, P = t.shape
    t = t.view(B, T // wt, wt, Y // wy, wy, X // wx, wx, H, P)
    return t.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).reshape(-1, H, wt * wy * wx, P)


def _reverse(t: Tensor, grid: tuple[int, ...], window: tuple[int, ...], batch: int) -> Tensor:
    (T, Y, X), (wt, wy, wx) = grid, window
    _, H, _, P = t.shape
    t = t.view(batch, T // wt, Y // wy, X // wx, H, wt, wy, wx, P)
    return t.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(batch, T * Y * X, H, P)


def _roll_partition_sdpa(c: Case) -> Peer:
    def run(
        q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
    ) -> Tensor:
        B = q.shape[0]

        def rolled(t: Tensor, sign: int) -> Tensor:
            if not any(shift):
                return t
            return t.reshape(B, *grid, *t.shape[2:]).roll([sign * s for s in shift], (1, 2, 3)).reshape(t.shape)

        parts = [_partition(rolled(t, -1), grid, window) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*parts, enable_gqa=c["H"] != c["G"])
        return rolled(_reverse(out, grid, window, B), 1)

    return Peer(run)


def _window_of(c: Case) -> Tensor:
    """The window of each token, (L,)."""
    number = []
    for at in product(*(range(s) for s in c["grid"])):
        index = 0
        for x, s, w, h in zip(at, c["grid"], c["window"], c["shift"], strict=True):
            index = index * s + (x - h) % s // w
        number.append(index)
    return torch.tensor(number)


def _flex_attention(c: Case) -> Peer:
    flex = need("torch.nn.attention.flex_attention")
    attend = torch.compile(flex.flex_attention, dynamic=False)

    def prepare(inputs: Inputs) -> Inputs:
        q = inputs["q"]
        window_of = _window_of(c).to(q.device)

        def same_window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return window_of[i] == window_of[j]

        L = q.shape[1]
        mask = flex.create_block_mask(same_window, None, None, L, L, device=str(q.device))
        heads_first = {n: inputs[n].transpose(1, 2).contiguous() for n in ("q", "k", "v")}
        return heads_first | dict(mask=mask)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
        if q.device.type == "cpu" and q.requires_grad:
            raise Missing("FlexAttention has no backward on CPU")
        return attend(q, k, v, block_mask=mask, enable_gqa=c["H"] != c["G"])

    return Peer(run, prepare, lambda out: out.transpose(1, 2), lambda name, grad: grad.transpose(1, 2))


def _natten(c: Case) -> Peer:
    if any(c["shift"]) or c["G"] != c["H"]:
        raise Missing("NATTEN has blocked windows, but neither shifts them nor shares keys between heads")
    natten = need("natten", "cuda")

    def run(
        q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
    ) -> Tensor:
        q, k, v = (t.view(t.shape[0], *grid, *t.shape[2:]) for t in (q, k, v))
        return natten.na3d(q, k, v, kernel_size=window, stride=window).flatten(1, 3)

    return Peer(run)


BENCH = Bench(
    "window_attention", CASES, make, flops, num_bytes,
    {
        "roll + partition + SDPA": _roll_partition_sdpa,
        "roll + partition + SDPA, compiled": compiled(_roll_partition_sdpa),
        "FlexAttention": _flex_attention,
        "NATTEN": _natten,
    },
    differentiable=("q", "k", "v"),
)  # fmt: skip
