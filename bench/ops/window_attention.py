"""Cases, costs and peers of `window_attention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Bench, Case, Inputs, Missing, Peer, Sizes, case, compiled, gpu_case, need

VIDEO: Sizes = dict(grid=(16, 16, 16), window=(16, 4, 4), shift=(0, 2, 2))
IMAGE: Sizes = dict(grid=(1, 64, 64), window=(1, 8, 8), shift=(0, 4, 4))
CASES = {
    "tiny": case(B=1, H=4, G=2, P=16, grid=(2, 4, 4), window=(2, 2, 2), shift=(0, 1, 1)),
    "video": case(B=1, H=16, G=16, P=64, backward=True, **VIDEO),
    "video, not shifted": case(B=1, H=16, G=16, P=64, **(VIDEO | dict(shift=(0, 0, 0)))),
    "video, gqa": case(quick=True, B=1, H=28, G=4, P=128, dtypes=("float32", "bfloat16"), **VIDEO),
    "7b": gpu_case(
        ">= 3x roll + partition + SDPA, <= 0.4 ms", backward=True, B=1, H=28, G=4, P=128,
        **(VIDEO | dict(grid=(32, 32, 32), shift=(8, 2, 2))),
    ),
    "image": case(B=1, H=16, G=16, P=64, quick=True, backward=True, **IMAGE),
} | {
    f"swin, {w}x{w}": gpu_case(
        f">= 5x compiled PyTorch{published}", backward=True, B=16, H=6, G=6, P=32, grid=(1, 8 * w, 8 * w),
        window=(1, w, w), shift=(0, w // 2, w // 2),
    )
    for w, published in ((7, ""), (8, ", > 13.7 TFLOP/s"), (12, ", > 31.5 TFLOP/s"))
}  # fmt: skip


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


def _rolled(c: Case, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Peer:
    """`attend` takes (windows, heads, tokens, P)."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
    ) -> Tensor:
        B = q.shape[0]

        def rolled(t: Tensor, sign: int) -> Tensor:
            if not any(shift):
                return t
            return t.reshape(B, *grid, *t.shape[2:]).roll([sign * s for s in shift], (1, 2, 3)).reshape(t.shape)

        q, k, v = (_partition(rolled(t, -1), grid, window) for t in (q, k, v))
        return rolled(_reverse(attend(q, k, v), grid, window, B), 1)

    return Peer(run)


def _roll_partition_sdpa(c: Case) -> Peer:
    return _rolled(c, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=c["H"] != c["G"]))


def _roll_partition_flash(c: Case) -> Peer:
    attend = need("flash_attn", "cuda").flash_attn_func
    return _rolled(c, lambda q, k, v: attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2))


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
        "roll + partition + flash-attn": _roll_partition_flash,
        "FlexAttention": _flex_attention,
        "NATTEN": _natten,
    },
    differentiable=("q", "k", "v"),
)  # fmt: skip
