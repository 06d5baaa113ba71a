"""Inputs of `ssd_scan` of every kind, and what its reference gives."""

from __future__ import annotations

import functools
import math

import torch

import linmu_ops
from linmu_ops._testing import check_against_reference, run_op
from linmu_ops.ssd_scan import DIFFERENTIABLE
from tests.ops.cases.scans import check_empty, check_strided

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DIRECTIONS = ["forward", "reverse", "both"]
CASES = [  # B, L, H, Gx, Gb, Gc, P, N; chunks are of 32 visits
    (1, 1, 4, 1, 1, 1, 3, 5),
    (2, 31, 4, 4, 1, 1, 5, 7),
    (1, 32, 4, 2, 2, 4, 16, 3),
    (1, 33, 6, 3, 2, 6, 17, 33),
    (1, 70, 2, 1, 1, 2, 64, 48),
    (1, 37, 12, 2, 3, 1, 8, 70),
]
SMALL = (2, 20, 8, 2, 2, 8, 6, 5)
ALL = {"plain": (), "all": ("all",), "mean": ("normalize",), "all-mean": ("all", "normalize")}


scan = functools.partial(run_op, "ssd_scan")


def visible(i):
    return [k for k in DIFFERENTIABLE if k in i]


def make_inputs(case, dtype=torch.float32, direction="both", options=(), seed=0):
    """`options` names the optional arguments to give; "all" gives every one of the direction but "normalize"."""
    g = torch.Generator().manual_seed(seed)
    B, L, H, Gx, Gb, Gc, P, N = case

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).float()

    def uniform(*shape):
        return torch.rand(*shape, generator=g)

    def segments():
        return (uniform(B, L) < 0.08).cumsum(1).int()

    softplus = "dt_softplus" in options or "all" in options
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    i = dict(
        x=normal(B, L, Gx, P).to(dtype), dt=normal(B, L, H) if softplus else uniform(B, L, H), A=-2 * uniform(H),
        B=normal(B, L, Gb, N).to(dtype), C=normal(B, L, Gc, N).to(dtype),
    )  # fmt: skip
    bias = normal if softplus else uniform  # dt >= 0 either way
    more = dict(
        D=normal(H), dt_bias=bias(H), dt_softplus=True, seq_idx=segments(),
        token_order=torch.stack([torch.randperm(L, generator=g) for _ in range(B)]).int() if B else segments(),
        initial_state=normal(B, H, P, N), return_final_state=True, chunk_size=16,
    )  # fmt: skip
    if direction != "forward":
        more |= dict(
            reverse_dt=normal(B, L, H) if softplus else uniform(B, L, H), reverse_dt_bias=bias(H),
            reverse_A=-2 * uniform(H), reverse_B=normal(B, L, Gb, N).to(dtype), reverse_C=normal(B, L, Gc, N).to(dtype),
            reverse_mask=uniform(B, L) < 0.7, reverse_seq_idx=segments(),
        )  # fmt: skip
    if direction == "both":
        more |= dict(gate=uniform(B, L, H), head_gate=uniform(H))
    i |= {k: v for k, v in more.items() if k in options or ("all" in options and k not in ("head_gate", "chunk_size"))}
    if "head_gate" in i:
        i["gate"] = i.pop("head_gate")
    kept = ("x", "B", "C", "reverse_B", "reverse_C")
    for k, v in i.items():
        if isinstance(v, torch.Tensor) and v.is_floating_point() and k not in kept:
            i[k] = v.to(acc)
    return (with_weights_of_a_mean(i, g) if "normalize" in options else i) | dict(direction=direction)


def with_weights_of_a_mean(i, g):
    """The same call with `normalize`, and no weight below 0."""
    for k in ("B", "C", "reverse_B", "reverse_C"):
        if k in i:
            i[k] = i[k].double().softmax(-1).to(i[k].dtype)
    if "D" in i:
        i["D"] = i["D"].abs()
    if "initial_state" in i:
        row = torch.rand(i["initial_state"][:, :, :1].shape, generator=g).to(i["initial_state"].dtype)
        i["initial_state"] = torch.cat([i["initial_state"], row], 2)
    return i | dict(normalize=True)


def by_reference(**inputs):
    with linmu_ops.use_impl("ssd_scan:reference"):
        return scan(**inputs)


def used(i):
    """The differentiable inputs the output depends on."""
    replaced = {"dt": "reverse_dt", "A": "reverse_A", "B": "reverse_B", "C": "reverse_C", "dt_bias": "reverse_dt_bias"}
    return [k for k in visible(i) if not (i["direction"] == "reverse" and replaced.get(k) in i)]


def comparable(f):
    """Of a log of no mass, 0; it is never the log of what there is."""

    def run(**inputs):
        out = f(**inputs)
        if not inputs.get("normalize"):
            return out
        y, log_mass, *state = out
        return y, log_mass.masked_fill(log_mass == -math.inf, 0.0), *state

    return run


def check(i):
    check_against_reference(comparable(scan), comparable(by_reference), i, used(i))


def check_without_tokens(case, direction):
    for options in (("all",), ("all", "normalize")):
        i = make_inputs(case, torch.float32, direction, options)
        check_empty(scan, by_reference, i, used(i))


def check_strided_inputs(direction):
    i = make_inputs(SMALL, torch.float32, direction, ("all",))
    check_strided(check, scan, i, direction, ("x", "B", "C"), "dt", "reverse_B")
