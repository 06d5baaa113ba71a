"""Cases and costs of one whole M-MATE block: projections, scan, window attention, mix and norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.ops import ssd_scan, window_attention
from bench.peers import Bench, Case, Inputs, case, gpu_case
from linmu_ops import MMATE

CASES = {
    "tiny": case(B=1, D=32, H=4, G=2, P=8, grid=(2, 4, 4)),
    "layer": case(quick=True, B=1, D=512, H=8, G=2, P=64, grid=(4, 16, 16)),
    "7b": gpu_case("<= 8 ms forward", backward=True, B=1, D=3584, H=28, G=4, P=128, grid=(32, 32, 32)),
}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    block = MMATE(c["D"], c["H"], c["G"], c["P"], layer_idx=1, qkv_bias=True).to(device, dtype)
    L = math.prod(c["grid"])
    angles = torch.rand(1, L, c["P"] // 2, device=device).mul(2 * math.pi).repeat(1, 1, 2)
    hidden = torch.randn(c["B"], L, c["D"], device=device).to(dtype)
    return dict(block=block, hidden_states=hidden, grid=c["grid"], rotary=(angles.cos(), angles.sin()))


def run(block: MMATE, hidden_states: Tensor, grid: Any, rotary: Any) -> Any:
    return block(hidden_states, grid=grid, position_embeddings=rotary)


def _parts(c: Case) -> tuple[Case, Case, int]:
    """The scan and the window attention within, and the elements of the large weights."""
    L, window = math.prod(c["grid"]), (16, 4, 4)
    scan = case(B=c["B"], L=L, H=c["H"], Gx=c["G"], Gb=c["G"], Gc=c["H"], P=c["P"], N=c["P"], direction="both")
    swin = case(B=c["B"], H=c["H"], G=c["G"], P=c["P"], grid=c["grid"], window=window)
    return scan, swin, 2 * 2 * c["D"] * (c["H"] + c["G"]) * c["P"]


def flops(c: Case, backward: bool) -> float:
    scan, swin, weights = _parts(c)
    tokens = c["B"] * math.prod(c["grid"])
    products = 2 * tokens * weights * (3 if backward else 1)
    return products + ssd_scan.flops(scan, backward) + window_attention.flops(swin, backward)


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    rows = c["B"] * math.prod(c["grid"]) * c["D"]
    return (_parts(c)[2] + 2 * rows) * itemsize * (2 if backward else 1)


BENCH = Bench("mmate", CASES, make, flops, num_bytes, {}, differentiable=("hidden_states",), call=run)
