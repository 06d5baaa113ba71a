"""Cases, costs and peers of `gated_delta_step`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.peers import Bench, Case, Inputs, Peer, Sizes, case, compiled, need

HEADS: Sizes = dict(H=32, Gq=16, Gk=16, K=128, V=128)  # Qwen3-Next
CASES = {
    "tiny": case(B=1, H=4, Gq=2, Gk=2, K=16, V=16),
    "batch 1": case(quick=True, B=1, dtypes=("float32", "bfloat16"), **HEADS),
    "batch 16": case(quick=True, B=16, dtypes=("float32", "bfloat16"), **HEADS),
}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    B, H = c["B"], c["H"]
    r = partial(torch.randn, device=device)
    return dict(
        state=r(B, H, c["K"], c["V"]), q=r(B, c["Gq"], c["K"]).to(dtype), k=r(B, c["Gk"], c["K"]).to(dtype),
        v=r(B, H, c["V"]).to(dtype), g=-torch.rand(B, H, device=device), beta=torch.rand(B, H, device=device),
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def flops(c: Case, backward: bool) -> float:
    return 6 * c["B"] * c["H"] * c["K"] * c["V"]


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    state = 2 * 4 * c["H"] * c["K"] * c["V"]
    return c["B"] * (state + itemsize * ((c["Gq"] + c["Gk"]) * c["K"] + 2 * c["H"] * c["V"]))


def _expression(c: Case) -> Peer:
    def run(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Tensor:
        q_, k_ = (
            torch.nn.functional.normalize(t.float(), dim=-1, eps=1e-3).repeat_interleave(c["H"] // t.shape[1], dim=1)
            for t in (q, k)
        )
        state.mul_(g.exp()[..., None, None])
        written = beta[..., None] * (v.float() - torch.matmul(k_[..., None, :], state)[..., 0, :])
        state.addcmul_(k_[..., None], written[..., None, :])
        return c["K"] ** -0.5 * torch.matmul(q_[..., None, :], state)[..., 0, :].to(q.dtype)

    return Peer(run)


def _transformers(c: Case) -> Peer:
    rule = need("transformers.models.qwen3_next.modeling_qwen3_next").torch_recurrent_gated_delta_rule

    def run(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Tensor:
        tokens = (t[:, None] for t in (q, k, v, g, beta))
        y, last = rule(*tokens, initial_state=state, output_final_state=True, **options)
        state.copy_(last)
        token: Tensor = y[:, 0]
        return token

    return Peer(run)


BENCH = Bench(
    "gated_delta_step", CASES, make, flops, num_bytes,
    {
        "PyTorch expression": _expression,
        "PyTorch expression, compiled": compiled(_expression),
        "transformers": _transformers,
    },
    in_place=("state",),
    products=False,
)  # fmt: skip
