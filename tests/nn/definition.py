"""The block written straight from the paper's equations: one row at a time, dense matrices, Python loops, float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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


def windows(blocks, config, layer):
    """{position: (block, window)} by the rule of the design, and {position: in-window coordinate}."""
    window_of, coordinate = {}, {}
    for i, t, y, x, p in visual_tokens(blocks):
        sizes = blocks[i][0]
        full = config.image_window if config.image_window and sizes[0] == 1 else config.window
        shifted = config.shift_alternate and layer % 2
        number, inside = [i], []
        for c, s, w in zip((t, y, x), sizes, full, strict=True):
            h = w // 2 if shifted else 0
            w = min(w, s)
            h = 0 if w == s else h
            number += [(c - h) % s // w, c < h and config.wrap == "mask"]
            inside.append((c - h) % s % w)
        window_of[p], coordinate[p] = tuple(number), tuple(inside)
    return window_of, coordinate


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


def convolve(conv, t, order):
    out = torch.zeros_like(t)
    K = conv.weight.shape[1]
    for a, i in enumerate(order):
        out[i] = conv.bias + sum(conv.weight[:, K - 1 - j] * t[order[a - j]] for j in range(min(K, a + 1)))
    return out


def flex_ma(m, z, blocks=(), rotary=None, near=None):
    """Output of the FlexMA `m` (float64) for one row z (L, D).

    near: (L, H, P) and two masses (L, H), of it and of the rest, the latter in units of the normaliser.
    """
    c, H, P, L = m.config, m.num_heads, m.head_dim, len(z)
    order = visit_order(blocks if c.major_scan else (), L, m.layer_idx)
    projections = [m.x_proj, m.b_proj, m.c_proj, m.reverse_b_proj, m.reverse_c_proj]
    parts = [p(z) for p in projections if p is not None]
    if m.conv is not None:
        parts = [*convolve(m.conv, torch.cat(parts, -1), order).split([p.shape[-1] for p in parts], -1)]
    X, Bs, Cs = heads(parts[0], H, P), parts[1::2], parts[2::2]
    rot, scale = rotary if c.rotary else None, (m.scale * m.softmax_scale)[:, None]
    Bs = [rotate(m.b_norm(heads(b, H, P)), rot, c.rotary_interleaved) for b in Bs]
    Cs = [rotate(m.c_norm(heads(t, H, P)) * scale, rot, c.rotary_interleaved) for t in Cs]
    if c.feature_map == "relu2":
        Bs, Cs = ([t.clamp(min=0) ** 2 for t in ts] for ts in (Bs, Cs))
    if c.feature_map == "hedgehog":
        b_map = m.b_map.repeat_interleave(H // len(m.b_map), dim=0)
        Bs = [(t[..., None, :] @ b_map).squeeze(-2).softmax(-1) for t in Bs]
        Cs = [(t[..., None, :] @ m.c_map).squeeze(-2).softmax(-1) for t in Cs]
    if c.normalizer:
        X = torch.cat([X, torch.ones_like(X[..., :1])], -1)
    y = torch.einsum(
        "hij,jhp->ihp", scan_matrix(F.softplus(m.dt_proj(z) + m.dt_bias), -m.A_log.exp(), Bs[0], Cs[0], order), X
    )
    if blocks and c.reverse:
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
    if c.normalizer:
        total = y[..., -1]
        y = y[..., :-1] / torch.where(total == 0, 1, total)[..., None]
    if m.D is not None:
        y = y + m.D[:, None] * X
    if m.z_proj is not None:
        y = y * F.silu(heads(m.z_proj(z), H, P))
    if m.head_norm is not None:
        y = y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * m.head_norm
    if near is not None:
        near_y, inside, rest = near
        share = (inside / (inside + (rest * total if c.normalizer else rest)))[..., None]
        y = share * near_y + (1 - share) * y
    return m.o_proj(y.flatten(1))


def local_swin(m, z, blocks=(), rotary=None):
    """Output of the LocalSwin `m` (float64) for one row z (L, D)."""
    y, mask, _ = near_attention(m, z, blocks, rotary)
    out = torch.zeros(len(z), m.dim, dtype=z.dtype)
    out[mask.any(1)] = m.o_proj(y.flatten(1))[mask.any(1)]
    return out


def near_attention(m, z, blocks=(), rotary=None, causal=False):
    """Full softmax attention under a dense mask: y (L, H, P), the mask (L, L), the exps of the masked scores.

    causal: all earlier tokens in the place of the window.
    """
    c, H, P, L = m.config, m.num_heads, m.head_dim, len(z)
    q, k, v = (heads(p(z), H, P) for p in (m.q_proj, m.k_proj, m.v_proj))
    q, k = (rotate(t, rotary, c.rotary_interleaved) for t in (m.q_norm(q), m.k_norm(k)))
    scores = torch.einsum("ihp,jhp->hij", q, k) * m.softmax_scale
    window_of, coordinate = windows(blocks, c, m.layer_idx)
    mask = torch.zeros(L, L, dtype=torch.bool)
    for i in range(L):
        for j in range(L):
            if i in window_of:
                mask[i, j] = window_of[i] == window_of.get(j) and (j <= i or not c.causal_windows)
                if m.bias is not None and mask[i, j]:
                    t, y, x = (a - b + w - 1 for a, b, w in zip(coordinate[i], coordinate[j], c.window, strict=True))
                    scores[:, i, j] += m.bias[:, t, y, x]
            else:
                mask[i, j] = 0 <= i - j < c.text_window
            mask[i, j] |= j < min(i, c.sink_tokens) and j not in window_of
    if causal:
        mask = torch.ones_like(mask).tril()
    mass = scores.exp() * mask
    y = torch.einsum("hij,jhp->ihp", mass / mass.sum(-1, keepdim=True).clamp(min=1e-300), v)
    return y, mask, mass


def mmate(m, z, blocks=(), rotary=None):
    """Output of the MMATE `m` (float64) for one row z (L, D)."""
    L, c = len(z), m.config
    if c.mix == "softmax" and m.swin_enabled:
        y, mask, mass = near_attention(m.swin, z, blocks, rotary)
        earlier = torch.ones(L, L, dtype=torch.bool).tril()
        count = (earlier & ~mask).sum(1)[:, None]
        rest = m.mix_rest(z).exp() * ((count > 0) if c.normalizer else count)
        return normed(m, flex_ma(m.flex, z, blocks, rotary, (y, mass.sum(-1).T, rest)))
    has_both = torch.zeros(L, dtype=torch.bool)
    has_both[[p for _, positions in blocks for p in positions]] = True
    if c.text_window:
        has_both[:] = True
    swin = local_swin(m.swin, z, blocks, rotary) if m.swin is not None and m.swin_enabled else None
    flex = flex_ma(m.flex, z, blocks, rotary) if m.flex is not None and m.flex_enabled else None
    if flex is None or swin is None:
        out = swin if flex is None else flex
    else:
        logit = m.mix if m.mix_proj is None else m.mix + m.mix_proj(z)
        out = torch.where(has_both[:, None], logit.sigmoid() * flex + (1 - logit.sigmoid()) * swin, flex)
    return normed(m, out)


def normed(m, out):
    c = m.config
    if c.norm == "rms":
        out = out / (out.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * m.norm.weight
    elif c.norm == "layer":
        out = F.layer_norm(out, (m.dim,), m.norm.weight, m.norm.bias, c.norm_eps)
    return out
