"""The blocks written straight from the paper's equations: one row at a time, dense matrices, Python loops, float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

EPS = 1e-6


def visual_tokens(blocks):
    """[(block, t, y, x, position)] for blocks [((T, H, W), positions)]."""
    out = []
    for i, ((T, H, W), positions) in enumerate(blocks):
        for n, p in enumerate(positions):
            out.append((i, n // (H * W), n // W % H, n % W, p))
        assert len(positions) == T * H * W
    return out


def visit_order(blocks, length, layer):
    """The position visited at each time: the paper's index formulas, within each block's own slots."""
    order = list(range(length))
    for (T, H, W), positions in blocks:
        slots = sorted(positions)
        for n, p in enumerate(positions):
            t, y, x = n // (H * W), n // W % H, n % W
            index = (
                t * H * W + y * W + x, t * H * W + x * H + y, y * T * W + x * T + t, x * T * H + y * T + t,
            )[layer % 4]  # fmt: skip
            order[slots[index]] = p
    return order


def windows(blocks, m):
    """{position: (block, window)} by the rule of the design; {position: (block, its part of the frames)}."""
    window_of, slab_of = {}, {}
    for i, t, y, x, p in visual_tokens(blocks):
        sizes = blocks[i][0]
        full, _, wrap, image, _ = m.layer_windows
        full = image if image and sizes[0] == 1 else full
        number = [i]
        for c, s, w in zip((t, y, x), sizes, full, strict=True):
            h = w // 2 if m.shape.layer_idx % 2 else 0
            w = min(w, s)
            h = 0 if w == s else h
            number.append(((c - h) % s // w, wrap == "mask" and c < h))
        window_of[p], slab_of[p] = tuple(number), tuple(number[:2])
    return window_of, slab_of


def rotate(x, rotary, interleaved):
    """x (L, heads, P), cos and sin (L, R)."""
    if rotary is None:
        return x
    cos, sin = rotary
    out, R = x.clone(), cos.shape[-1]
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + R // 2) for i in range(R // 2)]
    for i, j in pairs:
        out[..., i] = x[..., i] * cos[:, None, i] - x[..., j] * sin[:, None, i]
        out[..., j] = x[..., j] * cos[:, None, j] + x[..., i] * sin[:, None, j]
    return out


def scan_matrix(dt, A, B, C, order):
    """M (H, L, L) with y = M x: M[i, j] = C_i . B_j dt_j exp(A sum of dt after j up to i), j visited before i."""
    L, H = dt.shape
    total = torch.zeros_like(dt)
    total[order] = dt[order].cumsum(0)
    M = torch.zeros(H, L, L, dtype=dt.dtype)
    for a, i in enumerate(order):
        for j in order[: a + 1]:
            M[:, i, j] = (C[i] * B[j]).sum(-1) * dt[j] * torch.exp(A * (total[i] - total[j]))
    return M


def heads(t, num_heads, head_dim):
    """(L, G P) -> (L, H, P), each group repeated."""
    t = t.unflatten(-1, (-1, head_dim))
    return t.repeat_interleave(num_heads // t.shape[1], dim=1)


def scan(m, z, blocks=(), rotary=None):
    """What the Scan `m` (float64) gives one row z (L, D): y (L, H, P)."""
    H, P, L = m.shape.num_heads, m.shape.head_dim, len(z)
    order = visit_order(blocks if m.major_scan else (), L, m.shape.layer_idx)
    X = heads(m.x_proj(z), H, P)
    Bs = [p(z) for p in (m.b_proj, m.reverse_b_proj) if p is not None]
    Cs = [p(z) for p in (m.c_proj, m.reverse_c_proj) if p is not None]
    scale = 1 if m.scale is None else m.shape.scale * m.scale[:, None]
    Bs = [rotate(m.b_norm(heads(b, H, P)), rotary, m.shape.interleaved_rotary) for b in Bs]
    Cs = [rotate(m.c_norm(heads(t, H, P)), rotary, m.shape.interleaved_rotary) * scale for t in Cs]
    y = torch.einsum(
        "hij,jhp->ihp", scan_matrix(F.softplus(m.dt_proj(z) + m.dt_bias), -m.A_log.exp(), Bs[0], Cs[0], order), X
    )
    if blocks and m.reverse:
        gate = m.gate.expand(L, H) if m.gate_proj is None else m.gate_proj(z) + m.gate
        gate = gate.sigmoid()[..., None]
        dt = F.softplus(m.reverse_dt_proj(z) + m.reverse_dt_bias)
        mixed = y.clone()
        for _, positions in blocks:
            back = [p for p in reversed(order) if p in positions]
            M = scan_matrix(dt, -m.reverse_A_log.exp(), Bs[-1], Cs[-1], back)
            r = torch.einsum("hij,jhp->ihp", M, X)
            mixed[positions] = (gate * y + (1 - gate) * r)[positions]
        y = mixed
    if m.z_proj is not None:
        y = y * F.silu(heads(m.z_proj(z), H, P))
    if m.head_norm is not None:
        y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * m.head_norm
    return y


def near_attention(m, z, blocks=(), rotary=None):
    """Softmax attention of the Windows `m` under a dense mask: y (L, H, P)."""
    L = len(z)
    scores, v = attention_scores(m, z, rotary)
    window_of, _ = windows(blocks, m)
    mask = torch.zeros(L, L, dtype=torch.bool)
    for i in range(L):
        for j in range(L):
            if i in window_of:
                mask[i, j] = window_of[i] == window_of.get(j) and (j <= i or not m.shape.causal_windows)
            else:
                mask[i, j] = 0 <= i - j < m.text_window
    mass = scores.exp() * mask
    return torch.einsum("hij,jhp->ihp", mass / mass.sum(-1, keepdim=True).clamp(min=1e-300), v)


def attention_scores(m, z, rotary):
    """Of the Windows or NearAttention `m`: scores (H, L, L), values (L, H, P)."""
    H, P = m.shape.num_heads, m.shape.head_dim
    q, k, v = (heads(p(z), H, P) for p in (m.q_proj, m.k_proj, m.v_proj))
    q, k = (rotate(t, rotary, m.shape.interleaved_rotary) for t in (m.q_norm(q), m.k_norm(k)))
    return torch.einsum("ihp,jhp->hij", q, k) * m.shape.scale, v


def steps_entered(score, sinks, c, m):
    """At which step each of L tokens enters the state, one head's scores (L,): never, as long as it is kept or near."""
    L, kept = len(score), []
    entered = [math.inf] * L
    for step in range(1, L // c + 1):
        pool = kept + [j for j in range((step - 1) * c, step * c) if j not in sinks]
        best = sorted(pool, key=lambda j: (-score[j].item(), j))  # of equals the earlier stays
        kept = sorted(best[:m])
        for j in best[m:]:
            entered[j] = step
    return entered


def sets(m, L, blocks, score):
    """near (L, L), kept and far (G, L, L), [query, key]. They share no token; score (L, G)."""
    sizes, (window_of, slab_of) = m.windows.sizes, windows(blocks, m.windows)
    c, w, G = sizes.leave, sizes.window, score.shape[1]
    sinks = [j for j in range(min(L, sizes.sinks)) if j not in window_of]
    begin = {slab: min(p for p in slab_of if slab_of[p] == slab) for slab in set(slab_of.values())}
    near, kept, far = torch.zeros(L, L).bool(), torch.zeros(G, L, L).bool(), torch.zeros(G, L, L).bool()
    entered = [steps_entered(score[:, g], sinks, c, sizes.kept) for g in range(G)]
    for i in range(L):
        visual = i in window_of
        first = begin[slab_of[i]] if visual else None
        read = (first if visual else max(i + 1 - w, 0)) // c
        for j in range(L):
            left = j // c + 1
            if visual and window_of[i] == window_of.get(j):
                near[i, j] = j <= i or not m.shape.causal_windows
            elif j <= i and m.windows.nothing_beyond and not visual:
                near[i, j] = i - j < w
            elif j <= i and j in sinks:
                near[i, j] = True
            elif j <= i and left > read:
                near[i, j] = not visual or j < first or j not in window_of  # else it is beside, and in no set
            elif j <= i:
                for g in range(G):
                    kept[g, i, j], far[g, i, j] = read < entered[g][j], entered[g][j] <= read
    assert not (near & (kept | far)).any() and not (kept & far).any()
    return near, kept, far, entered


def far_mean(m, q, k, v, dt, far, entered):
    """What the scan of an ExactMMATE gives of what is far: y and what stands for its weight, (H, L, P) and (H, L)."""
    s, (L, H, _), G = m.scan, q.shape, m.shape.num_kv_heads
    B = (k[..., None, :] @ s.b_map.repeat_interleave(H // G, dim=0)).squeeze(-2).softmax(-1)
    C = ((q[..., None, :] @ s.c_map).squeeze(-2) * (m.shape.scale * s.scale)[:, None]).softmax(-1)
    weights = torch.zeros(H, L, L, dtype=v.dtype)
    for h in range(H):
        g = h * G // H
        order = sorted((j for j in range(L) if entered[g][j] < math.inf), key=lambda j: (entered[g][j], j))
        for i in range(L):
            spent = 0.0
            for j in reversed([j for j in order if far[g, i, j]]):  # what entered later decays what did before
                weights[h, i, j] = (C[i, h] * B[j, h]).sum() * dt[j, h] * torch.exp(torch.as_tensor(-spent))
                spent = spent + dt[j, h] * s.A_log[h].exp()
    total = weights.sum(-1)
    return torch.einsum("hij,jhp->ihp", weights / total.clamp(min=1e-300)[..., None], v), total


def far_delta(m, q, k, v, dt, far, entered):
    """The same by the gated delta rule, whose weight is the number of what is far."""
    s, (L, H, P), G = m.scan, q.shape, m.shape.num_kv_heads
    B = (k[..., None, :] @ s.b_map.repeat_interleave(H // G, dim=0)).squeeze(-2)
    C = (q[..., None, :] @ s.c_map).squeeze(-2)
    B, C = (t / (t.square().sum(-1, keepdim=True) + EPS).sqrt() for t in (B, C))
    y = torch.zeros(L, H, P, dtype=v.dtype)
    for h in range(H):
        g, state, done = h * G // H, torch.zeros(B.shape[-1], P, dtype=v.dtype), []
        order = sorted((j for j in range(L) if entered[g][j] < math.inf), key=lambda j: (entered[g][j], j))
        for j in [None, *order]:
            if j is not None:
                rate = dt[j, h] * s.beta_bias[h].exp()
                state = torch.exp(-dt[j, h] * s.A_log[h].exp()) * state
                state = state + rate / (1 + rate) * torch.outer(B[j, h], v[j, h] - state.T @ B[j, h])
                done.append(j)
            for i in range(L):
                if [j for j in order if far[g, i, j]] == done:
                    y[i, h] = s.scale[h] * (state.T @ C[i, h])
    return y, far.sum(-1).repeat_interleave(H // G, dim=0)


def exact_mmate(m, z, blocks=(), rotary=None):
    """Output of the ExactMMATE `m` (float64) for one row z (L, D)."""
    H, P, L, G = m.shape.num_heads, m.shape.head_dim, len(z), m.shape.num_kv_heads
    s = m.scan
    dt = F.softplus(s.dt_proj(z) + s.dt_bias)  # (L, H)
    near, kept, far, entered = sets(m, L, blocks, dt.unflatten(1, (G, -1)).sum(-1))
    scores, v = attention_scores(m.windows, z, rotary)
    mass = scores.exp() * (near | kept).repeat_interleave(H // G, dim=0)
    y = torch.einsum("hij,jhp->ihp", mass / mass.sum(-1, keepdim=True), v)
    k = m.windows.k_norm(heads(m.windows.k_proj(z), H, P))
    q = m.windows.q_norm(heads(m.windows.q_proj(z), H, P))
    q, k = (rotate(t, rotary, m.shape.interleaved_rotary) for t in (q, k))
    far_of = far_delta if m.config.far == "delta" else far_mean
    mean, total = far_of(m, q, k, v, dt, far, entered)
    if s.z_proj is not None:
        mean = mean * F.silu(heads(s.z_proj(z), H, P))
    within = (m.far_limit / far.sum(-1).double()).clamp(max=1).repeat_interleave(H // G, dim=0)
    inside, outside = mass.sum(-1).T, (m.share(z).T.exp() * total * within).T
    share = (inside / (inside + outside))[..., None]
    return m.o_proj((share * y + (1 - share) * mean).flatten(1))


def mmate(m, z, blocks=(), rotary=None):
    """Output of the MMATE `m` (float64) for one row z (L, D)."""
    L, flex, swin = len(z), None, None
    attends = torch.zeros(L, dtype=torch.bool)
    attends[[p for _, positions in blocks for p in positions]] = True
    if m.config.text_window:
        attends[:] = True
    if m.scan is not None and m.scan_enabled:
        flex = m.scan_o_proj(scan(m.scan, z, blocks, rotary).flatten(1))
    if m.windows is not None and m.windows_enabled:
        y = m.windows_o_proj(near_attention(m.windows, z, blocks, rotary).flatten(1))
        swin = torch.where(attends[:, None], y, 0)
    if flex is None or swin is None:
        out = swin if flex is None else flex
    else:
        share = (m.mix if m.mix_proj is None else m.mix + m.mix_proj(z)).sigmoid()
        out = torch.where(attends[:, None], share * flex + (1 - share) * swin, flex)
    return out if m.norm.weight is None else F.layer_norm(out, (m.dim,), m.norm.weight, m.norm.bias, EPS)


def block(m, z, blocks=(), rotary=None):
    """Output of either block."""
    return (exact_mmate if hasattr(m, "share") else mmate)(m, z, blocks, rotary)
