"""The Triton kernels of `ssd_scan`, interpreted on the CPU, against the reference: forward and every gradient."""

from __future__ import annotations

import math

import pytest
import torch

import linmu_ops
from linmu_ops._testing import check_against_reference, run_op

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WRT = ("x", "dt", "A", "B", "C", "D", "dt_bias", "reverse_dt", "reverse_dt_bias", "reverse_A", "reverse_B",
       "reverse_C", "gate", "initial_state")  # fmt: skip


def make_inputs(B, L, H, Gx, Gb, Gc, P, N, dtype=torch.float32, options=()):
    g = torch.Generator().manual_seed(7)
    randn = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    index = lambda n: torch.randint(0, 3, (B, n), generator=g).sort(1).values.int()  # noqa: E731
    i = dict(
        x=randn(B, L, Gx, P).to(dtype), dt=randn(B, L, H), A=-torch.rand(H, generator=g) * 0.5,
        B=(randn(B, L, Gb, N) / N**0.5).to(dtype), C=randn(B, L, Gc, N).to(dtype), dt_softplus=True,
    )  # fmt: skip
    extra = dict(
        D=randn(H), dt_bias=randn(H), reverse_dt=randn(B, L, H), reverse_dt_bias=randn(H),
        reverse_A=-torch.rand(H, generator=g), reverse_B=(randn(B, L, Gb, N) / N**0.5).to(dtype),
        reverse_C=randn(B, L, Gc, N).to(dtype),
        gate=torch.rand(B, L, H, generator=g), gate_h=torch.rand(H, generator=g),
        reverse_mask=torch.rand(B, L, generator=g) > 0.4, reverse_seq_idx=index(L), seq_idx=index(L),
        token_order=torch.stack([torch.randperm(L, generator=g) for _ in range(B)] or [torch.zeros(L)]).int()[:B],
        initial_state=randn(B, H, P, N), normalize=True,
    )  # fmt: skip
    for o in options:
        i["gate" if o == "gate_h" else o] = extra[o]
    if "normalize" in options:  # no weight is below 0
        i |= {k: i[k].abs() for k in ("B", "C", "D", "reverse_B", "reverse_C") if k in i}
        if "initial_state" in i:
            i["initial_state"] = torch.cat((i["initial_state"], torch.rand(B, H, 1, N, generator=g)), 2)
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in i.items()}


def by(impl, direction, final):
    def f(**kw):
        with linmu_ops.use_impl(f"ssd_scan:{impl}"):
            out = run_op("ssd_scan", **kw, direction=direction, return_final_state=final)
        if not kw.get("normalize"):
            return out
        y, log_mass, *state = out
        return y, log_mass.masked_fill(log_mass == -math.inf, 0.0), *state

    return f


ALL_REVERSE = ("reverse_dt", "reverse_dt_bias", "reverse_A", "reverse_B", "reverse_C")
CASES = {
    "forward": ("forward", (2, 70, 4, 2, 1, 4, 8, 16), ()),
    "forward-all": ("forward", (1, 70, 2, 2, 1, 1, 5, 7), ("D", "dt_bias", "seq_idx", "token_order", "initial_state")),
    "reverse": ("reverse", (1, 70, 2, 1, 1, 2, 8, 8), ("initial_state", "reverse_mask", "seq_idx")),
    "reverse-own": ("reverse", (1, 40, 2, 1, 1, 2, 8, 8), ("reverse_B", "reverse_dt", "reverse_A")),
    "reverse-own-c": ("reverse", (1, 40, 2, 1, 1, 2, 8, 8), ("reverse_C", "reverse_dt_bias", "dt_bias")),
    "both-plain": ("both", (1, 33, 2, 1, 1, 2, 8, 8), ()),
    "both-model": (
        "both",
        (2, 130, 4, 2, 2, 4, 16, 16),
        ("reverse_dt", "reverse_A", "gate_h", "reverse_mask", "reverse_seq_idx", "token_order", "D"),
    ),
    "both-separate": ("both", (1, 65, 2, 1, 1, 2, 8, 8), (*ALL_REVERSE, "dt_bias", "gate", "seq_idx", "initial_state")),
    "both-half-separate": ("both", (1, 20, 2, 1, 2, 1, 8, 8), ("reverse_B", "gate")),
    "mean-forward": ("forward", (1, 70, 4, 2, 1, 4, 8, 16), ("normalize",)),
    "mean-reverse": (
        "reverse",
        (1, 70, 2, 1, 1, 2, 8, 8),
        ("normalize", "D", "initial_state", "reverse_mask", "seq_idx"),
    ),
    "mean-both": (
        "both",
        (1, 65, 4, 2, 2, 4, 5, 7),
        ("normalize", *ALL_REVERSE, "D", "gate", "reverse_mask", "seq_idx", "token_order", "initial_state"),
    ),
    "one": ("both", (1, 1, 1, 1, 1, 1, 1, 1), ("gate", "initial_state")),
    "empty": ("both", (1, 0, 2, 1, 1, 1, 4, 4), ("initial_state",)),
    "no-batch": ("forward", (0, 5, 2, 1, 1, 1, 4, 4), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name):
    direction, shape, options = CASES[name]
    inputs = make_inputs(*shape, options=options)
    wrt = [k for k in WRT if k in inputs]
    final = direction != "both" or "initial_state" in options
    check_against_reference(by("triton", direction, final), by("reference", direction, final), inputs, wrt)


HALF = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mean", [(), ("normalize",)], ids=["", "mean"])
def test_half(dtype, mean):
    options = ("gate_h", "reverse_mask", "reverse_dt", *mean)
    inputs = make_inputs(1, 70, 2, 1, 1, 2, 16, 16, dtype=dtype, options=options)
    check_against_reference(by("triton", "both", False), by("reference", "both", False), inputs)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_state_of_half_inputs_is_a_float32_sum(dtype):
    inputs = make_inputs(1, 70, 2, 1, 1, 2, 16, 16, dtype=dtype)
    check_against_reference(by("triton", "forward", True), by("reference", "forward", True), inputs)
