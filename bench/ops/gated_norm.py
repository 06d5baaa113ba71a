"""Cases, costs and peers of `gated_norm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Bench, Case, Inputs, Peer, case, compiled

CASES = {
    "tiny": case(B=1, L=64, D=64, size=64, before=False),
    "mamba2": case(B=1, L=4096, D=1536, size=1536, before=False, quick=True, backward=True,
                   dtypes=("float32", "bfloat16")),
    "qwen3.5": case(B=1, L=65536, D=128, size=128, before=True, backward=True),
    "one token": case(B=1, L=16, D=128, size=128, before=True),
}  # fmt: skip


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    B, L, D = c["B"], c["L"], c["D"]
    x, z = (torch.randn(B, L, D, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(D, device=device)
    return dict(x=x, z=z, weight=weight, group_size=c["size"], norm_before_gate=c["before"])


def flops(c: Case, backward: bool) -> float:
    return c["B"] * c["L"] * c["D"] * (60 if backward else 20)


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    return c["B"] * c["L"] * c["D"] * itemsize * (8 if backward else 3)  # x, z, out; then x, z, dy, dx, dz


def _expression(c: Case) -> Peer:
    def run(x: Tensor, z: Tensor, weight: Tensor, group_size: int, norm_before_gate: bool) -> Tensor:
        gate, y = F.silu(z.float()), x.float()
        if not norm_before_gate:
            y = y * gate
        y = F.rms_norm(y.unflatten(-1, (-1, group_size)), (group_size,), None, 1e-6).flatten(-2) * weight
        return (y * gate if norm_before_gate else y).to(x.dtype)

    return Peer(run)


BENCH = Bench(
    "gated_norm", CASES, make, flops, num_bytes,
    {"PyTorch expression": _expression, "PyTorch expression, compiled": compiled(_expression)},
    differentiable=("x", "z", "weight"),
    products=False,
)  # fmt: skip
