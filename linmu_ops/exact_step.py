"""One token of text of `ExactMMATE`, in place on its state: what decoding runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _registry
from ._dims import FLOATS, Dims, accumulate_dtype, check_flags, check_number, check_size
from .reference.exact_step import LEAVE
from .reference.exact_step import exact_step as reference

SCHEMA = (
    "(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) steps, Tensor(d!)? sinks, Tensor(e!) seen, Tensor ssm, Tensor q, "
    "Tensor k, Tensor v, Tensor dt, Tensor dt_bias, Tensor rest, Tensor c_map, Tensor scale, Tensor? cos, Tensor? sin, "
    "Tensor? z_gate, Tensor? real, int window, float softmax_scale, bool interleaved, bool nothing_beyond, "
    "int far_limit) -> (Tensor, Tensor)"
)
NO_LIMIT = 2**62
STATE = ("keys", "values", "steps", "sinks", "seen")


def exact_step(
    keys: Tensor,
    values: Tensor,
    steps: Tensor,
    seen: Tensor,
    ssm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    rest: Tensor,
    c_map: Tensor,
    scale: Tensor,
    *,
    window: int,
    sinks: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    z_gate: Tensor | None = None,
    real: Tensor | None = None,
    softmax_scale: float | None = None,
    interleaved: bool = False,
    nothing_beyond: bool = False,
    far_limit: int = NO_LIMIT,
) -> tuple[Tensor, Tensor]:
    """One token of text for each row, between the projections of a block `ExactMMATE`; the state is updated in place.

        y = (1 - share) y_exact + share y_far,    share = sigmoid(rest - excess + log_total - lse)

    y_exact is softmax attention to n places: the sinks, a ring of the last tokens, and what is kept; lse is the
    log-sum-exp of its scores. The ring has room for w + c tokens, c = min(w, 64). Of what a row sees, c tokens leave at
    a time. y_far is the mean over all that has left and is not kept, log_total the log of its weights:

        f = softmax(scale softmax_scale c_map q),    total = ssm[P] f,    y_far = silu(z_gate) (ssm[:P] f) / total

    Where nothing is far, share is 0; where more than far_limit tokens are, excess = log(their number / far_limit), else
    0. Key, value and step size softplus(dt + dt_bias) of the token go to the ring, and
    to its place among the sinks if it is one. What is due to leave is not moved: that is the caller's.

    Args:
        keys: (B, G, n, P) dtype of q, contiguous. Rotated keys of s sinks, w + c places, and the kept ones. Updated in
            place.
        values: (B, G, n, P) dtype of q, contiguous. Updated in place.
        steps: (B, G, n-s, H/G) float32 (float64 for float64 q), contiguous. Updated in place.
        seen: (B,) int64, contiguous, >= 0. Tokens before this one. Updated in place.
        ssm: (B, H, P+1, N) float32 (or float64). The scan's state; its last row is of the weights.
        q: (B, H, P) float32, float64, bfloat16 or float16. Query, not rotated.
        k: (B, G, P) dtype of q. Key, not rotated.
        v: (B, G, P) dtype of q. Value.
        dt: (B, H) float. Step size before bias and softplus.
        dt_bias: (H,) float.
        rest: (B, H) float. How what is far compares.
        c_map: (H, P, N) float. Map of the query to features.
        scale: (H,) float.
        window: w >= 1, of tokens that text sees at least.
        sinks: (B, s) bool, contiguous. Which of the first s tokens are text and have come. Updated in place. None: s is
            0.
        cos: (B, R) or (1, R) float, even R <= P. Rotary embedding of the first R channels; with sin.
        sin: (B, R) or (1, R) float. As many rows as cos.
        z_gate: (B, HP) dtype of q. Gate of y_far, before silu.
        real: (B,) bool. False at rows whose token is padding: nothing is written, and y is 0.
        softmax_scale: of the scores; P ** -0.5 if None.
        interleaved: channels (0, 1), (2, 3), ... rotate together, instead of (0, R/2), (1, R/2 + 1), ...
        nothing_beyond: text sees the last w tokens and nothing else.
        far_limit: >= 1, the number of far tokens beyond which their weight does not grow.

    Returns:
        y: (B, HP), dtype of q.
        due: (B,) bool. Rows of which c tokens leave now.

    Raises:
        ValueError: a shape or device breaks the table above, or `seen` does (on a CPU). TypeError: a dtype does.
        RuntimeError: an input requires grad while grad is enabled; `ExactMMATE` has gradients.

    Reference: linmu_ops/reference/exact_step.py.
    """
    d = Dims("exact_step")
    d("q", q, "B H P", FLOATS)
    acc = accumulate_dtype(q.dtype)
    d("k", k, "B G P", q.dtype)
    d.divides("k", "G", "H")
    d("v", v, "B G P", q.dtype)
    d("keys", keys, "B G n P", q.dtype)
    d("values", values, "B G n P", q.dtype)
    d.sizes |= {"H/G": d["H"] // d["G"], "HP": d["H"] * d["P"], "P+1": d["P"] + 1, "s": 0}
    if sinks is not None:
        d.sizes.pop("s")
        d("sinks", sinks, "B s", torch.bool)
    d.sizes["n-s"] = d["n"] - d["s"]
    d("steps", steps, "B G n-s H/G", acc)
    d("seen", seen, "B", torch.int64)
    d("ssm", ssm, "B H P+1 N", acc)
    d("dt", dt, "B H", FLOATS)
    d("dt_bias", dt_bias, "H", FLOATS)
    d("rest", rest, "B H", FLOATS)
    d("c_map", c_map, "H P N", FLOATS)
    d("scale", scale, "H", FLOATS)
    d.optional("z_gate", z_gate, "B HP", q.dtype)
    d.optional("real", real, "B", torch.bool)
    if (cos is None) != (sin is None):
        raise ValueError("exact_step: cos must be given with sin, got one of them")
    if cos is not None:
        rows = "1" if isinstance(cos, Tensor) and cos.dim() == 2 and cos.shape[0] == 1 else "B"
        d.sizes["1"] = 1
        d("cos", cos, f"{rows} R", FLOATS)
        d.optional("sin", sin, f"{rows} R", FLOATS)
        if d["R"] % 2 or d["R"] > d["P"]:
            raise ValueError(f"exact_step: cos must be of even R <= P={d['P']}, got R={d['R']}")
    check_size("exact_step", "window", window)
    check_size("exact_step", "far_limit", far_limit)
    factor = q.shape[2] ** -0.5 if softmax_scale is None else check_number("exact_step", "softmax_scale", softmax_scale)
    check_flags("exact_step", interleaved=interleaved, nothing_beyond=nothing_beyond)
    least = d["s"] + window + min(window, LEAVE)
    if d["n"] < least:
        raise ValueError(f"exact_step: keys must be of n >= {least} places, got {d['n']}")
    given = dict(
        keys=keys, values=values, steps=steps, sinks=sinks, seen=seen, ssm=ssm, k=k, v=v, dt=dt, dt_bias=dt_bias,
        rest=rest, c_map=c_map, scale=scale, cos=cos, sin=sin, z_gate=z_gate, real=real,
    )  # fmt: skip
    d.same_device(q, **given)
    for name in STATE:
        t = given[name]
        if t is not None and not t.is_contiguous():
            raise ValueError(f"exact_step: {name} must be contiguous, got strides {t.stride()}")
    _registry.check_apart("exact_step", *STATE, q=q, **given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, *given.values())):
        raise RuntimeError("exact_step: has no gradient; run it under torch.no_grad(), or use ExactMMATE")
    return run(
        keys, values, steps, sinks, seen, ssm, q, k, v, dt, dt_bias, rest, c_map, scale, cos, sin, z_gate, real, window,
        factor, interleaved, nothing_beyond, far_limit,
    )  # fmt: skip


def run(
    keys: Tensor, values: Tensor, steps: Tensor, sinks: Tensor | None, seen: Tensor, ssm: Tensor, q: Tensor, k: Tensor,
    v: Tensor, dt: Tensor, dt_bias: Tensor, rest: Tensor, c_map: Tensor, scale: Tensor, cos: Tensor | None,
    sin: Tensor | None, *others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op without Python's checks, in the order of its schema: of a block, whose shapes are right."""
    acc = accumulate_dtype(q.dtype)
    c_map = c_map if c_map.dtype == q.dtype else c_map.to(acc)
    for t in (keys, values, steps, sinks, seen):
        if t is not None:
            _registry.mark_written(t)
    cos, sin = (None if t is None else t.to(acc) for t in (cos, sin))
    small = (dt.to(acc), dt_bias.to(acc), rest.to(acc), c_map, scale.to(acc), cos, sin)
    return _registry.call("exact_step", q, keys, values, steps, sinks, seen, ssm, q, k, v, *small, *others)


def _fake(
    keys: Tensor, values: Tensor, steps: Tensor, sinks: Tensor | None, seen: Tensor, ssm: Tensor, q: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2]), seen.new_empty(seen.shape, dtype=torch.bool)


_registry.define_op("exact_step", SCHEMA, reference=reference, fake=_fake)
