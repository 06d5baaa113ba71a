"""The gated delta rule (Gated DeltaNet): forward, reverse, or both directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _autograd, _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_flags, check_number
from ._directions import DeltaReverse, check_chunk_size, check_directions, check_visits
from .reference.gated_delta_scan import gated_delta_scan as reference

# The fields of `DeltaReverse` lie flat in the schema, each after `reverse_`, as those of `Reverse` do in `ssd_scan`.
INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, bool use_qk_l2norm_in_kernel, str direction, "
    "Tensor? reverse_q, Tensor? reverse_k, Tensor? reverse_g, Tensor? reverse_beta, Tensor? reverse_mask, "
    "Tensor? reverse_seq_idx, Tensor? gate, Tensor? seq_idx, Tensor? token_order, Tensor? initial_state, "
)
SCHEMA = f"({INPUTS}bool return_final_state, int chunk_size) -> (Tensor, Tensor)"
# One gradient per entry of DIFFERENTIABLE, an empty tensor where the input was None.
BWD_SCHEMA = f"(Tensor grad_y, Tensor? grad_final_state, {INPUTS}int chunk_size) -> Tensor[]"
ARGUMENTS = tuple(a.split()[1] for a in INPUTS.strip(", ").split(", "))
DIFFERENTIABLE = (
    "q", "k", "v", "g", "beta", "reverse_q", "reverse_k", "reverse_g", "reverse_beta", "gate", "initial_state",
)  # fmt: skip
WRT = tuple(ARGUMENTS.index(name) for name in DIFFERENTIABLE)


def gated_delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    direction: str = "forward",
    reverse: DeltaReverse | None = None,
    gate: Tensor | None = None,
    seq_idx: Tensor | None = None,
    token_order: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated delta rule, in one or both directions, over tokens visited in any order.

        forward:  S[t] = exp(g[t]) (I - beta[t] k[t] k[t]^T) S[t-1] + beta[t] k[t] v[t]^T    y>[t] = scale S[t]^T q[t]
        reverse:  R[t] likewise of R[t+1], where m[t]; elsewhere R[t] = R[t+1]               y<[t] = scale R[t]^T q'[t]
        both:     y[t] = w[t] y>[t] + (1 - w[t]) y<[t]  where m[t],  y[t] = y>[t] elsewhere;  y> + y< without a gate w

    The state decays first, then what it holds under k is moved towards v: wholly where beta is 1 and k has length 1.
    `reverse` gives q', k', g', beta' and m; else they are the forward ones, and m is 1.

    t counts visits: `token_order[b, t]` is the position visited at t. Every other argument, and y, is in token
    positions. Where the mask m is False the reverse state passes through unchanged and the reverse output is 0.
    Heads are never repeated in memory: Gq, Gk and Gv each divide H, and head h reads group h // (H / G).

    Args:
        q: (B, L, Gq, K) float32, float64, bfloat16 or float16. Queries.
        k: (B, L, Gk, K) dtype of q. Keys, of length 1 or less: beyond beta |k|^2 = 2 a state grows without bound.
        v: (B, L, Gv, V) dtype of q. Values.
        g: (B, L, H) float, <= 0. Log of the decay.
        beta: (B, L, H) float in [0, 1] (up to 2 for negative eigenvalues). Learning rate.
        scale: of the queries; K ** -0.5 if None.
        use_qk_l2norm_in_kernel: scale q and k to length 1 first, x / sqrt(|x|^2 + 1e-6).
        direction: "forward", "reverse" or "both".
        reverse: what the reverse direction has of its own, a `linmu_ops.DeltaReverse(q, k, g, beta, mask, seq_idx)`.
            What it leaves out is the forward direction's. "reverse" and "both" only.
        gate: (B, L, H) or (H,) float in (0, 1). Weight of the forward direction; "both" only.
        seq_idx: (B, L) int32. The state restarts at a visit whose index differs from the visit before.
        token_order: (B, L) int32. A permutation per row; the position visited at t. In place if None.
        initial_state: (B, H, K, V) float32 (float64 for float64 q). State before the first visit; for "reverse", which
            visits in the opposite order, before the last token. With "both" it is the forward direction's.
        return_final_state: also return the state after the last visit, of the same direction.
        chunk_size: tokens per chunk of the fast kernels, >= 1; chosen by the kernel if None.

    Returns:
        y: (B, L, H, V), dtype of q. With return_final_state: (y, state), state (B, H, K, V) float32 (or float64).

    Raises:
        ValueError: a shape, device or value breaks the table above. TypeError: a type or dtype does.

    Notes:
        Accumulates in float32 (float64 for float64). Deterministic. Linear in L. Padding with beta = 0 and g = 0
        leaves the state as it is.

    Source: Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464, equation 10. The arguments, and the layout of the state,
    are those of flash-linear-attention's `chunk_gated_delta_rule` and of transformers.
    Reference: linmu_ops/reference/gated_delta_scan.py.
    """
    r = check_directions("gated_delta_scan", direction, reverse, DeltaReverse, gate)
    d = Dims("gated_delta_scan")
    d("q", q, "B L Gq K", FLOATS)
    d("k", k, "B L Gk K", q.dtype)
    d("v", v, "B L Gv V", q.dtype)
    d("g", g, "B L H", FLOATS)
    d("beta", beta, "B L H", FLOATS)
    d.optional("reverse.q", r.q, "B L Gq K", q.dtype)
    d.optional("reverse.k", r.k, "B L Gk K", q.dtype)
    d.optional("reverse.g", r.g, "B L H", FLOATS)
    d.optional("reverse.beta", r.beta, "B L H", FLOATS)
    check_visits(d, r, gate, seq_idx, token_order)
    acc = accumulate_dtype(q.dtype)
    d.optional("initial_state", initial_state, "B H K V", acc)
    for name, part in (("q", "Gq"), ("k", "Gk"), ("v", "Gv")):
        d.divides(name, part, "H")
    d.same_device(
        q, k=k, v=v, g=g, beta=beta, gate=gate, seq_idx=seq_idx, token_order=token_order, initial_state=initial_state,
        **{f"reverse.{name}": t for name, t in zip(DeltaReverse._fields, r, strict=True)},
    )  # fmt: skip
    check_chunk_size("gated_delta_scan", chunk_size)
    factor = default_scale("gated_delta_scan", scale, q)
    check_flags(
        "gated_delta_scan", use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, return_final_state=return_final_state
    )

    def small(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(acc)

    y, state = _registry.call(
        "gated_delta_scan", q, q, k, v, small(g), small(beta), factor, use_qk_l2norm_in_kernel,
        direction, r.q, r.k, small(r.g), small(r.beta), r.mask, r.seq_idx, small(gate), seq_idx, token_order,
        initial_state, return_final_state, chunk_size or 0,
    )  # fmt: skip
    return (y, state) if return_final_state else y


def default_scale(op: str, scale: float | None, q: Tensor) -> float:
    return check_number(op, "scale", scale) if scale is not None else max(q.shape[-1], 1) ** -0.5


def _fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads = g.shape
    return_final_state = args[-2]
    state = (batch, heads, k.shape[3], v.shape[3]) if return_final_state else (0,)
    return q.new_empty(batch, length, heads, v.shape[3]), q.new_empty(state, dtype=accumulate_dtype(q.dtype))


def _bwd_fake(grad_y: Tensor, grad_final_state: Tensor | None, *args: Any) -> list[Tensor]:
    return _autograd.fakes(args[:-1], WRT)


def _bwd_reference(grad_y: Tensor, grad_final_state: Tensor | None, *args: Any) -> list[Tensor]:
    inputs = (*args[:-1], grad_final_state is not None, args[-1])
    return _autograd.gradients(reference, inputs, WRT, (grad_y, grad_final_state))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _autograd.keep(ctx, inputs)


def _backward(ctx: Any, bwd_op: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, return_final_state, chunk_size = _autograd.kept(ctx)[1]
    given = dict(zip(ARGUMENTS, inputs, strict=True))
    if grad_y is None:
        grad_y = given["q"].new_zeros(*given["g"].shape, given["v"].shape[3])
    grads = bwd_op(grad_y, grad_state if return_final_state else None, *inputs, chunk_size)
    return (*_autograd.in_places(grads, WRT, inputs), None, None)


_registry.define_op(
    "gated_delta_scan",
    SCHEMA,
    reference=reference,
    fake=_fake,
    bwd_schema=BWD_SCHEMA,
    bwd_reference=_bwd_reference,
    bwd_fake=_bwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
