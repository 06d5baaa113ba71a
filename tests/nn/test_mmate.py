"""The modules against the definition, and what every user of an attention layer expects of them."""

from __future__ import annotations

import dataclasses
import json

import definition
import pytest
import torch
from torch import nn

from linmu_ops import MMATE, MMATEConfig, TokenLayout

DIM, HEADS, GROUPS, P = 12, 4, 2, 4
# Windows that the blocks exceed, so that shifts and partial windows occur.
SMALL = dict(window=(2, 2, 2), image_window=(1, 2, 3))
OPTIONS = {
    "default": {},
    "no_rotary": dict(rotary=False),
    "interleaved": dict(rotary_interleaved=True),
    "causal": dict(reverse=False),
    "separate": dict(reverse_projections="separate"),
    "token_gate": dict(gate="token"),
    "in_place": dict(major_scan=False),
    "long_memory": dict(initial_decay=(0.9, 0.999)),
    "conv": dict(conv_width=4),
    "conv_separate": dict(conv_width=3, reverse_projections="separate"),
    "z_gate": dict(z_gate=True),
    "relu2": dict(feature_map="relu2"),
    "hedgehog": dict(feature_map="hedgehog", head_norm=True),
    "hedgehog_separate": dict(feature_map="hedgehog", head_norm=True, reverse_projections="separate"),
    "wide": dict(feature_map="hedgehog", feature_dim=11, head_norm=True),
    "wide_exact": dict(
        feature_map="hedgehog", feature_dim=16, normalizer=True, mix="softmax", causal_windows=True, text_window=3
    ),
    "head_norm": dict(head_norm=True),
    "skip": dict(skip=True),
    "no_shift": dict(shift_alternate=False),
    "mask": dict(wrap="mask"),
    "same_window": dict(image_window=None),
    "bias": dict(relative_bias=True, image_window=None),
    "text_window": dict(text_window=3),
    "channel": dict(mix="channel"),
    "token_mix": dict(mix="token"),
    "softmax_mix": dict(mix="softmax"),
    "causal_windows": dict(causal_windows=True),
    "normalizer": dict(feature_map="relu2", normalizer=True),
    "normalizer_exact": dict(
        feature_map="hedgehog", normalizer=True, mix="softmax", causal_windows=True, text_window=3, sink_tokens=2,
        z_gate=True, reverse_projections="separate",
    ),
    "exact": dict(mix="softmax", causal_windows=True, text_window=3, sink_tokens=2, head_norm=True, z_gate=True),
    "exact_conv": dict(
        mix="softmax", text_window=4, sink_tokens=5, conv_width=4, norm="rms", relative_bias=True, image_window=None
    ),
    "rms": dict(norm="rms"),
    "layer": dict(norm="layer", mix="channel"),
    "no_swin": dict(swin=False, norm="rms"),
    "no_flex": dict(flex=False),
    "all": dict(
        reverse_projections="separate", gate="token", conv_width=4, z_gate=True, head_norm=True, skip=True,
        text_window=5, mix="token", norm="layer",
    ),
}  # fmt: skip


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


def build(layer_idx=1, dtype=torch.float64, perturb=0.3, **options):
    """A block with every parameter moved off its neutral start."""
    config = MMATEConfig(**{**SMALL, **options})
    block = MMATE(DIM, HEADS, GROUPS, P, layer_idx=layer_idx, qkv_bias=True, out_bias=True, qk_norm=Norm, config=config)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(perturb * torch.randn_like(p))
    return block.to(dtype)


def prompt(batch=2, seed=0, dtype=torch.float64):
    """Hidden states, rotary and blocks: text, video, text, image, text; the second row one image with gaps."""
    g = torch.Generator().manual_seed(seed)
    L = 24
    z = torch.randn(batch, L, DIM, generator=g, dtype=torch.float64).to(dtype)
    angle = torch.randn(batch, L, 1, generator=g, dtype=torch.float64)
    cos, sin = angle.cos().expand(-1, -1, 2).to(dtype), angle.sin().expand(-1, -1, 2).to(dtype)
    blocks = [
        [((3, 1, 3), list(range(2, 11))), ((1, 2, 3), list(range(13, 19)))],
        [((1, 3, 2), [4, 5, 7, 8, 10, 11])],
    ]
    return z, (cos, sin), blocks[:batch]


def layout_of(blocks, length):
    table = [(row, *size) for row, many in enumerate(blocks) for size, _ in many]
    return TokenLayout(table, [p for many in blocks for _, positions in many for p in positions], len(blocks), length)


def rows(block, z, rotary, blocks):
    return torch.stack(
        [definition.mmate(block, z[i], blocks[i], tuple(t[i] for t in rotary)) for i in range(len(blocks))]
    )


@pytest.mark.parametrize(
    "options, layer_idx", [({}, i) for i in range(4)] + [(o, 1) for o in OPTIONS.values()], ids=[*"0123", *OPTIONS]
)
def test_definition(options, layer_idx):
    block = build(layer_idx, **options)
    z, rotary, blocks = prompt()
    got = block(z, layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    torch.testing.assert_close(got, rows(block, z, rotary, blocks), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("branch, rule", [("flex", definition.flex_ma), ("swin", definition.local_swin)])
def test_a_branch_alone(branch, rule):
    """FlexMA and LocalSwin are modules of their own, with their own part of the state."""
    block = build(conv_width=4)
    module = getattr(block, branch)
    z, rotary, blocks = prompt()
    call = dict(layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    expected = torch.stack([rule(module, z[i], blocks[i], tuple(t[i] for t in rotary)) for i in range(2)])
    out, state = module(z, **call, return_state=True)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    _, both = block(z, **call, return_state=True)
    kept = ("ssm", "conv") if branch == "flex" else ()
    for name in state._fields:
        assert torch.equal(getattr(state, name), getattr(both, name)) if name in kept else getattr(state, name) is None
    with torch.no_grad():
        step = tuple(t[:, :1] for t in rotary)
        more = module(z[:, :1], position_embeddings=step, state=both)
        again = rule(module, torch.cat((z[0], z[0, :1])), blocks[0], tuple(torch.cat((t[0], t[0, :1])) for t in rotary))
        torch.testing.assert_close(more[0, 0], again[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_learns(options):
    block = build(**options)
    z, rotary, blocks = prompt()
    z.requires_grad_()
    out = block(z, layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    (out * torch.randn_like(out)).sum().backward()
    dead = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    assert z.grad.isfinite().all()


def test_every_parameter_learns_from_the_start():
    """Neutral starts must not be saddle points: no new parameter has a zero gradient at its initial value."""
    config = MMATEConfig(**{**SMALL, **OPTIONS["all"]})
    block = MMATE(DIM, HEADS, GROUPS, P, config=config).double()
    z, rotary, blocks = prompt()
    out = block(z, layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    (out * torch.randn_like(out)).sum().backward()
    assert not [name for name, p in block.named_parameters() if not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("name", ["default", "all", "no_flex", "exact", "normalizer_exact"])
def test_text_sees_nothing_later(name):
    block = build(**OPTIONS[name])
    z, (cos, sin), blocks = prompt(1)
    L = z.shape[1]
    changed = z.repeat(L, 1, 1)  # row i differs from row 0 from token i on
    for later in range(1, L):
        changed[later, later:] = torch.randn_like(z[0, later:])
    layout = layout_of(blocks * L, L)
    out = block(changed, layout=layout, position_embeddings=(cos, sin))
    text = ~layout.visual_mask()[0]
    for later in range(1, L):
        moved = (out[later] - out[0]).abs().amax(-1)
        assert moved[:later][text[:later]].max() < 1e-12
        assert moved[later:].max() > 0 or (name == "no_flex" and text[later:].all())


def pieces(t, cuts):
    return [t[:, a:b] for a, b in zip([0, *cuts], [*cuts, t.shape[1]], strict=True)]


@pytest.mark.parametrize("grad", [False, True], ids=["in_place", "grad"])
@pytest.mark.parametrize(
    "name", ["default", "all", "no_swin", "no_flex", "conv", "exact", "exact_conv", "normalizer_exact"]
)
def test_cached_is_uncached(name, grad):
    """Prefill, a later chunk with an image, then single tokens: the same outputs as in one call."""
    block = build(**OPTIONS[name])
    z, rotary, blocks = prompt(1)
    L = z.shape[1]
    whole = block(z, layout=layout_of(blocks, L), position_embeddings=rotary)
    video, image = blocks[0]
    cuts = [12, 20, *range(21, L)]
    state, out = block.init_state(1), []
    addresses = [t.data_ptr() for t in state if t is not None]
    with torch.set_grad_enabled(grad):
        chunks = zip([0, *cuts], pieces(z, cuts), *(pieces(t, cuts) for t in rotary), strict=True)
        for start, piece, cos, sin in chunks:
            end = start + piece.shape[1]
            inside = [(s, [p - start for p in ps]) for s, ps in (video, image) if start <= ps[0] < end]
            layout = layout_of([inside], piece.shape[1])
            before = state
            y, state = block(piece, layout=layout, position_embeddings=(cos, sin), state=state, return_state=True)
            assert (state is before) == (not grad)
            out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-9, atol=1e-9)
    if not grad:
        assert [t.data_ptr() for t in state if t is not None] == addresses


@pytest.mark.parametrize("cuts", [[9], [3, 5], range(1, 25)], ids=["chunks", "short", "steps"])
@pytest.mark.parametrize("name", ["conv", "text_window", "normalizer_exact", "exact_conv"])
def test_gradients_flow_through_the_state(name, cuts):
    block = build(**OPTIONS[name])
    z, rotary, _ = prompt(1)
    z.requires_grad_()
    whole = block(z, position_embeddings=rotary)
    (grad,) = torch.autograd.grad(whole.square().sum(), z)
    cuts = [cut for cut in cuts if cut < z.shape[1]]
    state, out = None, []
    for piece, *turn in zip(pieces(z, cuts), *(pieces(t, cuts) for t in rotary), strict=True):
        y, state = block(piece, position_embeddings=tuple(turn), state=state, return_state=True)
        out.append(y)
    (chunked,) = torch.autograd.grad(torch.cat(out, 1).square().sum(), z)
    torch.testing.assert_close(chunked, grad)


@pytest.mark.parametrize("name", ["default", "conv"])
def test_a_backward_pass_does_not_read_a_state_that_was_overwritten(name):
    block = build(**OPTIONS[name])
    z, rotary, _ = prompt(1)
    step = dict(position_embeddings=tuple(t[:, :1] for t in rotary))
    with torch.no_grad():
        _, state = block(z, position_embeddings=rotary, return_state=True)
    out = block(z[:, :1], **step, state=state)
    with torch.no_grad():
        block(z[:, :1], **step, state=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_state_of_something_else_is_refused_untouched():
    block = build(**OPTIONS["normalizer_exact"]).requires_grad_(False)
    z, rotary, _ = prompt(1)
    step = dict(position_embeddings=tuple(t[:, :1] for t in rotary))
    for state, line in (
        (block.init_state(2), "MMATE: state.ssm must have B=1 rows, got 2"),
        (build(**{**OPTIONS["normalizer_exact"], "text_window": 4}).init_state(1), "state.keys must be of .* 5 tokens"),
    ):
        before = [t.clone() for t in state if t is not None]
        with torch.no_grad(), pytest.raises(ValueError, match=line):
            block(z[:, :1], **step, state=state)
        assert all(torch.equal(a, b) for a, b in zip((t for t in state if t is not None), before, strict=True))


def test_the_first_state_is_of_the_weights_precision():
    """Though some parameters of a half precision block are float32; and autocast may begin with a state at hand."""
    block = build(**OPTIONS["exact_conv"], dtype=torch.float32).requires_grad_(False)
    z, rotary, _ = prompt(1)
    z, turn = z.float(), tuple(t.float() for t in rotary)
    whole = block(z, position_embeddings=turn)
    for first, second in ((False, True), (True, False)):
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=first):
                cut = tuple(t[:, :9] for t in turn)
                _, state = block(z[:, :9], position_embeddings=cut, state=block.init_state(1), return_state=True)
            for i in range(9, z.shape[1]):
                with torch.autocast("cpu", torch.bfloat16, enabled=second):
                    out = block(z[:, i : i + 1], position_embeddings=tuple(t[:, i : i + 1] for t in turn), state=state)
        torch.testing.assert_close(out.float()[:, 0], whole[:, -1], rtol=0.1, atol=0.1 * float(whole.abs().max()))
    half = block.bfloat16()
    half.norm.float()
    state = half.init_state(1)
    assert state.keys.dtype == state.conv.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("name", ["default", "all", "conv", "exact", "exact_conv", "softmax_mix", "normalizer_exact"])
@torch.no_grad()
def test_padding(name, side):
    """A batch of different lengths is each row alone, then and in later steps."""
    block = build(**OPTIONS[name])
    z, (cos, sin), blocks = prompt()
    L, pad = z.shape[1], 3
    kept = {"left": range(pad, L), "right": range(L - pad), "inside": [0, *range(1 + pad, L)]}[side]
    short = len(kept)
    alone = [((s), [p - 2 for p in ps]) for s, ps in blocks[1]]  # row 1, shorter by `pad`
    moved = [(s, [kept[p] for p in ps]) for s, ps in alone]
    mask = torch.ones(2, L, dtype=torch.bool)
    mask[1] = False
    mask[1, list(kept)] = True
    junk = z.clone()
    junk[1, list(kept)] = z[1, :short]
    cs = [t.clone() for t in (cos, sin)]
    for t, original in zip(cs, (cos, sin), strict=True):
        t[1, list(kept)] = original[1, :short]
    out, state = block(
        junk, layout=layout_of([blocks[0], moved], L), position_embeddings=cs, attention_mask=mask, return_state=True
    )
    one, one_state = block(
        z[1:, :short], layout=layout_of([alone], short), position_embeddings=(cos[1:, :short], sin[1:, :short]),
        return_state=True,
    )  # fmt: skip
    torch.testing.assert_close(out[1:, list(kept)], one)
    assert out.isfinite().all()
    new, turn = torch.randn(2, 2, DIM, dtype=z.dtype), (cos[:, :2], sin[:, :2])
    chunk_mask = torch.tensor([[True, True], [False, True]])  # the second turn is padded as well
    for at, mask in ((slice(0, 1), None), (slice(0, 2), chunk_mask), (slice(0, 1), torch.tensor([[False], [True]]))):
        real = [mask is None or bool(m) for m in (mask[1] if mask is not None else [True])]
        rot = tuple(t[:, at] for t in turn)
        out = block(new[:, at], position_embeddings=rot, attention_mask=mask, state=state)
        one = block(new[1:, at][:, real], position_embeddings=tuple(t[1:][:, real] for t in rot), state=one_state)
        torch.testing.assert_close(out[1:][:, real], one)
        assert out.isfinite().all()


@pytest.mark.parametrize("name", ["all", "exact", "normalizer_exact"])
def test_a_finished_row_keeps_its_state(name):
    block = build(**OPTIONS[name]).requires_grad_(False)
    z, rotary, _ = prompt()
    _, state = block(z, position_embeddings=rotary, return_state=True)
    before = [t.clone() for t in state if t is not None]
    step = (z[:, :1], tuple(t[:, :1] for t in rotary))
    with torch.no_grad():
        block(step[0], position_embeddings=step[1], attention_mask=torch.tensor([[True], [False]]), state=state)
    kept = [t for t in state if t is not None]
    for a, b in zip(kept, before, strict=True):
        assert torch.equal(a[1], b[1])
    assert not torch.equal(kept[0][0], before[0][0])


@pytest.mark.parametrize("name", ["all", "exact_conv", "normalizer_exact"])
def test_state_is_constant_and_moves_with_beams(name):
    block = build(**OPTIONS[name])
    z, rotary, _ = prompt()
    sizes = []
    for L in (2, 24):
        _, state = block(z[:, :L], position_embeddings=tuple(t[:, :L] for t in rotary), return_state=True)
        sizes.append([t.shape for t in state if t is not None])
    assert sizes[0] == sizes[1] == [t.shape for t in block.init_state(2) if t is not None]
    assert state.ssm.shape == (2, HEADS, P + 8 * block.config.normalizer, P)
    index = torch.tensor([1, 1, 0])
    for moved, rows in ((state.reorder(index), index), (state.repeat(2), [0, 0, 1, 1])):
        assert all(b is None or torch.equal(a, b[rows]) for a, b in zip(moved, state, strict=True))
    assert block.init_state(2, dtype=torch.bfloat16).ssm.dtype == torch.float32


def test_a_block_made_from_attention_is_that_attention_where_nothing_is_beyond():
    """And still is when everything but its attention weights has changed."""
    torch.manual_seed(0)
    config = MMATEConfig(mix="softmax", causal_windows=True, text_window=16, sink_tokens=4, window=(3, 4, 4))
    block = MMATE(DIM, HEADS, GROUPS, P, qkv_bias=True, config=config).double()
    for own, other in (("c", "q"), ("b", "k"), ("x", "v")):
        getattr(block.flex, f"{own}_proj").load_state_dict(getattr(block.swin, f"{other}_proj").state_dict())
    z = torch.randn(2, 24, DIM, dtype=torch.float64)
    layout = layout_of([[((2, 1, 3), list(range(2, 8)))], [((1, 2, 3), [4, 5, 7, 8, 10, 11])]], 24)
    q, k, v = (t.transpose(1, 2) for t in block.swin._projected(z))
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    attention = block.flex.o_proj(y.transpose(1, 2).flatten(2))
    beyond = torch.arange(24) > 15 + 2  # tokens 0 and 1 are sinks, 2 and 3 are visual
    for _ in range(2):
        out = block(z, layout=layout)
        torch.testing.assert_close(out[0, ~beyond], attention[0, ~beyond])
        assert (out[0, beyond] - attention[0, beyond]).abs().max() > 1e-3
        with torch.no_grad():
            for name, p in block.flex.named_parameters():
                if "o_proj" not in name:
                    p.add_(torch.randn_like(p))
            block.mix_rest.weight.normal_()


@pytest.mark.parametrize("name", ["exact", "normalizer_exact"])
def test_the_mix_is_fitted_to_the_mass_beyond_the_window(name):
    block = build(**OPTIONS[name])
    z, rotary, blocks = prompt()
    call = dict(layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    inside, rest, beyond = block.swin.mass_beyond(z, **call)
    for i in range(2):
        _, mask, mass = definition.near_attention(block.swin, z[i], blocks[i], tuple(t[i] for t in rotary))
        every = definition.near_attention(block.swin, z[i], blocks[i], tuple(t[i] for t in rotary), causal=True)[2]
        torch.testing.assert_close(inside[i].exp(), mass.sum(-1).T)
        torch.testing.assert_close(rest[i].exp(), (every.sum(-1) - mass.sum(-1)).T, rtol=1e-6, atol=1e-9)
        assert torch.equal(beyond[i], (torch.ones_like(mask).tril() & ~mask).sum(1))
    use = beyond > 0

    def error(at=use):
        known = beyond[..., None].log() if name == "exact" else block.flex.log_total(z, **call)
        share = (inside - block.mix_rest(z) - known).sigmoid()
        return (share - (inside - rest).sigmoid())[at].abs().mean()

    before = error()
    batches = [(dict(hidden_states=z, **call), torch.randn_like(z))]
    block.calibrate(batches)
    assert error() < 0.5 * before
    few = use & (use.flatten().cumsum(0).view_as(use) % 5 == 0)
    before = error(few)
    block.calibrate(batches, [few.float()])
    assert error(few) < before


def test_branches_can_be_switched_off():
    block = build(norm="rms")
    z, rotary, blocks = prompt()
    call = dict(layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    both = block(z, **call)
    for branch in ("flex", "swin"):
        setattr(block, f"{branch}_enabled", False)
        torch.testing.assert_close(block(z, **call), rows(block, z, rotary, blocks), rtol=1e-9, atol=1e-9)
        setattr(block, f"{branch}_enabled", True)
    assert torch.equal(block(z, **call), both)


def test_grid_is_a_layout():
    block = build(window=(2, 2, 2), image_window=None)
    z = torch.randn(2, 24, DIM, dtype=torch.float64)
    layout = TokenLayout.from_grid((2, 3, 4), 2)
    assert torch.equal(block(z, grid=(2, 3, 4)), block(z, layout=layout))


def test_config_is_json():
    config = MMATEConfig(**OPTIONS["all"], initial_decay=(0.9, 0.99))
    assert MMATEConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_initial_decay():
    for decay in (0.985, (0.9, 0.999)):
        flex = MMATE(DIM, HEADS, config=MMATEConfig(initial_decay=decay)).flex
        first, last = MMATEConfig(initial_decay=decay).decays
        got = torch.exp(-nn.functional.softplus(flex.dt_bias) * flex.A_log.exp())
        torch.testing.assert_close(got[[0, -1]], torch.tensor([first, last]))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(norm="batch"), "MMATEConfig: norm must be one of none, rms, layer, got 'batch'"),
        (dict(initial_decay=1.0), r"MMATEConfig: initial_decay must be in \(0, 1\), got 1.0"),
        (dict(feature_map="hedgehog"), 'head_norm must be on with feature_map="hedgehog" and without normalizer'),
        (dict(feature_dim=8), 'feature_dim must be 0 with a feature_map other than "hedgehog", got 8'),
        (dict(normalizer=True), "normalizer must be off without a feature_map, and with skip, got True"),
        (dict(conv_width=1), "MMATEConfig: conv_width must be 0, or 2 to 8, got 1"),
        (dict(window=(4, 4)), r"MMATEConfig: window must be of type tuple\[int, int, int\], got \(4, 4\)"),
        (dict(window=(4, 4, 0)), r"MMATEConfig: window must be three sizes in \[1, 1048576\], got \(4, 4, 0\)"),
        (dict(swin="False"), "MMATEConfig: swin must be of type bool, got 'False'"),
        (dict(text_window="256"), "MMATEConfig: text_window must be of type int, got '256'"),
        (dict(text_window=True), "MMATEConfig: text_window must be of type int, got True"),
        (dict(initial_decay=(0.9, None)), "MMATEConfig: initial_decay must be of type float | tuple"),
        (dict(relative_bias=True), "MMATEConfig: image_window must be None where relative_bias is on"),
        (dict(flex=False, swin=False), "MMATEConfig: swin must be on where flex is off"),
        (dict(mix="softmax", swin=False), 'MMATEConfig: mix must be other than "softmax" where a branch is off'),
        (dict(sink_tokens=4), 'MMATEConfig: sink_tokens must be 0 without mix="softmax" and text_window, got 4'),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MMATEConfig(**options)


def test_errors():
    block = build()
    z = torch.randn(2, 6, DIM, dtype=torch.float64)
    layout = TokenLayout.from_grid((1, 2, 3), 2)
    with pytest.raises(ValueError, match=r"MMATE: hidden_states must be \(B, L, D\) with D=12"):
        block(z[..., :5])
    with pytest.raises(ValueError, match=r"MMATE: layout must be for \(B, L\) = \(2, 5\), got \(2, 6\)"):
        block(z[:, :5], layout=layout)
    with pytest.raises(ValueError, match="MMATE: layout must be None where grid is given"):
        block(z, layout=layout, grid=(1, 2, 3))
    with pytest.raises(TypeError, match="MMATE: attention_mask must be bool, got int64"):
        block(z, attention_mask=torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"MMATE: attention_mask must be \(B, L\) = \(2, 6\)"):
        block(z, attention_mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="MMATE: num_kv_heads must divide num_heads=4, got 3"):
        MMATE(DIM, 4, 3)
    with pytest.raises(ValueError, match="MMATE: num_heads must divide dim=12 where head_dim is not given, got 5"):
        MMATE(DIM, 5)
