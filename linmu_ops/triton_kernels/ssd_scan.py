"""Triton kernels of `ssd_scan`: the chunked form of the scan, both directions from one load of each tile.

    1  chunk states    S[c]   = sum_j e(j -> end of c) dt_j x_j (outer) B_j           one program per (chunk, head)
    2  state pass      h[c]   = state entering chunk c                                one per (head, slice of P N)
    3  output          y_i    = sum_j M_ij x_j + e(start of c -> i) C_i h[c]          one per (chunk, head)
    4  backward        the adjoint of 3 with the states of 1-2 and their adjoints     one per (chunk, head)

e(a -> b) is the product of the decays on the way. Step sizes, log-decays and output weights are prepared per visit in
plain PyTorch (they are P times smaller than x), and PyTorch differentiates that part.
Sums of log-decays are float64 and enter the pair matrix as high + low float32 parts: a difference of two of them is
then as exact as the steps between, however long or steep the chunk is.

A mean is divided by its mass, as a channel of ones would be: sums over the rows of M, and one row more of each state.
Its gradient is that of sums whose weights are divided by the mass, of a dy that has a channel more, `shift`.

What is not finite reaches only the visits that see it. Weights of 0 are therefore selected, never multiplied by, and
products over visits leave such values out and put NaN where they are seen. A visit without step or weight has no part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _autograd
from .._directions import Direction, Reverse, with_own
from ..reference._visits import LEAST_MASS
from ..ssd_scan import ARGUMENTS, DIFFERENTIABLE
from ._ssd_tiles import _exp, _log_decays, _mass, _over_visits, _pair_decays, _rounded, _segments, _state, _tile
from ._visits import checked_order, segment_ids, token_rows
from .ssd_scan_bwd import _bwd_kernel

CHUNK = 64
STATE_BLOCK = 1024


@triton.jit(do_not_specialize=["length", "num_chunks"])
def _chunk_state_kernel(
    state_ptr, decay_ptr, x_ptr, shift_ptr, b_ptr, dt_ptr, a_ptr, w_ptr, order_ptr, seq_ptr,
    length, H, Gx, Gb, P, N, num_chunks, S,
    REVERSE: tl.constexpr, ADJOINT: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SEQ: tl.constexpr,
    HAS_W: tl.constexpr, MASS: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    t = c * Q + tl.arange(0, Q)
    valid = t < length
    row = bh.to(tl.int64) * length
    a = tl.load(a_ptr + row + t, mask=valid, other=0.0)
    last = tl.minimum(c * Q + Q, length) - 1
    edge = tl.minimum(c * Q + Q, length) if REVERSE else c * Q - 1
    out = c * Q if REVERSE else last
    seg, carried = _segments(seq_ptr, b, t, length, edge, valid, HAS_SEQ)
    if HAS_SEQ:
        leaving = tl.load(seq_ptr + b.to(tl.int64) * length + out)
    else:
        leaving = 0
    log, total = _log_decays(a, seg, leaving, HAS_SEQ, REVERSE, Q)
    if ADJOINT:  # what flows from the carried-in state into each output
        flows = valid & (seg == carried)
        scale = _exp(log)
        if HAS_W:
            w = tl.load(w_ptr + row + t, mask=valid, other=0.0)
            flows = flows & (w != 0.0)
            scale *= w
    else:  # what flows from each input into the carried-out state
        step = tl.load(dt_ptr + row + t, mask=valid, other=0.0)
        flows = valid & (seg == leaving) & (step != 0.0)
        scale = _exp(total - log) * step
    rows = token_rows(order_ptr, b, t, valid, length, HAS_ORDER)
    x = _tile(x_ptr, rows, h // (H // Gx), Gx, P, flows, BLOCK_P)
    k = _tile(b_ptr, rows, h // (H // Gb), Gb, N, flows, BLOCK_N)
    scaled = tl.where(flows[:, None], k.to(tl.float32) * scale[:, None], 0.0)
    high, fit = _rounded(scaled, k, 0)
    state = tl.dot(tl.trans(x), high, input_precision="ieee")
    if k.dtype != tl.float32:  # the state is a float32 result: what rounding to 16 bits leaves of its operand counts
        low = scaled / fit[None, :] - high.to(tl.float32)
        state += tl.dot(tl.trans(x), low.to(k.dtype), input_precision="ieee")
    state *= fit[None, :]
    index = bh * num_chunks + c
    offs_p, offs_n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    at = state_ptr + index.to(tl.int64) * S
    inside = (offs_p < P)[:, None] & (offs_n < N)[None, :]
    tl.store(at + offs_p[:, None] * N + offs_n[None, :], state, mask=inside)
    if MASS:
        if ADJOINT:
            scaled *= tl.load(shift_ptr + row + t, mask=flows, other=0.0)[:, None]
        tl.store(at + P * N + offs_n, tl.sum(scaled, axis=0), mask=offs_n < N)
    tl.store(decay_ptr + index, tl.where(carried == leaving, _exp(total), 0.0))


@triton.jit(do_not_specialize=["num_chunks"])
def _state_pass_kernel(
    state_ptr, decay_ptr, initial_ptr, final_ptr, num_chunks, size,
    BACKWARDS: tl.constexpr, HAS_INITIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replaces each chunk's own state by the state that enters it, in the order of visits or against it."""
    bh = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    carry = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        carry = tl.load(initial_ptr + bh * size + offs, mask=inside, other=0.0)
    for i in range(num_chunks):
        c = num_chunks - 1 - i if BACKWARDS else i
        at = state_ptr + (bh * num_chunks + c) * size + offs
        own = tl.load(at, mask=inside, other=0.0)
        tl.store(at, carry, mask=inside)
        decay = tl.load(decay_ptr + bh * num_chunks + c)
        carry = tl.where(decay == 0.0, own, decay * carry + own)
    tl.store(final_ptr + bh * size + offs, carry, mask=inside)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def _output_kernel(
    y_ptr, mass_ptr, x_ptr, b_ptr, c_ptr, rb_ptr, rc_ptr, d_ptr, dt_ptr, a_ptr, w_ptr, rdt_ptr, ra_ptr, rw_ptr,
    h_ptr, r_ptr, order_ptr, seq_ptr, rseq_ptr, length, H, Gx, Gb, Gc, P, N, num_chunks, S, least,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, SHARED: tl.constexpr, HAS_W: tl.constexpr, HAS_RW: tl.constexpr,
    HAS_D: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_RSEQ: tl.constexpr, MASS: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    offs_q = tl.arange(0, Q)
    t = c * Q + offs_q
    valid = t < length
    row = bh.to(tl.int64) * length
    index = bh * num_chunks + c
    rows = token_rows(order_ptr, b, t, valid, length, HAS_ORDER)
    x = _tile(x_ptr, rows, h // (H // Gx), Gx, P, valid, BLOCK_P)
    mix = tl.zeros((Q, Q), tl.float32)
    seen = tl.zeros((Q, Q), tl.int1)
    y = tl.zeros((Q, BLOCK_P), tl.float32)
    total = tl.zeros((Q,), tl.float32)
    if FORWARD:
        k = _tile(b_ptr, rows, h // (H // Gb), Gb, N, valid, BLOCK_N)
        q = _tile(c_ptr, rows, h // (H // Gc), Gc, N, valid, BLOCK_N)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        seg, carried = _segments(seq_ptr, b, t, length, c * Q - 1, valid, HAS_SEQ)
        a = tl.load(a_ptr + row + t, mask=valid, other=0.0)
        log, _ = _log_decays(a, seg, 0, HAS_SEQ, False, Q)
        dt = tl.load(dt_ptr + row + t, mask=valid, other=0.0)
        pairs = (offs_q[:, None] >= offs_q[None, :]) & (seg[:, None] == seg[None, :]) & (dt != 0.0)[None, :]
        arrives = seg == carried
        weight = _pair_decays(log, pairs) * scores * dt[None, :]
        scale = _exp(log)
        if HAS_W:
            w = tl.load(w_ptr + row + t, mask=valid, other=0.0)
            pairs = pairs & (w != 0.0)[:, None]
            arrives = arrives & (w != 0.0)
            weight *= w[:, None]
            scale *= w
        mix = tl.where(pairs, weight, 0.0)
        seen = pairs
        state, fit = _rounded(_state(h_ptr, index, S, P, N, BLOCK_P, BLOCK_N), q, 1)
        carry = tl.dot(q, tl.trans(state), input_precision="ieee") * fit[None, :]
        y += tl.where(arrives[:, None], carry * scale[:, None], 0.0)
        if MASS:
            carried_mass = tl.sum(q.to(tl.float32) * _mass(h_ptr, index, S, P, N, BLOCK_N)[None, :], axis=1)
            total += tl.where(arrives, carried_mass * scale, 0.0)
    if REVERSE:
        if not (SHARED and FORWARD):
            k = _tile(rb_ptr, rows, h // (H // Gb), Gb, N, valid, BLOCK_N)
            q = _tile(rc_ptr, rows, h // (H // Gc), Gc, N, valid, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        rseg, rcarried = _segments(rseq_ptr, b, t, length, tl.minimum(c * Q + Q, length), valid, HAS_RSEQ)
        ra = tl.load(ra_ptr + row + t, mask=valid, other=0.0)
        rlog, _ = _log_decays(ra, rseg, 0, HAS_RSEQ, True, Q)
        rdt = tl.load(rdt_ptr + row + t, mask=valid, other=0.0)
        rpairs = (offs_q[:, None] <= offs_q[None, :]) & (rseg[:, None] == rseg[None, :]) & (rdt != 0.0)[None, :]
        rarrives = rseg == rcarried
        rweight = _pair_decays(rlog, rpairs) * scores * rdt[None, :]
        rscale = _exp(rlog)
        if HAS_RW:
            rw = tl.load(rw_ptr + row + t, mask=valid, other=0.0)
            rpairs = rpairs & (rw != 0.0)[:, None]
            rarrives = rarrives & (rw != 0.0)
            rweight *= rw[:, None]
            rscale *= rw
        mix += tl.where(rpairs, rweight, 0.0)
        seen = seen | rpairs
        rstate, rfit = _rounded(_state(r_ptr, index, S, P, N, BLOCK_P, BLOCK_N), q, 1)
        rcarry = tl.dot(q, tl.trans(rstate), input_precision="ieee") * rfit[None, :]
        y += tl.where(rarrives[:, None], rcarry * rscale[:, None], 0.0)
        if MASS:
            carried_mass = tl.sum(q.to(tl.float32) * _mass(r_ptr, index, S, P, N, BLOCK_N)[None, :], axis=1)
            total += tl.where(rarrives, carried_mass * rscale, 0.0)
    y += _over_visits(mix, x, seen)
    if HAS_D:
        y += tl.load(d_ptr + h) * x.to(tl.float32)
    if MASS:
        total += tl.sum(mix, axis=1)
        if HAS_D:
            total += tl.load(d_ptr + h)
        empty = total < least
        total = tl.where(empty, 0.0, total)
        tl.store(mass_ptr + rows * H + h, total, mask=valid)
        y = tl.where(empty[:, None], 0.0, y / tl.where(empty, 1.0, total)[:, None])
    offs_p = tl.arange(0, BLOCK_P)
    tl.store(
        y_ptr + (rows * H + h)[:, None] * P + offs_p[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=valid[:, None] & (offs_p < P)[None, :],
    )


class Visits(NamedTuple):
    """What one direction does at each visit, (B, H, L) float32: step size, log-decay, output weight (None: 1)."""

    dt: Tensor
    a: Tensor
    w: Tensor | None


def _visit(t: Tensor, order: Tensor | None) -> Tensor:
    """(B, L, H) -> (B, H, L) in visiting order."""
    return (t if order is None else t.gather(1, order[..., None].expand_as(t))).transpose(1, 2).contiguous()


def _directions(i: dict[str, Any]) -> tuple[Direction, Direction]:
    forward = Direction(i["dt"], i["A"], i["B"], i["C"], i["dt_bias"], None, i["seq_idx"])
    return forward, with_own(forward, Reverse(*(i[f"reverse_{name}"] for name in Reverse._fields)))


def _prepare(
    i: dict[str, Any], forward: Direction, reverse: Direction, order: Tensor | None
) -> tuple[Visits | None, Visits | None]:
    """Steps, decays and weights per visit, by differentiable PyTorch."""

    def visit(t: Tensor) -> Tensor:
        return _visit(t, order)

    def steps(d: Direction) -> Tensor:
        raw = d.dt if d.dt_bias is None else d.dt + d.dt_bias
        return visit(F.softplus(raw) if i["dt_softplus"] else raw)

    onward = back = None
    gate, mask = i["gate"], reverse.mask
    keep = None if mask is None else (mask if order is None else mask.gather(1, order))[:, None]
    g = None if gate is None else visit(gate.expand_as(forward.dt) if gate.dim() == 1 else gate)
    if i["direction"] != "reverse":
        step = steps(forward)
        w = None if g is None else g if keep is None else torch.where(keep, g, 1.0)
        onward = Visits(step, step * forward.A[:, None], None if w is None else w.contiguous())
    if i["direction"] != "forward":
        step = steps(reverse)
        if keep is not None:
            step = torch.where(keep, step, 0.0)
        w = None if g is None else 1 - g
        if keep is not None:
            w = keep.to(step.dtype) if w is None else torch.where(keep, w, 0.0)
        back = Visits(step, step * reverse.A[:, None], None if w is None else w.expand_as(step).contiguous())
    return onward, back


class _Launch:
    """Contiguous inputs, sizes and flags of one call, and the launches that forward and backward share."""

    def __init__(self, inputs: dict[str, Any], chunk_size: int) -> None:
        i = self.inputs = inputs
        self.B, self.L, self.H = i["dt"].shape
        self.P, self.N, self.mass = i["x"].shape[3], i["B"].shape[3], i["normalize"]
        self.Q = max(16, min(CHUNK, triton.next_power_of_2(chunk_size or CHUNK)))
        self.num_chunks = triton.cdiv(self.L, self.Q)
        self.order = checked_order("ssd_scan", i["token_order"])
        forward, reverse = _directions(i)
        self.shared = i["reverse_B"] is None and i["reverse_C"] is None
        self.x, self.D = i["x"].contiguous(), i["D"]
        self.b, self.c, self.rb, self.rc = (d.contiguous() for d in (forward.B, forward.C, reverse.B, reverse.C))
        self.seq = segment_ids(forward.seq_idx, self.order)
        self.rseq = segment_ids(reverse.seq_idx, self.order, reverse=True)
        self.forward, self.reverse = _prepare(i, forward, reverse, self.order)

    @property
    def sizes(self) -> tuple[int, ...]:
        i = self.inputs
        groups = (i["x"].shape[2], i["B"].shape[2], i["C"].shape[2])
        return self.L, self.H, *groups, self.P, self.N, self.num_chunks, self.rows * self.N

    @property
    def rows(self) -> int:
        """Of a state."""
        return self.P + self.mass

    @property
    def blocks(self) -> dict[str, int]:
        side = lambda n: max(16, triton.next_power_of_2(n))  # noqa: E731
        P, N = side(self.P), side(self.N)
        return dict(Q=self.Q, BLOCK_P=P, BLOCK_N=N, num_warps=8 if P * N >= 128 * 64 else 4)

    def flags(self) -> dict[str, Any]:
        return dict(
            FORWARD=self.forward is not None, REVERSE=self.reverse is not None, SHARED=self.shared,
            HAS_W=self.forward is not None and self.forward.w is not None,
            HAS_RW=self.reverse is not None and self.reverse.w is not None, HAS_D=self.D is not None,
            HAS_ORDER=self.order is not None, HAS_SEQ=self.seq is not None, HAS_RSEQ=self.rseq is not None,
            MASS=self.mass, **self.blocks,
        )  # fmt: skip

    def states(
        self, x: Tensor, k: Tensor, visits: Visits, initial: Tensor | None, *, reverse: bool,
        adjoint: bool, shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The state entering each chunk (B H, chunks, rows, N), and the one leaving the last; float32.

        Adjoint: the gradient of the state leaving each chunk, and of the one entering the first.
        """
        count = self.B * self.H
        states = torch.empty(count, self.num_chunks, self.rows, self.N, dtype=torch.float32, device=x.device)
        decays = torch.empty(count, self.num_chunks, dtype=torch.float32, device=x.device)
        final = torch.empty(self.B, self.H, self.rows, self.N, dtype=torch.float32, device=x.device)
        seq = self.rseq if reverse else self.seq
        if self.num_chunks:
            _chunk_state_kernel[(self.num_chunks, count)](
                states, decays, x, shift, k, visits.dt, visits.a, visits.w, self.inputs["token_order"], seq,
                self.L, self.H, x.shape[2], k.shape[2], self.P, self.N, self.num_chunks, self.rows * self.N,
                REVERSE=reverse, ADJOINT=adjoint, HAS_ORDER=self.order is not None, HAS_SEQ=seq is not None,
                HAS_W=visits.w is not None, MASS=self.mass, **self.blocks,
            )  # fmt: skip
        size = self.rows * self.N
        _state_pass_kernel[(count, triton.cdiv(size, STATE_BLOCK))](
            states, decays, None if initial is None else initial.contiguous(), final, self.num_chunks, size,
            BACKWARDS=reverse != adjoint, HAS_INITIAL=initial is not None, BLOCK=STATE_BLOCK,
        )  # fmt: skip
        return states, final

    def entering(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """States entering each chunk in each direction, and the final state of the direction that has one."""
        initial = self.inputs["initial_state"]
        h = r = final = None
        if self.forward is not None:
            h, final = self.states(self.x, self.b, self.forward, initial, reverse=False, adjoint=False)
        if self.reverse is not None:
            start = initial if self.forward is None else None
            r, last = self.states(self.x, self.rb, self.reverse, start, reverse=True, adjoint=False)
            final = last if final is None else final
        return h, r, final

    def visit_pointers(self) -> tuple[Tensor | None, ...]:
        nothing = (None, None, None)
        return (*(self.forward or nothing), *(self.reverse or nothing))


def ssd_scan(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of the dispatcher op `linmu::ssd_scan`."""
    *inputs, return_final_state, for_gradient, chunk_size = args
    run = _Launch(dict(zip(ARGUMENTS, inputs, strict=True)), chunk_size)
    y = run.x.new_empty(run.B, run.L, run.H, run.P, dtype=torch.float32 if run.mass and for_gradient else run.x.dtype)
    mass = run.x.new_empty((run.B, run.L, run.H) if run.mass else 0, dtype=torch.float32)
    h, r, final = run.entering()
    if max(y.numel(), mass.numel()):
        _output_kernel[(run.num_chunks, run.B * run.H)](
            y, mass, run.x, run.b, run.c, run.rb, run.rc, run.D, *run.visit_pointers(), h, r, run.inputs["token_order"],
            run.seq, run.rseq, *run.sizes, LEAST_MASS, **run.flags(),
        )  # fmt: skip
    assert final is not None
    return y, mass, final if return_final_state else run.x.new_empty(0, dtype=torch.float32)


def _sum_groups(per_head: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    B, L, H, size = per_head.shape
    return per_head.view(B, L, groups, H // groups, size).sum(3).to(dtype)


class _Mean(NamedTuple):
    """What a mean's gradient adds, per visit, (B, H, L) float32."""

    inverse: Tensor  # 1 / mass, 0 where there is no mean
    dot: Tensor  # dy . y
    own: Tensor  # mass times its gradient

    @staticmethod
    def of(run: _Launch, grad_y: Tensor, grad_mass: Tensor | None, y: Tensor, mass: Tensor) -> _Mean:
        empty = mass == 0
        inverse = torch.where(empty, 0.0, 1 / mass)
        dot = torch.where(empty, 0.0, (grad_y * y).sum(-1))
        own = torch.zeros_like(mass) if grad_mass is None else torch.where(empty, 0.0, grad_mass * mass)
        return _Mean(*(_visit(t, run.order) for t in (inverse, dot, own)))

    def weighed(self, visits: Visits) -> Visits:
        w = self.inverse
        if visits.w is not None:  # without weight a visit has no part, whatever its mass
            w = torch.where((w == 0) | (visits.w == 0), 0.0, visits.w * w)
        return visits._replace(w=w.contiguous())


def ssd_scan_bwd(
    grad_y: Tensor, grad_mass: Tensor | None, grad_final_state: Tensor | None, y: Tensor | None, mass: Tensor | None,
    *args: Any,
) -> list[Tensor]:  # fmt: skip
    """Arguments and results of the dispatcher op `linmu::ssd_scan_bwd`."""
    *inputs, chunk_size = args
    given = dict(zip(ARGUMENTS, inputs, strict=True))
    small = ("dt", "A", "dt_bias", "reverse_dt", "reverse_A", "reverse_dt_bias", "gate")
    with _autograd.recording():
        given = dict(zip(given, _autograd.ordinary([*given.values()]), strict=True))
        leaves = {n: given[n].detach().requires_grad_() for n in small if given[n] is not None}
        run = _Launch({**given, **leaves}, chunk_size)
    graph = [t for v in (run.forward, run.reverse) if v is not None for t in v]
    run.forward = None if run.forward is None else Visits(*(None if t is None else t.detach() for t in run.forward))
    run.reverse = None if run.reverse is None else Visits(*(None if t is None else t.detach() for t in run.reverse))
    shift = mean = None
    dy = grad_y.contiguous()
    if y is not None and mass is not None:
        mean = _Mean.of(run, dy, grad_mass, y, mass)
        shift = mean.own - mean.dot
        run.forward = None if run.forward is None else mean.weighed(run.forward)
        run.reverse = None if run.reverse is None else mean.weighed(run.reverse)
        # That of a 16-bit output, in float32. Nothing of a visit without a mean is looked at.
        dy = torch.where((mass == 0)[..., None], 0.0, dy).to(run.x.dtype)

    h, r, _ = run.entering()
    dh = dr = d_initial = None
    if run.forward is not None:
        dh, d_initial = run.states(dy, run.c, run.forward, grad_final_state, reverse=False, adjoint=True, shift=shift)
    if run.reverse is not None:
        seed = grad_final_state if run.forward is None else None
        dr, d_start = run.states(dy, run.rc, run.reverse, seed, reverse=True, adjoint=True, shift=shift)
        d_initial = d_start if d_initial is None else d_initial

    f32 = dict(dtype=torch.float32, device=dy.device)
    per_head = lambda n: torch.empty(run.B, run.L, run.H, n, **f32)  # noqa: E731
    per_visit = lambda: torch.empty(run.B, run.H, run.L, **f32)  # noqa: E731
    dx, db, dc = per_head(run.P), per_head(run.N), per_head(run.N)
    two = run.forward is not None and run.reverse is not None and not run.shared
    drb, drc = (per_head(run.N), per_head(run.N)) if two else (db, dc)
    visits = [per_visit() for _ in range(6)]
    dd = per_visit() if run.D is not None else None
    if dx.numel():
        _bwd_kernel[(run.num_chunks, run.B * run.H)](
            dx, db, dc, drb, drc, *visits, dd, dy, *(mean or (None, None, None)), run.x, run.b, run.c, run.rb, run.rc,
            run.D, *run.visit_pointers(), h, dh, r, dr, run.inputs["token_order"], run.seq, run.rseq, *run.sizes,
            **run.flags(),
        )  # fmt: skip
    used = visits[: 3 if run.forward is not None else 0] + (visits[3:] if run.reverse is not None else [])
    if mean is not None:  # the weight that the kernel saw was divided by the mass
        used = [g * mean.inverse if i % 3 == 2 else g for i, g in enumerate(used)]
    pairs = [(t, g) for t, g in zip(graph, used, strict=True) if t is not None and t.requires_grad]
    found = torch.autograd.grad([t for t, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    grads = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}
    dtype = run.x.dtype
    grads["x"] = _sum_groups(dx, given["x"].shape[2], dtype)
    for name, per_direction in (("B", (db, drb)), ("C", (dc, drc))):
        groups, own = given[name].shape[2], given[f"reverse_{name}"]
        forward_grad, reverse_grad = (_sum_groups(g, groups, torch.float32) for g in per_direction)
        if not two:  # both directions, or the only one, are in the same buffer
            forward_only = run.reverse is None or own is None
            nothing = torch.zeros_like(forward_grad)
            forward_grad, reverse_grad = (forward_grad, nothing) if forward_only else (nothing, forward_grad)
        grads[name] = (forward_grad if own is not None or not two else forward_grad + reverse_grad).to(dtype)
        if own is not None:
            grads[f"reverse_{name}"] = reverse_grad.to(dtype)
    if dd is not None:
        grads["D"] = dd.sum((0, 2))
    if given["initial_state"] is not None:
        grads["initial_state"] = d_initial
    empty = run.x.new_empty(0)
    return [grads[n].contiguous() if given[n] is not None else empty.clone() for n in DIFFERENTIABLE]
