"""Cases, costs and peers of `causal_conv1d`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Bench, Case, Inputs, Peer, case, compiled, mamba2, need

CASES = {
    "tiny": case(B=1, L=64, D=64, K=4),
    "short": case(B=1, L=64, D=3584, K=4),
    "layer": case(B=1, L=4096, D=3584, K=4, quick=True, backward=True, dtypes=("float32", "bfloat16")),
}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    B, L, D, K = c["B"], c["L"], c["D"], c["K"]
    return dict(
        x=torch.randn(B, L, D, device=device).to(dtype), weight=torch.randn(D, K, device=device) * K**-0.5,
        bias=torch.randn(D, device=device), activation="silu",
    )  # fmt: skip


def flops(c: Case, backward: bool) -> float:
    return c["B"] * c["L"] * c["D"] * (2 * c["K"] + 4) * (3 if backward else 1)


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    return c["B"] * c["L"] * c["D"] * itemsize * (5 if backward else 2)  # x, y; then x, dy, dx


def _channels_first(inputs: Inputs) -> Inputs:
    return inputs | dict(x=inputs["x"].transpose(1, 2).contiguous())


def _tokens_first(y: Tensor) -> Tensor:
    return y.transpose(1, 2)


def _gradient(name: str, grad: Tensor) -> Tensor:
    return _tokens_first(grad) if name == "x" else grad


def _shifted_products(c: Case) -> Peer:
    def run(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        K = weight.shape[1]
        padded = F.pad(x.float(), (0, 0, K - 1, 0))
        y = bias + sum(weight[:, k] * padded[:, k : k + x.shape[1]] for k in range(K))
        return F.silu(y).to(x.dtype)

    return Peer(run)


def _transformers(c: Case) -> Peer:
    conv = mamba2().causal_conv1d_fn

    def run(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        return conv(x, weight, bias, activation)

    return Peer(run, _channels_first, _tokens_first, _gradient)


def _conv1d(c: Case) -> Peer:
    """In the dtype of x, as a model in bfloat16 does."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        K, D = weight.shape[1], x.shape[1]
        y = F.conv1d(x, weight[:, None].to(x.dtype), bias.to(x.dtype), padding=K - 1, groups=D)
        return F.silu(y[..., : x.shape[2]])

    return Peer(run, _channels_first, _tokens_first, _gradient)


def _causal_conv1d(c: Case) -> Peer:
    conv = need("causal_conv1d", "cuda").causal_conv1d_fn

    def run(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        return conv(x, weight, bias, activation=activation)

    return Peer(run, _channels_first, _tokens_first, _gradient)


BENCH = Bench(
    "causal_conv1d", CASES, make, flops, num_bytes,
    {
        "conv1d": _conv1d,
        "shifted products": _shifted_products,
        "shifted products, compiled": compiled(_shifted_products),
        "transformers": _transformers,
        "causal-conv1d": _causal_conv1d,
    },
    differentiable=("x", "weight", "bias"),
    products=False,
)  # fmt: skip
