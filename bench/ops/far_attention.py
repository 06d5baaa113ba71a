"""Cases, costs and peers of `far_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import linmu_ops
from bench.peers import Bench, Case, Inputs, Peer, Sizes, case

LEAVE = 64  # tokens that leave at a time, as in ExactMMATE
NEAR: Sizes = dict(near=452)  # tokens before the first that reads: a window, sinks and kept ones
CASES = {
    "tiny": case(B=2, H=4, G=2, P=16, N=16, L=320, near=130),
    "0.5b": case(quick=True, B=1, H=14, G=2, P=64, N=64, L=4096, dtypes=("float32", "bfloat16"), **NEAR),
    "7b": case(B=1, H=28, G=4, P=128, N=128, L=4096, dtypes=("float32", "bfloat16"), **NEAR),
}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    """A row of text, of which 64 tokens enter at a time, once as many have come as are near or kept."""
    B, H, G, P, N, L = c["B"], c["H"], c["G"], c["P"], c["N"], c["L"]
    own = torch.arange(L, device=device)
    step = (own - c["near"]).clamp(min=0) // LEAVE + 1

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    return dict(
        y=r(B, L, H, P).to(dtype), lse=r(B, L, H), rest=r(B, L, H), q=r(B, L, H, P).to(dtype),
        k=r(B, L, G, P).to(dtype), v=r(B, L, G, P).to(dtype), steps=torch.rand(B, L, G, H // G, device=device),
        entered=torch.where(own < L - c["near"], own // LEAVE, -1).int().expand(B, G, L).contiguous(),
        when=torch.where(own < c["near"], -1, step).int().expand(B, L).contiguous(), b_map=r(G, P, N),
        c_map=r(H, P, N), scale=1 + torch.rand(H, device=device), rates=0.01 * torch.rand(H, device=device),
        z_gate=r(B, L, H * P).to(dtype), last=torch.full((B,), L // LEAVE, dtype=torch.int32, device=device),
    )  # fmt: skip


def flops(c: Case, backward: bool) -> float:
    read = entered = c["L"] - c["near"]
    products = (read + entered) * c["H"] * (c["P"] + 1)
    return 2 * c["B"] * c["N"] * (products + (read * c["H"] + entered * c["G"]) * c["P"])


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    token = (4 * c["H"] + 2 * c["G"]) * c["P"] * itemsize + 4 * 3 * c["H"]
    return c["B"] * c["L"] * token


def _scan(c: Case) -> Peer:
    """`ssd_scan` of what enters and what reads in one row of both, with PyTorch's own calls around it."""
    P, H, G, L = c["P"], c["H"], c["G"], c["L"]

    def prepare(inputs: Inputs) -> Inputs:
        entered, when = inputs["entered"].long(), inputs["when"].long()
        order = torch.where(entered < 0, 2 * L + 4, 2 * entered + 2)
        order = torch.cat((order, (2 * when + 1)[:, None].expand(-1, G, -1)), dim=2).argsort(dim=2, stable=True)
        return {**inputs, "order": order.int().flatten(0, 1)}

    def run(
        y: Tensor, lse: Tensor, rest: Tensor, q: Tensor, k: Tensor, v: Tensor, steps: Tensor, entered: Tensor,
        when: Tensor, b_map: Tensor, c_map: Tensor, scale: Tensor, rates: Tensor, z_gate: Tensor, last: Tensor,
        order: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        def mapped(t: Tensor, weight: Tensor) -> Tensor:
            return torch.bmm(t.float().flatten(0, 1).transpose(0, 1), weight).transpose(0, 1).unflatten(0, t.shape[:2])

        def rows(t: Tensor) -> Tensor:
            return F.pad(t.transpose(1, 2).flatten(0, 1), (0, 0, 0, L))

        never = (entered < 0)[..., None].transpose(1, 2)
        features = mapped(k, b_map).softmax(-1).to(k.dtype).masked_fill(never, 0)
        C = (mapped(q, c_map) * (scale * P**-0.5)[:, None]).softmax(-1).to(q.dtype)
        C = F.pad(C.unflatten(2, (G, H // G)).transpose(1, 2).flatten(0, 1), (0, 0, 0, 0, L, 0))
        size = (steps * rates.view(G, -1)).masked_fill(never, 0)
        far, log_total, state = linmu_ops.ssd_scan(
            rows(v)[:, :, None], rows(size), -size.new_ones(H // G), rows(features)[:, :, None], C, token_order=order,
            normalize=True, return_final_state=True,
        )  # fmt: skip
        far, log_total = (t[:, L:].unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3) for t in (far, log_total))
        log_total = log_total - rates.log()
        far = far * F.silu(z_gate).view_as(far)
        share = (rest + log_total - lse).masked_fill((when < 0)[..., None], -torch.inf).sigmoid()
        return torch.lerp(y, far, share.to(y.dtype)[..., None]), state.unflatten(0, (-1, G)).flatten(1, 2) / rates[
            :, None, None
        ]

    return Peer(run, prepare)


def _mixed(y: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    return y, linmu_ops.far_attention(y, **inputs)


BENCH = Bench(
    "far_attention", CASES, make, flops, num_bytes, {"ssd_scan of both": _scan}, in_place=("y",), call=_mixed
)  # fmt: skip
