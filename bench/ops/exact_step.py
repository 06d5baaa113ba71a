"""Cases, costs and peers of `exact_step`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Bench, Case, Inputs, Peer, Sizes, case, compiled

DEFAULT: Sizes = dict(sinks=4, window=256, kept=128)  # as ExactConfig has them
SMALL: Sizes = dict(H=14, G=2, P=64, N=64, **DEFAULT)  # Qwen2.5-0.5B
LARGE: Sizes = dict(H=28, G=4, P=128, N=128, **DEFAULT)  # Qwen2.5-7B
CASES = {
    "tiny": case(B=2, H=4, G=2, P=16, N=16, sinks=2, window=8, kept=4),
    "0.5b, batch 1": case(quick=True, B=1, dtypes=("float32", "bfloat16"), **SMALL),
    "0.5b, batch 8": case(quick=True, B=8, dtypes=("float32", "bfloat16"), **SMALL),
    "7b, batch 1": case(B=1, dtypes=("float32", "bfloat16"), **LARGE),
    "7b, batch 8": case(B=8, dtypes=("float32", "bfloat16"), **LARGE),
}


def _places(c: Case) -> int:
    return int(c["sinks"] + c["window"] + min(c["window"], 64) + c["kept"])


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    B, H, G, P, N, n = c["B"], c["H"], c["G"], c["P"], c["N"], _places(c)
    r = partial(torch.randn, device=device)
    return dict(
        keys=r(B, G, n, P).to(dtype), values=r(B, G, n, P).to(dtype),
        steps=torch.rand(B, G, n - c["sinks"], H // G, device=device),
        seen=torch.full((B,), 100 * n, device=device), ssm=torch.rand(B, H, P + 1, N, device=device),
        q=r(B, H, P).to(dtype), k=r(B, G, P).to(dtype), v=r(B, G, P).to(dtype), dt=r(B, H), dt_bias=r(H), rest=r(B, H),
        c_map=r(H, P, N).to(dtype), scale=torch.rand(H, device=device), window=c["window"],
        sinks=torch.ones(B, c["sinks"], dtype=torch.bool, device=device), z_gate=r(B, H * P).to(dtype),
    )  # fmt: skip


def flops(c: Case, backward: bool) -> float:
    return 2 * c["B"] * c["H"] * (2 * c["P"] * _places(c) + (2 * c["P"] + 1) * c["N"])


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    row = 2 * itemsize * c["G"] * _places(c) * c["P"] + 4 * c["H"] * (c["P"] + 1) * c["N"]
    return c["B"] * row + itemsize * c["H"] * c["P"] * c["N"]


def _expression(c: Case) -> Peer:
    """Of rows with as many tokens each, and something far."""

    def run(
        keys: Tensor, values: Tensor, steps: Tensor, seen: Tensor, ssm: Tensor, q: Tensor, k: Tensor, v: Tensor,
        dt: Tensor, dt_bias: Tensor, rest: Tensor, c_map: Tensor, scale: Tensor, sinks: Tensor, z_gate: Tensor,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        first, window, leave, groups = c["sinks"], c["window"], min(c["window"], 64), c["G"]
        newest = (seen % (window + leave))[:, None, None, None]
        for held, new in ((keys, k), (values, v)):
            held.scatter_(2, (first + newest).expand(-1, groups, 1, c["P"]), new[:, :, None])
        sizes = F.softplus(dt + dt_bias).unflatten(1, (groups, 1, -1))
        steps.scatter_(2, newest.expand(sizes.shape), sizes)
        over = (seen + 1 - window) // leave
        number = torch.arange(window + leave, device=q.device)
        index = seen[:, None] - (seen[:, None] - number) % (window + leave)
        near = index >= (over * leave)[:, None]
        mask = torch.cat((sinks, near, sinks.new_ones(c["B"], c["kept"])), dim=1)[:, None, None]
        scores = (q.float().unflatten(1, (groups, -1)) @ keys.float().mT) * c["P"] ** -0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        lse = scores.logsumexp(-1)
        exact = ((scores - lse[..., None]).exp() @ values.float()).flatten(1, 2)
        features = torch.bmm(q.float().transpose(0, 1), c_map.float()).transpose(0, 1)
        features = (features * (scale * c["P"] ** -0.5)[:, None]).softmax(-1)
        far, total = (ssm @ features[..., None])[..., 0].split([c["P"], 1], dim=2)
        far = far / total * F.silu(z_gate.float()).view_as(exact)
        share = (rest + total[..., 0].log() - lse.flatten(1)).sigmoid()
        y = torch.lerp(exact, far, share[..., None])
        due = (seen + 2 - window) // leave > over
        seen += 1
        return y.flatten(1).to(q.dtype), due

    return Peer(run)


BENCH = Bench(
    "exact_step", CASES, make, flops, num_bytes,
    {"PyTorch expression": _expression, "PyTorch expression, compiled": compiled(_expression)},
    in_place=("keys", "values", "steps", "seen", "sinks"),
    products=False,
)  # fmt: skip
