"""Cases, costs and peers of `gated_delta_scan`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.onnx_runtime import linear_attention
from bench.peers import Bench, Case, Inputs, Missing, Peer, Sizes, case, compiled, need
from linmu_ops import gated_delta_scan
from linmu_ops._testing import run_op

HEADS: Sizes = dict(B=1, H=16, Gq=16, Gk=16, K=128, V=128)
GROUPED: Sizes = dict(B=1, H=32, Gq=16, Gk=16, K=128, V=128)  # Qwen3-Next: 32 heads of values, 16 of queries and keys
CASES = {
    "tiny": case(B=1, L=9, H=4, Gq=2, Gk=2, K=8, V=8),
    "short": case(L=64, **HEADS),
    "forward": case(L=4096, quick=True, backward=True, dtypes=("float32", "bfloat16"), **HEADS),
    "both": case(L=4096, direction="both", quick=True, backward=True, **HEADS),
    "qwen3-next": case(L=4096, dtypes=("float32", "bfloat16"), **GROUPED),
} | {f"L={length}": case(L=length, **HEADS) for length in (1024, 16384)}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    B, L, H = c["B"], c["L"], c["H"]
    r = partial(torch.randn, device=device)
    inputs: Inputs = dict(
        q=r(B, L, c["Gq"], c["K"]).to(dtype), k=r(B, L, c["Gk"], c["K"]).to(dtype), v=r(B, L, H, c["V"]).to(dtype),
        g=-torch.rand(B, L, H, device=device) * 0.1, beta=torch.rand(B, L, H, device=device),
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    if c.get("direction") == "both":
        inputs |= dict(
            direction="both", reverse_g=-torch.rand(B, L, H, device=device) * 0.1,
            reverse_beta=torch.rand(B, L, H, device=device), gate=torch.rand(B, L, H, device=device),
        )  # fmt: skip
    return inputs


def flops(c: Case, backward: bool) -> float:
    """k S, k (outer) what is written, q S, per direction; a chunked kernel does more."""
    directions = 2 if c.get("direction") == "both" else 1
    return 6 * c["B"] * c["L"] * c["H"] * c["K"] * c["V"] * directions * (3 if backward else 1)


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    tokens = c["B"] * c["L"]
    qk, v = (c["Gq"] + c["Gk"]) * c["K"], c["H"] * c["V"]
    steps = c["H"] * (5 if c.get("direction") == "both" else 2)
    forward = tokens * ((qk + 2 * v) * itemsize + 4 * steps)
    return forward + tokens * ((2 * qk + 3 * v) * itemsize + 8 * steps) if backward else forward


def _both(scan: Any) -> Any:
    """Both directions out of a forward scan: flip, scan again, flip, add."""

    def run(q, k, v, g, beta, direction="forward", reverse_g=None, reverse_beta=None, gate=None, **options):  # type: ignore[no-untyped-def]
        y = scan(q, k, v, g, beta, **options)
        if direction == "forward":
            return y
        flipped = (t.flip(1) for t in (q, k, v, reverse_g, reverse_beta))
        w = gate[..., None].to(y.dtype)
        return w * y + (1 - w) * scan(*flipped, **options).flip(1)

    return run


def _transformers(c: Case) -> Peer:
    rule = need("transformers.models.qwen3_next.modeling_qwen3_next").torch_chunk_gated_delta_rule

    def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Tensor:
        y: Tensor = rule(q, k, v, g, beta, **options)[0]
        return y

    return Peer(_both(forward))


def _flip_twice(c: Case) -> Peer:
    if c.get("direction") != "both":
        raise Missing("one direction needs no flip")
    return Peer(_both(gated_delta_scan))


def _onnx_runtime(c: Case) -> Peer:
    scan = linear_attention("gated_delta", c["H"])

    def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Tensor:
        q, k = (F.normalize(t, dim=-1).repeat_interleave(c["H"] // t.shape[2], dim=2) for t in (q, k))
        return scan(q * c["K"] ** -0.5, k, v, g, beta)

    return Peer(_both(forward))


def _fla(c: Case) -> Peer:
    rule = need("fla.ops.gated_delta_rule", "cuda").chunk_gated_delta_rule

    def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Tensor:
        y: Tensor = rule(q, k, v, g, beta, **options)[0]
        return y

    return Peer(_both(forward))


BENCH = Bench(
    "gated_delta_scan", CASES, make, flops, num_bytes,
    {
        "transformers, chunked": _transformers,
        "transformers, chunked, compiled": compiled(_transformers),
        "forward scan, flipped twice": _flip_twice,
        "ONNX Runtime": _onnx_runtime,
        "fla": _fla,
    },
    differentiable=("q", "k", "v", "g", "beta", "reverse_g", "reverse_beta", "gate"),
    call=partial(run_op, "gated_delta_scan"),
)  # fmt: skip
