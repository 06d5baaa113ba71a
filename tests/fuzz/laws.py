"""Laws of the ops in random cases: what no one may see changes nothing, and pieces are the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

import linmu_ops
from linmu_ops._testing import Judge, run_op

from . import ops
from .tensors import seeds, with_threads

JUNK = (float("nan"), float("inf"), -float("inf"), 1e30)

# What is hidden: at which visit the rest begins, and what stands there.
hidden = st.fixed_dictionaries(dict(at=st.integers(0, 130), junk=st.integers(0, len(JUNK) - 1), seed=seeds))
ssd_scan_unseen_cases = st.tuples(ops.ssd_scan_cases, hidden).map(lambda c: c[0] | dict(hidden=c[1], manners={}))
gated_delta_scan_unseen_cases = st.tuples(ops.gated_delta_scan_cases, hidden).map(
    lambda c: c[0] | dict(hidden=c[1], manners={})
)
causal_conv1d_unseen_cases = st.tuples(ops.causal_conv1d_cases, hidden).map(
    lambda c: c[0] | dict(hidden=c[1], manners={})
)
branch_mix_norm_unseen_cases = st.tuples(ops.branch_mix_norm_cases, hidden).map(
    lambda c: c[0] | dict(hidden=c[1], manners={})
)
gated_norm_unseen_cases = st.tuples(ops.gated_norm_cases, hidden).map(lambda c: c[0] | dict(hidden=c[1], manners={}))
window_attention_unseen_cases = st.tuples(ops.window_attention_cases, hidden).map(
    lambda c: c[0] | dict(hidden=c[1], manners={})
)
near_attention_unseen_cases = st.tuples(ops.near_attention_cases, hidden).map(
    lambda c: c[0] | dict(hidden=c[1], manners={})
)


def outputs(op: str, inputs: dict[str, Tensor], options: dict[str, Any], impl: str = "cpu") -> Tensor:
    with linmu_ops.use_impl(f"{op}:{impl}"):
        out = run_op(op, **inputs, **options)
    return out[0] if isinstance(out, tuple) else out


def hide(case: dict[str, Any], inputs: dict[str, Tensor], names: tuple[str, ...], where: Tensor) -> dict[str, Tensor]:
    """Junk in these (B, L, ...) inputs at the tokens `where` (B, L)."""
    junk = JUNK[case["hidden"]["junk"]]
    changed = dict(inputs)
    for name in names:
        if name in inputs and inputs[name].dim() > 1 and inputs[name].shape[1] == where.shape[1]:
            changed[name] = inputs[name].clone()
            changed[name][where] = junk
    return changed


def unseen(
    case: dict[str, Any], op: str, inputs: dict[str, Tensor], options: dict[str, Any], names: tuple[str, ...],
    hidden: Tensor, where: Tensor,
) -> None:  # fmt: skip
    """Junk at the tokens `hidden` changes no output at the tokens `where`, but for the order of sums, which what is not
    finite may change: where few digits are left of a sum, the rule that every op is judged by decides."""
    want = outputs(op, inputs, options)
    if not want.isfinite().all():
        reject()
    got = outputs(op, hide(case, inputs, names, hidden), options)
    if want[where].numel() == 0:
        return
    bound = 100 * torch.finfo(want.dtype).eps * want[where].abs().max().double().clamp(min=1e-6)
    differ = ~((got.double() - want.double()).abs() <= bound).flatten(2).all(2) & where
    if not differ.any():
        return

    def reference(**inputs: Tensor) -> Tensor:
        return outputs(op, inputs, options, "reference")

    seen = where.view(*where.shape, *(1,) * (got.dim() - 2))
    try:
        Judge(reference, inputs)([torch.where(seen, got, want)])
    except AssertionError as error:
        at = differ.nonzero()[0].tolist()
        raise AssertionError(f"{int(differ.sum())} tokens saw what is hidden, the first at {at}; {error}") from error


def visit_of(inputs: dict[str, Tensor], batch: int, length: int) -> Tensor:
    """(B, L): the visit of each position."""
    order = inputs.get("token_order")
    return (torch.arange(length).expand(batch, length) if order is None else order.long().argsort(1)).long()


def split(case: dict[str, Any], inputs: dict[str, Tensor], B: int, L: int) -> tuple[Tensor, int]:
    if B == 0 or L < 2:
        reject()
    return visit_of(inputs, B, L), 1 + case["hidden"]["at"] % (L - 1)


SCANNED = ("x", "B", "C", "dt", "reverse_dt", "reverse_B", "reverse_C", "gate")
SCANNED += ("q", "k", "v", "g", "beta", "reverse_q", "reverse_k", "reverse_g", "reverse_beta")


@with_threads
def ssd_scan_unseen(case: dict[str, Any]) -> None:
    scan_unseen("ssd_scan", ops.scan_inputs, case)


@with_threads
def gated_delta_scan_unseen(case: dict[str, Any]) -> None:
    scan_unseen("gated_delta_scan", ops.delta_inputs, case)


def scan_unseen(op: str, make: Callable[[dict[str, Any]], Any], case: dict[str, Any]) -> None:
    """A scan in one direction sees no token that it visits later, and, where a segment begins, none before."""
    if case["direction"] == "both":
        case = case | dict(direction="forward")
    t, options = make(case)
    inputs, B, L = t.tensors, case["B"], case["L"]
    visit, at = split(case, inputs, B, L)
    backward = case["direction"] == "reverse"
    later = visit < at if backward else visit >= at
    unseen(case, op, inputs, options, SCANNED, later, ~later)
    cut = {k: (visit >= at).int() for k in ("seq_idx", "reverse_seq_idx") if k == "seq_idx" or backward}
    unseen(case, op, inputs | cut, options, SCANNED, ~later, later)
    if backward:
        off = torch.rand(B, L, generator=t.generator) < 0.4
        unseen(case, op, inputs | dict(reverse_mask=~off), options, SCANNED, off, ~off)


@with_threads
def causal_conv1d_unseen(case: dict[str, Any]) -> None:
    t, options = ops.conv_inputs(case)
    inputs, B, L = t.tensors, case["B"], case["L"]
    visit, at = split(case, inputs, B, L)
    later = visit >= at
    unseen(case, "causal_conv1d", inputs, options, ("x",), later, ~later)
    unseen(case, "causal_conv1d", inputs | dict(seq_idx=later.int()), options, ("x",), ~later, later)


@with_threads
def branch_mix_norm_unseen(case: dict[str, Any]) -> None:
    """b is not looked at where the mask is False, and no token sees another."""
    t, options = ops.branch_inputs(case)
    inputs, B, L = t.tensors, case["B"], case["L"]
    off = torch.rand(B, L, generator=t.generator) < 0.4
    inputs["mask"] = ~off
    unseen(case, "branch_mix_norm", inputs, options, ("b",), off, off | ~off)
    unseen(case, "branch_mix_norm", inputs, options, ("a", "b"), off, ~off)


@with_threads
def gated_norm_unseen(case: dict[str, Any]) -> None:
    """No token sees another."""
    t, options = ops.gated_norm_inputs(case)
    off = torch.rand(case["B"], case["L"], generator=t.generator) < 0.4
    unseen(case, "gated_norm", t.tensors, options, ("x", "z"), off, ~off)


@with_threads
def window_attention_unseen(case: dict[str, Any]) -> None:
    """No token sees one of another window; of a causal one, none after its own."""
    t, options = ops.window_inputs(case)
    inputs = t.tensors
    B, L = inputs["q"].shape[:2]
    if B * L == 0:
        reject()
    layout = options.get("layout") or linmu_ops.TokenLayout.from_grid(options["grid"], B)
    one = options.get("image_window", None)
    table = layout.window_table(
        options["window"], options["shift"], options["wrap"], one, options["image_shift"], torch.device("cpu")
    )
    window = torch.full((B * L,), -1)
    for i, (a, b) in enumerate(zip(table.offsets[:-1].tolist(), table.offsets[1:].tolist(), strict=True)):
        window[table.tokens[a:b].long()] = i
    window = window.view(B, L)
    chosen = int(torch.randint(-1, len(table.offsets) - 1, (), generator=t.generator))
    names = ("q", "k", "v")
    unseen(case, "window_attention", inputs, options, names, window == chosen, window != chosen)
    if options["causal"]:
        later = torch.arange(L).expand(B, L) >= case["hidden"]["at"] % L
        unseen(case, "window_attention", inputs, options, names, later, ~later)


@with_threads
def near_attention_unseen(case: dict[str, Any]) -> None:
    """A token sees neither what comes after it, nor what is in its range or list at no other."""
    t, options = ops.near_inputs(case)
    inputs = t.tensors
    B, L = inputs["q"].shape[:2]
    T = inputs["k"].shape[1]
    if B * L == 0:
        reject()
    at = case["hidden"]["at"] % T
    lists = torch.cat((inputs["listed"], torch.full_like(inputs["listed"][:1], -1))) if len(inputs["listed"]) else None
    sees = (inputs["low"] <= at) & (at < inputs["high"])
    if lists is not None:
        sees = sees | (lists[inputs["which"].long()] == at).any(-1).any(1)
    sees = sees & (torch.arange(T - L, T) >= at)
    hidden_at = (torch.arange(T) == at).expand(B, -1)
    unseen(case, "near_attention", inputs, options, ("k", "v"), hidden_at, ~sees)


pieces_cases = st.tuples(ops.ssd_scan_cases, st.lists(st.integers(0, 130), max_size=4)).map(
    lambda c: c[0] | dict(cuts=sorted(c[1]), manners={}, dtype="float64", mixed={}, direction="forward")
)


@with_threads
def pieces(case: dict[str, Any]) -> None:
    """A scan of a concatenation is a scan that carries its state; so is a loop of steps."""
    case = case | dict(options=[o for o in case["options"] if o not in ("token_order", "seq_idx")])
    t, options = ops.scan_inputs(case)
    inputs, L, options = t.tensors, case["L"], options | dict(return_final_state=True)
    cuts = [0, *(min(c, L) for c in case["cuts"]), L]
    with linmu_ops.use_impl("ssd_scan:cpu"):
        whole, *_, last = run_op("ssd_scan", **inputs, **options)
    state, found = inputs.get("initial_state"), []
    for a, b in itertools.pairwise(cuts):
        piece = {k: v[:, a:b] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        y, *_, state = run_op("ssd_scan", **piece | dict(initial_state=state), **options)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), whole)
    torch.testing.assert_close(state, last)
    H, P, N, mean = case["heads"][0], case["P"], case["N"], options["normalize"]
    state = inputs["initial_state"].clone() if "initial_state" in inputs else whole.new_zeros(case["B"], H, P + mean, N)
    rest = {k: inputs[k] for k in ("A", "D", "dt_bias") if k in inputs}
    for i in range(L):
        token = {k: inputs[k][:, i] for k in ("x", "dt", "B", "C")}
        y = linmu_ops.ssd_step(state, **token, **rest, dt_softplus=options["dt_softplus"], normalize=mean)
        torch.testing.assert_close(y[0] if mean else y, whole[:, i])
    torch.testing.assert_close(state, last)
