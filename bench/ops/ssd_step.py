"""Cases, costs and peers of `ssd_step`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.peers import Bench, Case, Inputs, Peer, Sizes, case, compiled, gpu_case, mamba2, need

GQA: Sizes = dict(H=28, Gx=4, Gb=4, Gc=28, P=128, N=128)
CASES = {
    "tiny": case(B=1, H=4, Gx=4, Gb=1, Gc=1, P=16, N=16),
    "batch 1": case(quick=True, B=1, dtypes=("float32", "bfloat16"), **GQA),
    "batch 16": case(quick=True, B=16, dtypes=("float32", "bfloat16"), **GQA),
} | {
    f"7b, batch {b}": gpu_case(">= 70 % of copy; one launch" if b >= 8 else "one launch", B=b, **GQA)
    for b in (1, 2, 4, 8, 16, 32, 64)
}


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    B, H = c["B"], c["H"]
    r = partial(torch.randn, device=device)
    return dict(
        state=r(B, H, c["P"], c["N"]), x=r(B, c["Gx"], c["P"]).to(dtype), dt=torch.rand(B, H, device=device),
        A=-torch.rand(H, device=device) - 0.1, B=r(B, c["Gb"], c["N"]).to(dtype), C=r(B, c["Gc"], c["N"]).to(dtype),
    )  # fmt: skip


def flops(c: Case, backward: bool) -> float:
    return 5 * c["B"] * c["H"] * c["P"] * c["N"]


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    state = 2 * 4 * c["H"] * c["P"] * c["N"]
    tokens = (c["Gx"] + c["H"]) * c["P"] + (c["Gb"] + c["Gc"]) * c["N"]
    return c["B"] * (state + itemsize * tokens)


def _heads(t: Tensor, heads: int) -> Tensor:
    return t.repeat_interleave(heads // t.shape[1], dim=1)


def _expression(c: Case) -> Peer:
    def run(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        x_, B_, C_ = (_heads(t.float(), c["H"]) for t in (x, B, C))
        state.mul_(torch.exp(dt * A)[..., None, None])
        state.addcmul_((dt[..., None] * x_)[..., None], B_[:, :, None])
        return torch.matmul(state, C_[..., None])[..., 0].to(x.dtype)

    return Peer(run)


def _selective(c: Case, update: Callable[..., Tensor]) -> Peer:
    """Of Mamba's general update, which has a step for each channel and a decay for each element of the state."""

    def run(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        wide = dt[..., None].expand(*dt.shape, c["P"]), A[:, None, None].expand(c["H"], c["P"], c["N"])
        B = _heads(B, C.shape[1]) if B.shape[1] != C.shape[1] else B
        return update(state, _heads(x, c["H"]), *wide, B, C)

    return Peer(run)


def _transformers(c: Case) -> Peer:
    return _selective(c, mamba2().mamba2_selective_state_update)


def _mamba_ssm(c: Case) -> Peer:
    return _selective(c, need("mamba_ssm.ops.triton.selective_state_update", "cuda").selective_state_update)


BENCH = Bench(
    "ssd_step", CASES, make, flops, num_bytes,
    {
        "PyTorch expression": _expression,
        "PyTorch expression, compiled": compiled(_expression),
        "transformers": _transformers,
        "mamba_ssm": _mamba_ssm,
    },
    in_place=("state",),
    products=False,
)  # fmt: skip
