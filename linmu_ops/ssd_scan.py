"""Selective state-space scan (Mamba-2 SSD): forward, reverse, or both directions fused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_flags
from ._directions import Reverse, check_chunk_size, check_directions, check_visits
from .reference._visits import normalized
from .reference.ssd_scan import ssd_scan as reference

# The fields of `Reverse` lie flat in the schema, each after `reverse_`: autograd, vmap and the other transforms know
# arguments that are tensors, and do not look into a list that holds some.
INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, str direction, "
    "Tensor? reverse_dt, Tensor? reverse_A, Tensor? reverse_B, Tensor? reverse_C, Tensor? reverse_dt_bias, "
    "Tensor? reverse_mask, Tensor? reverse_seq_idx, "
    "Tensor? gate, Tensor? seq_idx, Tensor? token_order, Tensor? initial_state, bool normalize, "
)
# y, its mass (0 where there is no mean), final state; of what is not asked for, an empty tensor.
# for_gradient: a mean is of the accumulate type, because its gradient is a difference, for which 16 bits are too few.
SCHEMA = f"({INPUTS}bool return_final_state, bool for_gradient, int chunk_size) -> (Tensor, Tensor, Tensor)"
# One gradient per entry of DIFFERENTIABLE, an empty tensor where the input was None.
BWD_SCHEMA = (
    "(Tensor grad_y, Tensor? grad_mass, Tensor? grad_final_state, Tensor? y, Tensor? mass, "
    f"{INPUTS}int chunk_size) -> Tensor[]"
)
_ALIGNED = 8  # channels that `_widened` adds, of which seven are 0: rows of 16-bit numbers stay whole 16 bytes
ARGUMENTS = tuple(a.split()[1] for a in INPUTS.strip(", ").split(", "))
DIFFERENTIABLE = (
    "x", "dt", "A", "B", "C", "dt_bias", "reverse_dt", "reverse_A", "reverse_B", "reverse_C", "reverse_dt_bias",
    "D", "gate", "initial_state",
)  # fmt: skip
WRT = tuple(ARGUMENTS.index(name) for name in DIFFERENTIABLE)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    direction: str = "forward",
    reverse: Reverse | None = None,
    gate: Tensor | None = None,
    seq_idx: Tensor | None = None,
    token_order: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    normalize: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Selective state-space scan, in one or both directions, over tokens visited in any order.

        forward:  h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] (outer) B[t]                 y>[t] = h[t] C[t]
        reverse:  r[t] = exp(dt'[t] A') r[t+1] + m[t] dt'[t] x[t] (outer) B'[t]        y<[t] = r[t] C'[t]
        both:     y[t] = g[t] y>[t] + (1 - g[t]) y<[t]  where m[t],  y[t] = y>[t] elsewhere;  y> + y< without a gate
        and D x[t] is added to each. `reverse` gives dt', A', B', C' and m; else they are the forward ones, and m is 1.

    t counts visits: `token_order[b, t]` is the position visited at t. Every other argument, and y, is in token
    positions. Where the mask m is False the reverse state passes through unchanged and the reverse output is 0.
    Heads are never repeated in memory: Gx, Gb and Gc each divide H, and head h reads group h // (H / G).

    Args:
        x: (B, L, Gx, P) float32, float64, bfloat16 or float16. Values.
        dt: (B, L, H) float. Step size, dimensionless; >= 0 after bias and softplus (not checked: see the notes).
        A: (H,) float, <= 0 (not checked). Decay rate; the decay of one step is exp(dt A).
        B: (B, L, Gb, N) dtype of x. Input projection ("key").
        C: (B, L, Gc, N) dtype of x. Output projection ("query").
        D: (H,) float. Skip connection.
        dt_bias: (H,) float. Added to dt before softplus.
        dt_softplus: apply softplus to dt (+ bias), in both directions.
        direction: "forward", "reverse" or "both".
        reverse: what the reverse direction has of its own, a `linmu_ops.Reverse(dt, A, B, C, dt_bias, mask, seq_idx)`.
            What it leaves out is the forward direction's. "reverse" and "both" only.
        gate: (B, L, H) or (H,) float in (0, 1). Weight of the forward direction; "both" only.
        seq_idx: (B, L) int32. The state restarts at a visit whose index differs from the visit before.
        token_order: (B, L) int32. A permutation per row; the position visited at t. In place if None.
        initial_state: (B, H, P, N) float32 (float64 for float64 x). State before the first visit; for "reverse", which
            visits in the opposite order, before the last token. With "both" it is the forward direction's. With
            `normalize` (B, H, P+1, N): the last row belongs to the mass.
        return_final_state: also return the state after the last visit, of the same direction.
        normalize: divide y by its mass, which is what the same scan makes of x = 1: y becomes a weighted mean of x.
            That needs weights >= 0, so C . B, dt and D >= 0. Where the mass is below 2**-100, there is no mean: y is 0,
            log_mass is -inf, and no gradient flows. The CUDA kernels do not do it: they scan x with channels of ones,
            and a log_mass has the precision of x's dtype there.
        chunk_size: tokens per chunk of the fast kernels, >= 1; chosen by the kernel if None.

    Returns:
        y: (B, L, H, P), dtype of x. With normalize: (y, log_mass), log_mass (B, L, H) float32 (or float64), the log of
        the mass. With return_final_state the state comes last, (B, H, P, N) or (B, H, P+1, N) float32 (or float64).

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a type or dtype does.

    Notes:
        Accumulates in float32 (float64 for float64). Deterministic. Linear in L. Exponents are never above 0 for
        dt A <= 0, so nothing overflows. The values of dt and A are not looked at, as on a GPU a look would wait for all
        kernels before: where dt A > 0 the state grows, and may become Inf or NaN, in y and in gradients.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 6; LinMU, arXiv:2601.01322, equations 1-3.
    Reference: linmu_ops/reference/ssd_scan.py.
    """
    check_flags("ssd_scan", dt_softplus=dt_softplus, return_final_state=return_final_state, normalize=normalize)
    r = check(
        x, dt, A, B, C, D=D, dt_bias=dt_bias, direction=direction, reverse=reverse, gate=gate, seq_idx=seq_idx,
        token_order=token_order, initial_state=initial_state, chunk_size=chunk_size, normalize=normalize,
    )  # fmt: skip
    acc = accumulate_dtype(x.dtype)

    def small(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(acc)

    inputs = (
        small(dt), small(A), B, C, small(D), small(dt_bias), dt_softplus, direction, small(r.dt), small(r.A), r.B, r.C,
        small(r.dt_bias), r.mask, r.seq_idx, small(gate), seq_idx, token_order,
    )  # fmt: skip
    for_gradient = (
        normalize
        and torch.is_grad_enabled()
        and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *inputs, initial_state))
    )
    last = (return_final_state, for_gradient, chunk_size or 0)
    if normalize and widens("ssd_scan", x):
        y, mass, state = _widened(x, inputs, initial_state, *last)
    else:
        y, mass, state = _registry.call("ssd_scan", x, x, *inputs, initial_state, normalize, *last)
    outputs = (y.to(x.dtype), *[mass.log()] * normalize, *[state] * return_final_state)
    return outputs if len(outputs) > 1 else y


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    dt_bias: Tensor | None,
    direction: str,
    reverse: Reverse | None,
    gate: Tensor | None,
    seq_idx: Tensor | None,
    token_order: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int | None,
    normalize: bool = False,
) -> Reverse:
    """Raise for arguments that break the table of `ssd_scan`; what the reverse direction has of its own."""
    r = check_directions("ssd_scan", direction, reverse, Reverse, gate)
    d = Dims("ssd_scan")
    d("x", x, "B L Gx P", FLOATS)
    d("dt", dt, "B L H", FLOATS)
    d("A", A, "H", FLOATS)
    d("B", B, "B L Gb N", x.dtype)
    d("C", C, "B L Gc N", x.dtype)
    d.optional("D", D, "H", FLOATS)
    d.optional("dt_bias", dt_bias, "H", FLOATS)
    d.optional("reverse.dt", r.dt, "B L H", FLOATS)
    d.optional("reverse.A", r.A, "H", FLOATS)
    d.optional("reverse.B", r.B, "B L Gb N", x.dtype)
    d.optional("reverse.C", r.C, "B L Gc N", x.dtype)
    d.optional("reverse.dt_bias", r.dt_bias, "H", FLOATS)
    check_visits(d, r, gate, seq_idx, token_order)
    acc = accumulate_dtype(x.dtype)
    d.optional("initial_state", initial_state, state_axes(d, normalize), acc)
    for name, part in (("x", "Gx"), ("B", "Gb"), ("C", "Gc")):
        d.divides(name, part, "H")
    d.same_device(
        x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, gate=gate, seq_idx=seq_idx, token_order=token_order,
        initial_state=initial_state, **{f"reverse.{name}": t for name, t in zip(Reverse._fields, r, strict=True)},
    )  # fmt: skip
    check_chunk_size("ssd_scan", chunk_size)
    return r


def state_axes(d: Dims, normalize: bool) -> str:
    """The axes of a state. One row more than x has channels belongs to the mass."""
    if normalize:
        d.sizes["P+1"] = d["P"] + 1
    return "B H P+1 N" if normalize else "B H P N"


def widens(op: str, x: Tensor) -> bool:
    """Whether `normalize` is done around the kernels that serve x, which scan a wider x; see `_cuda_note`."""
    return _registry.serves(op, x) == "cuda"


def _widened(
    x: Tensor, inputs: tuple[Any, ...], initial_state: Tensor | None, return_final_state: bool, for_gradient: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    P = x.shape[3]
    ones = F.pad(x.new_ones(1), (0, _ALIGNED - 1)).expand(*x.shape[:3], -1)
    start = None if initial_state is None else F.pad(initial_state, (0, 0, 0, _ALIGNED - 1))
    wide = torch.cat([x, ones], dim=3)
    sums, _, state = _registry.call("ssd_scan", x, wide, *inputs, start, False, return_final_state, False, chunk_size)
    y, mass = normalized(sums[..., : P + 1].to(accumulate_dtype(x.dtype)))
    return y, mass, state[:, :, : P + 1].contiguous() if return_final_state else state


def _slices_why_not(asked: _registry.Asked) -> str | None:
    """Why a call's forward does not take the fast kernels of sm_90a, as csrc/cuda/ssd_scan_slice.cu says it."""
    x, B, chunk = asked["x"], asked["B"], asked["chunk_size"]
    if x is None or B is None or x.dim() != 4:  # a step's, which has this note too
        return None
    P, N = x.shape[3] + (_ALIGNED if asked["normalize"] else 0), B.shape[3]
    if x.dtype != torch.bfloat16:
        return f"x is {str(x.dtype).removeprefix('torch.')}, not bfloat16"
    if x.shape[1] <= 32:
        return f"L={x.shape[1]} is not above 32"
    if N > 128 or N % 8 or N < 1:
        return f"N={N} is not a multiple of 8 up to 128"
    if P % 8 or P < 1:
        return f"P={P} is not a multiple of 8"
    return None if chunk in (None, 0, 64) else f"chunk_size={chunk} is not 64"


def _cuda_note(asked: _registry.Asked) -> str | None:
    notes = ["normalize=True scans x with channels of ones: its kernels do not normalize"] * bool(asked["normalize"])
    if slow := _slices_why_not(asked):
        notes.append(f"on sm_90a the general kernels scan, not those by slices, which are faster: {slow}")
    return "; ".join(notes) or None


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = dict(zip(ARGUMENTS, args, strict=False))
    x, (batch, length, heads), normalize = given["x"], given["dt"].shape, given["normalize"]
    acc = accumulate_dtype(x.dtype)
    return_final_state, for_gradient = args[-3:-1]
    state = (batch, heads, x.shape[3] + normalize, given["B"].shape[3]) if return_final_state else (0,)
    y = x.new_empty(batch, length, heads, x.shape[3], dtype=acc if normalize and for_gradient else x.dtype)
    mass = (batch, length, heads) if normalize else (0,)
    return y, x.new_empty(mass, dtype=acc), x.new_empty(state, dtype=acc)


def _bwd_fake(
    grad_y: Tensor, grad_mass: Tensor | None, grad_final_state: Tensor | None, y: Tensor | None,
    mass: Tensor | None, *args: Any,
) -> list[Tensor]:  # fmt: skip
    return _autograd.fakes(args[:-1], WRT)


def _bwd_reference(
    grad_y: Tensor, grad_mass: Tensor | None, grad_final_state: Tensor | None, y: Tensor | None,
    mass: Tensor | None, *args: Any,
) -> list[Tensor]:  # fmt: skip
    inputs = (*args[:-1], grad_final_state is not None, True, args[-1])
    return _autograd.gradients(reference, inputs, WRT, (grad_y, grad_mass, grad_final_state))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.normalize = inputs[ARGUMENTS.index("normalize")]
    _autograd.keep(ctx, inputs, output[:2] if ctx.normalize else ())


def _backward(
    ctx: Any, bwd_op: Any, grad_y: Tensor | None, grad_mass: Tensor | None, grad_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    means, (*inputs, return_final_state, _, chunk_size) = _autograd.kept(ctx)
    y, mass = means if ctx.normalize else (None, None)
    given = dict(zip(ARGUMENTS, inputs, strict=True))
    if grad_y is None:
        x, dt = given["x"], given["dt"]
        grad_y = (dt if ctx.normalize else x).new_zeros(*dt.shape, x.shape[3])
    if y is not None and mass is not None:
        y, grad_y = y.to(mass.dtype), grad_y.to(mass.dtype)
    else:
        grad_mass = None
    grads = bwd_op(grad_y, grad_mass, grad_state if return_final_state else None, y, mass, *inputs, chunk_size)
    return (*_autograd.in_places(grads, WRT, inputs), None, None, None)


def _cuda_limit(asked: _registry.Asked) -> str | None:
    """As csrc/cuda/ssd_scan*.cu lay out shared memory, with the smallest chunk and slices that they go down to."""
    size = asked["x"].element_size()

    def row(n: int) -> int:
        return max(-(-n // 32) * 32, 32) * size + 16

    P, N = row(asked["x"].shape[3]), row(asked["B"].shape[3])
    sets = 1 if asked["reverse_B"] is None and asked["reverse_C"] is None else 2
    needed = {"forward": 1408 + (32 * sets + 64) * N + 64 * row(32)}
    if asked.differentiates:
        parts = {torch.float32: 1, torch.bfloat16: 3}.get(asked["x"].dtype, 2)
        slices = 2 * parts * (P - 16) // size * (16 * size + 16)
        needed["backward"] = 5184 + 64 * (P + N + row(32)) + max(slices, 32 * N)
    return _registry.more_than(asked, needed)


_registry.define_op(
    "ssd_scan",
    SCHEMA,
    reference=reference,
    fake=_fake,
    bwd_schema=BWD_SCHEMA,
    bwd_reference=_bwd_reference,
    bwd_fake=_bwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    limits={"cuda": _cuda_limit},
    notes={"cuda": _cuda_note},
)
