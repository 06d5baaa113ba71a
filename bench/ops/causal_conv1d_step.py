"""Cases, costs and peers of `causal_conv1d_step`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Bench, Case, Inputs, Peer, case, compiled, mamba2, need

CASES = {
    "tiny": case(B=1, D=64, K=4),
    "batch 1": case(quick=True, B=1, D=3584, K=4),
    "batch 16": case(quick=True, B=16, D=3584, K=4),
}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    B, D, K = c["B"], c["D"], c["K"]
    return dict(
        state=torch.randn(B, K - 1, D, device=device).to(dtype), x=torch.randn(B, D, device=device).to(dtype),
        weight=torch.randn(D, K, device=device) * K**-0.5, bias=torch.randn(D, device=device), activation="silu",
    )  # fmt: skip


def flops(c: Case, backward: bool) -> float:
    return c["B"] * c["D"] * (2 * c["K"] + 4)


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    return c["B"] * c["D"] * itemsize * 2 * c["K"] + 4 * c["D"] * (c["K"] + 1)


def _state_last(inputs: Inputs) -> Inputs:
    return inputs | dict(state=inputs["state"].transpose(1, 2).contiguous(), x=inputs["x"][:, :, None])


def _expression(c: Case) -> Peer:
    def run(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        line = torch.cat([state, x[:, None]], dim=1)
        state.copy_(line[:, 1:])
        return F.silu((line.float() * weight.t()).sum(1) + bias).to(x.dtype)

    return Peer(run)


def _transformers(c: Case) -> Peer:
    update = mamba2().causal_conv1d_update

    def run(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        return update(x, state, weight, bias, activation)

    return Peer(run, _state_last, lambda y: y[..., 0])


def _causal_conv1d(c: Case) -> Peer:
    update = need("causal_conv1d", "cuda").causal_conv1d_update

    def run(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        return update(x, state, weight, bias, activation)

    return Peer(run, _state_last, lambda y: y[..., 0])


BENCH = Bench(
    "causal_conv1d_step", CASES, make, flops, num_bytes,
    {
        "PyTorch expression": _expression,
        "PyTorch expression, compiled": compiled(_expression),
        "transformers": _transformers,
        "causal-conv1d": _causal_conv1d,
    },
    in_place=("state",),
    products=False,
)  # fmt: skip
