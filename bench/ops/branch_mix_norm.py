"""Cases, costs and peers of `branch_mix_norm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Bench, Case, Inputs, Peer, case, compiled

CASES = {
    "tiny": case(B=1, L=64, D=64, norm="layer"),
    "short": case(B=1, L=64, D=3584, norm="rms"),
    "layer": case(B=1, L=4096, D=3584, norm="layer", quick=True, backward=True, dtypes=("float32", "bfloat16")),
    "rms": case(B=1, L=4096, D=3584, norm="rms", backward=True),
}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    B, L, D = c["B"], c["L"], c["D"]
    inputs = dict(
        a=torch.randn(B, L, D, device=device).to(dtype), b=torch.randn(B, L, D, device=device).to(dtype),
        mix=torch.rand(D, device=device), mask=torch.rand(B, L, device=device) < 0.9,
        weight=torch.randn(D, device=device), norm=c["norm"],
    )  # fmt: skip
    return inputs | dict(bias=torch.randn(D, device=device)) if c["norm"] == "layer" else inputs


def flops(c: Case, backward: bool) -> float:
    return c["B"] * c["L"] * c["D"] * (30 if backward else 10)


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    return c["B"] * c["L"] * c["D"] * itemsize * (8 if backward else 3)  # a, b, out; then a, b, dy, da, db


def _expression(c: Case) -> Peer:
    def run(
        a: Tensor, b: Tensor, mix: Tensor, mask: Tensor, weight: Tensor, norm: str, bias: Tensor | None = None
    ) -> Tensor:
        mixed = torch.where(mask[..., None], torch.lerp(b.float(), a.float(), mix), a.float())
        shape = (a.shape[-1],)
        if norm == "layer":
            return F.layer_norm(mixed, shape, weight, bias, 1e-6).to(a.dtype)
        return F.rms_norm(mixed, shape, weight, 1e-6).to(a.dtype)

    return Peer(run)


BENCH = Bench(
    "branch_mix_norm", CASES, make, flops, num_bytes,
    {"PyTorch expression": _expression, "PyTorch expression, compiled": compiled(_expression)},
    differentiable=("a", "b", "mix", "weight", "bias"),
    products=False,
)  # fmt: skip
