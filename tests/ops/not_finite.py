"""Where NaN, Inf and 1e30 may go in `ssd_scan`: cases, and a check that they go where the reference lets them, only."""

from __future__ import annotations

import itertools
import math

import torch

import linmu_ops
from linmu_ops._testing import run_op

B, L, H, P, N, AT = 1, 70, 2, 4, 4, 37
EVERYTHING = ("segments", "masked", "gate")
DIRECTIONS = ("forward", "reverse", "both")
SPOILED = ("x", "B", "C", "dt", "grad_y")
# name, value, direction, options; and the whole sweep.
CASES = [
    *((name, math.nan, direction, ()) for name, direction in zip(SPOILED, DIRECTIONS * 2, strict=False)),
    *((name, value, "both", EVERYTHING) for name in SPOILED for value in (math.nan, 1e30)),
    *(
        (name, math.nan, direction, ("mean", "masked"))
        for name, direction in zip(SPOILED, DIRECTIONS * 2, strict=False)
    ),
    ("x", math.nan, "reverse", ("masked",)),
    ("C", math.nan, "reverse", ("masked",)),
    ("dt", math.inf, "forward", ("segments",)),
]
SWEEP = list(
    itertools.product(SPOILED, (math.nan, math.inf, 1e30), DIRECTIONS, ((), ("segments",), ("masked", "gate")))
)


def make_inputs(direction, options, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    r = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    inputs = dict(
        x=r(B, L, H, P).to(dtype), dt=torch.rand(B, L, H, generator=g) * 0.2 + 0.01,
        A=-torch.rand(H, generator=g) - 0.1, B=r(B, L, 1, N).to(dtype), C=r(B, L, 1, N).to(dtype),
        D=r(H), direction=direction,
    )  # fmt: skip
    index = (torch.arange(L) // 9).int()[None]
    if "segments" in options:
        inputs["seq_idx"] = index
    if "masked" in options and direction != "forward":
        inputs["reverse_mask"] = torch.arange(L)[None] != AT
    if "gate" in options and direction == "both":
        inputs["gate"] = torch.rand(B, L, H, generator=g)
    if "mean" in options:  # no weight is below 0
        inputs |= {k: inputs[k].abs() for k in ("B", "C", "D")} | dict(normalize=True)
    return inputs


def grads_of(inputs, grad_y):
    leaves = {n: inputs[n].clone().requires_grad_() for n in ("x", "dt", "B", "C")}
    y = run_op("ssd_scan", **inputs | leaves)
    y = y[0] if isinstance(y, tuple) else y
    found = torch.autograd.grad(y, list(leaves.values()), grad_y)
    return {"y": y.detach(), **{f"gradient of {n}": t for n, t in zip(leaves, found, strict=True)}}


def spread(results, limit=1e15):
    """Per tensor, the tokens where something is not finite, or of a size that only a spoiled value has."""
    return {n: (~(t.float().abs() < limit)).flatten(2).any(-1) for n, t in results.items()}


def check(name, value, direction, options, impl, dtype=torch.float32):
    """`name` spoiled at one token: it reaches what the reference lets it reach, and the rest keeps its value."""
    inputs = make_inputs(direction, options, dtype)
    grad_y = torch.randn(B, L, H, P, generator=torch.Generator().manual_seed(5)).to(dtype)
    clean = dict(inputs)
    given = grad_y.clone() if name == "grad_y" else inputs[name].clone()
    given[:, AT] = value
    if name == "grad_y":
        grad_y = given
    else:
        inputs[name] = given
    with linmu_ops.use_impl("ssd_scan:reference"):
        want = grads_of(inputs, grad_y)
    with linmu_ops.use_impl(f"ssd_scan:{impl}"):
        got = grads_of(inputs, grad_y)
        if "masked" in options and direction == "reverse" and name == "x":  # then nothing but D sees it
            alone = grads_of(clean | {"D": None}, grad_y)["y"]
            hidden = grads_of(inputs | {"D": None}, grad_y)["y"]
            assert ((hidden - alone).abs() <= (1e-5 if dtype == torch.float32 else 2e-2) * alone.abs().max()).all()
    for tensor, reached in spread(got).items():
        allowed = spread(want)[tensor]
        if name == "dt" and math.isnan(value) and tensor != "y":  # a decay that is no number: its segment's gradients
            allowed = allowed | (inputs["seq_idx"] == inputs["seq_idx"][:, AT] if "seq_idx" in inputs else True)
        assert not (reached & ~allowed).any(), f"{tensor}: reached {reached.nonzero()[:, 1].tolist()}"
        if tensor == "y":  # and nothing hides it
            assert torch.equal(reached, allowed)
        kept = ~allowed[..., None, None].expand(want[tensor].shape) if want[tensor].dim() == 4 else ~allowed
        if want[tensor].dim() == 3:
            kept = kept[..., None].expand(want[tensor].shape)
        size = want[tensor][kept].abs().max().item() if kept.any() else 0.0
        bound = (1e-4 if dtype == torch.float32 else 4e-2) * max(size, 1e-3)
        assert ((got[tensor] - want[tensor])[kept].abs() <= bound).all(), tensor


def large_state(dtype):
    """Inputs whose states go far beyond 65504, though nothing that comes out does; and what to differentiate."""
    g = torch.Generator().manual_seed(1)
    r = lambda *s: torch.rand(*s, generator=g)  # noqa: E731
    inputs = dict(
        x=(200 * r(1, L, H, P)).to(dtype), dt=0.5 + 0.5 * r(1, L, H), A=-0.01 * r(H), B=(200 * r(1, L, 1, N)).to(dtype),
        C=(1e-3 * torch.randn(1, L, 1, N, generator=g)).to(dtype), direction="both",
    )  # fmt: skip
    return inputs, ["x", "dt", "A", "B"]  # that of C is the state, and too large
