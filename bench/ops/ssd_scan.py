"""Cases, costs and peers of `ssd_scan`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.onnx_runtime import linear_attention
from bench.peers import Bench, Case, Inputs, Missing, Peer, Sizes, case, compiled, gpu_case, mamba2, need
from linmu_ops import ssd_scan
from linmu_ops._testing import run_op

SMALL: Sizes = dict(B=1, H=16, Gx=16, Gb=1, Gc=1, P=64, N=64)  # Mamba-2: B and C shared by the heads
GQA: Sizes = dict(B=1, H=28, Gx=4, Gb=4, Gc=28, P=128, N=128)  # a converted 28-head, 4-group attention layer
CASES = {
    "tiny": case(B=1, L=9, H=4, Gx=4, Gb=1, Gc=1, P=8, N=8),
    "short": case(L=64, **SMALL),
    "both": case(L=4096, direction="both", quick=True, backward=True, **SMALL),
    "gqa": case(L=4096, dtypes=("float32", "bfloat16"), **GQA),
    "gqa-both": case(L=4096, direction="both", backward=True, dtypes=("float32", "bfloat16"), **GQA),
    "7b-forward": gpu_case("one mamba_ssm scan is what 7b-both is to beat", backward=True, L=32768, **GQA),
    "7b-both": gpu_case(
        ">= 4x mamba_ssm, faster than its one scan of 7b-forward, <= 0.6 ms, <= 1.35x our 7b-forward; backward >= 2x",
        backward=True,
        L=32768,
        direction="both",
        **GQA,
    ),
    "mamba-2": gpu_case(
        ">= 2x mamba_ssm, backward too", backward=True, L=32768, B=4, H=128, Gx=128, Gb=1, Gc=1, P=64, N=128
    ),
} | {
    f"L={length}": case(L=length, quick=length <= 8192, backward=length == 4096, **SMALL)
    for length in (1024, 4096, 8192, 32768, 131072)
}

MEMORY_GB = 4  # a peer that would need more is left out


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    B, L, H = c["B"], c["L"], c["H"]
    r = partial(torch.randn, device=device)
    inputs = dict(
        x=r(B, L, c["Gx"], c["P"]).to(dtype), dt=torch.rand(B, L, H, device=device) * 0.1,
        A=-torch.rand(H, device=device) - 0.1, B=r(B, L, c["Gb"], c["N"]).to(dtype) * c["N"] ** -0.5,
        C=r(B, L, c["Gc"], c["N"]).to(dtype),
    )  # fmt: skip
    if c.get("direction") == "both":
        inputs |= dict(
            direction="both", reverse_dt=torch.rand(B, L, H, device=device) * 0.1,
            reverse_A=-torch.rand(H, device=device) - 0.1, gate=torch.rand(B, L, H, device=device),
        )  # fmt: skip
    return inputs


def flops(c: Case, backward: bool) -> float:
    """The two products with the state, per direction; a chunked kernel does more."""
    directions = 2 if c.get("direction") == "both" else 1
    return 4 * c["B"] * c["L"] * c["H"] * c["P"] * c["N"] * directions * (3 if backward else 1)


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    tokens = c["B"] * c["L"]
    x, bc, y = c["Gx"] * c["P"], (c["Gb"] + c["Gc"]) * c["N"], c["H"] * c["P"]
    steps = c["H"] * (3 if c.get("direction") == "both" else 1)
    forward = tokens * ((x + bc + y) * itemsize + 4 * steps)
    return forward + tokens * ((2 * x + 2 * bc + y) * itemsize + 8 * steps) if backward else forward


def _heads(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], dim=2)


def _both(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Both directions out of a forward scan, as Bi-Mamba does it: flip, scan again, flip, add."""

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, direction: str = "forward",
        reverse_dt: Tensor | None = None, reverse_A: Tensor | None = None, gate: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = scan(x, dt, A, B, C)
        if direction == "forward":
            return y
        assert reverse_dt is not None and reverse_A is not None and gate is not None
        back = scan(x.flip(1), reverse_dt.flip(1), reverse_A, B.flip(1), C.flip(1)).flip(1)
        g = gate[..., None].to(y.dtype)
        return g * y + (1 - g) * back

    return run


def _transformers(c: Case, chunk_size: int) -> Peer:
    scan = mamba2().mamba2_chunk_scan
    # Its two largest temporaries, a few of each: (L, chunk, H), and (L / chunk) squared by H.
    gigabytes = 4 * c["B"] * c["H"] * (4 * c["L"] * chunk_size + 3 * (c["L"] / chunk_size) ** 2) * 1e-9
    if gigabytes > MEMORY_GB:
        raise Missing(f"would need about {gigabytes:.0f} GB")

    def forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        heads = dt.shape[2]
        if B.shape[2] != C.shape[2]:
            B = _heads(B, C.shape[2])
        return scan(_heads(x, heads), dt, A, B, C, chunk_size).to(x.dtype)

    return Peer(_both(forward))


def _flip_twice(c: Case) -> Peer:
    if c.get("direction") != "both":
        raise Missing("one direction needs no flip")

    def forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        y = ssd_scan(x, dt, A, B, C)
        assert isinstance(y, Tensor)
        return y

    return Peer(_both(forward))


def _repeated_heads(c: Case) -> Peer:
    if c["Gx"] == c["Gb"] == c["Gc"] == c["H"]:
        raise Missing("nothing to repeat")

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Any:
        x, B, C = (_heads(t, c["H"]) for t in (x, B, C))
        return run_op("ssd_scan", x=x, dt=dt, A=A, B=B, C=C, **options)

    return Peer(run)


def _mamba_ssm(c: Case) -> Peer:
    scan = need("mamba_ssm.ops.triton.ssd_combined", "cuda").mamba_chunk_scan_combined

    def forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        B = B if B.shape[2] == C.shape[2] else _heads(B, C.shape[2])
        return scan(_heads(x, dt.shape[2]), dt, A, B, C, chunk_size=256)

    return Peer(_both(forward))


def _onnx_runtime(c: Case) -> Peer:
    scan = linear_attention("gated", c["H"])

    def forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        q, k, v = (_heads(t, c["H"]) for t in (C, B, x))
        return scan(q, k, v * dt[..., None], dt * A)

    return Peer(_both(forward))


def _fla(c: Case) -> Peer:
    scan = need("fla.ops.simple_gla", "cuda").chunk_simple_gla

    def forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        heads = dt.shape[2]
        v = (_heads(x, heads) * dt[..., None]).to(x.dtype)
        return scan(_heads(C, heads), _heads(B, heads), v, g=dt * A, scale=1.0)[0]

    return Peer(_both(forward))


BENCH = Bench(
    "ssd_scan", CASES, make, flops, num_bytes,
    {f"transformers, chunk {n}": partial(_transformers, chunk_size=n) for n in (32, 64, 128)}
    | {"transformers, chunk 64, compiled": compiled(partial(_transformers, chunk_size=64))}
    | {"forward scan, flipped twice": _flip_twice, "scan of repeated heads": _repeated_heads}
    | {"ONNX Runtime": _onnx_runtime, "mamba_ssm": _mamba_ssm, "fla simple_gla": _fla},
    differentiable=("x", "dt", "A", "B", "C", "reverse_dt", "reverse_A", "gate"), call=partial(run_op, "ssd_scan"),
)  # fmt: skip
