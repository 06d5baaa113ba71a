"""The modules against the definition, and what every user of an attention layer expects of them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import definition
import pytest
import torch
from blocks import DIM, GROUPS, HEADS, OPTIONS, P, build, layout_of, pieces, prompt, rows
from torch import nn

from linmu_ops import MMATE, ExactConfig, ExactMMATE, MMATEConfig, TokenLayout
from linmu_ops.nn import EXACT, LITERAL, PAPER
from linmu_ops.nn.config import decay_range

EXACTS = [name for name, config in OPTIONS.items() if isinstance(config, ExactConfig)]
FACTS = {
    "interleaved": dict(interleaved_rotary=True),
    "causal": dict(causal_windows=True),
    "free": dict(causal_windows=False),
}


def option_texts(config):
    """The part of a config's docstring that belongs to each option, in its order."""
    found, name = {}, None
    for line in config.__doc__.splitlines():
        start = re.match(r" {8}(\w+): ", line)
        if start:
            name = start[1]
        if line.startswith("        ") and name:
            found[name] = f"{found.get(name, '')} {line.strip()}"
    return found


def tables_and_rows():
    """Of every measured table, the names of its rows, from its page."""
    pages = Path(__file__).parents[2] / "bench" / "reports"
    return {page.stem: re.findall(r"^\| ([\w.-]+) \|", page.read_text(), re.M) for page in pages.glob("*.md")}


@pytest.mark.parametrize(
    "name, layer_idx", [(n, i) for n in ("default", "exact") for i in range(4)] + [(n, 1) for n in OPTIONS]
)
def test_definition(name, layer_idx):
    block = build(OPTIONS[name], layer_idx)
    z, rotary, blocks = prompt()
    got = block(z, layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    torch.testing.assert_close(got, rows(block, z, rotary, blocks), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
@pytest.mark.parametrize("name", ["default", "exact"])
def test_facts_of_a_teacher(name, facts):
    block = build(OPTIONS[name], **facts)
    z, rotary, blocks = prompt()
    got = block(z, layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    torch.testing.assert_close(got, rows(block, z, rotary, blocks), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_learns(config):
    block = build(config)
    z, rotary, blocks = prompt()
    z.requires_grad_()
    out = block(z, layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    (out * torch.randn_like(out)).sum().backward()
    dead = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    assert z.grad.isfinite().all()


def test_every_parameter_learns_from_the_start():
    """Neutral starts must not be saddle points: no new parameter has a zero gradient at its initial value."""
    block = MMATE(DIM, HEADS, GROUPS, P, config=OPTIONS["all"]).double()
    z, rotary, blocks = prompt()
    out = block(z, layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    (out * torch.randn_like(out)).sum().backward()
    assert not [name for name, p in block.named_parameters() if not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("name", ["default", "all", "no_flex", "exact", "exact_wide", "exact_delta"])
def test_text_sees_nothing_later(name):
    block = build(OPTIONS[name])
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


@pytest.mark.parametrize("grad", [False, True], ids=["in_place", "grad"])
@pytest.mark.parametrize("name", ["default", "all", "no_swin", "no_flex", *EXACTS])
def test_cached_is_uncached(name, grad):
    """Prefill, a later chunk with an image, then single tokens: the same outputs as in one call."""
    block = build(OPTIONS[name])
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
@pytest.mark.parametrize("name", ["default", "text_window", "exact", "exact_wide", "exact_delta"])
def test_gradients_flow_through_the_state(name, cuts):
    block = build(OPTIONS[name])
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


@pytest.mark.parametrize("name", ["default", "exact"])
def test_a_backward_pass_does_not_read_a_state_that_was_overwritten(name):
    block = build(OPTIONS[name])
    z, rotary, _ = prompt(1)
    step = dict(position_embeddings=tuple(t[:, :1] for t in rotary))
    with torch.no_grad():
        _, state = block(z, position_embeddings=rotary, return_state=True)
    out = block(z[:, :1], **step, state=state)
    with torch.no_grad():
        for _ in range(5):
            block(z[:, :1], **step, state=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_state_of_something_else_is_refused_untouched():
    block = build(OPTIONS["exact"]).requires_grad_(False)
    z, rotary, _ = prompt(1)
    step = dict(position_embeddings=tuple(t[:, :1] for t in rotary))
    for state, line in (
        (block.init_state(2), "ExactMMATE: state.ssm must have B=1 rows, got 2"),
        (
            build(dataclasses.replace(OPTIONS["exact"], text_window=4)).init_state(1),
            "state.keys must be of 10 tokens, as the options say, got 12",
        ),
    ):
        before = [t.clone() for t in state if t is not None]
        with torch.no_grad(), pytest.raises(ValueError, match=line):
            block(z[:, :1], **step, state=state)
        assert all(torch.equal(a, b) for a, b in zip((t for t in state if t is not None), before, strict=True))


def test_the_first_state_is_of_the_weights_precision():
    """Though some parameters of a half precision block are float32; and autocast may begin with a state at hand."""
    block = build(OPTIONS["exact"], dtype=torch.float32).requires_grad_(False)
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
    state = block.bfloat16().init_state(1)
    assert state.keys.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("name", ["default", "all", *EXACTS])
@torch.no_grad()
def test_padding(name, side):
    """A batch of different lengths is each row alone, then and in later steps."""
    block = build(OPTIONS[name])
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


@pytest.mark.parametrize("name", ["all", "exact", "exact_wide", "exact_delta"])
def test_a_finished_row_keeps_its_state(name):
    block = build(OPTIONS[name]).requires_grad_(False)
    z, rotary, _ = prompt()
    _, state = block(z, position_embeddings=rotary, return_state=True)
    before = [t.clone() for t in state if t is not None]
    step = (z[:, :1], tuple(t[:, :1] for t in rotary))
    with torch.no_grad():
        block(step[0], position_embeddings=step[1], attention_mask=torch.tensor([[True], [False]]), state=state)
    kept = [t for t in state if t is not None]
    for a, b in zip(kept, before, strict=True):
        assert torch.equal(a[1], b[1])
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(kept, before, strict=True))


@pytest.mark.parametrize("name", ["all", "exact", "exact_wide", "exact_delta"])
def test_state_is_constant_and_moves_with_beams(name):
    block = build(OPTIONS[name])
    z, rotary, _ = prompt()
    sizes = []
    for L in (2, 24):
        _, state = block(z[:, :L], position_embeddings=tuple(t[:, :L] for t in rotary), return_state=True)
        sizes.append([t.shape for t in state if t is not None])
    assert sizes[0] == sizes[1] == [t.shape for t in block.init_state(2) if t is not None]
    assert state.ssm.shape == (2, HEADS, *block.scan.state_size)
    index = torch.tensor([1, 1, 0])
    for moved, kept in ((state.reorder(index), index), (state.repeat(2), [0, 0, 1, 1])):
        assert all(b is None or torch.equal(a, b[kept]) for a, b in zip(moved, state, strict=True))
    assert block.init_state(2, dtype=torch.bfloat16).ssm.dtype == torch.float32


@pytest.mark.parametrize("kept", [0, 5])
def test_a_block_made_from_attention_is_that_attention_where_nothing_is_far(kept):
    """And still is when everything but its attention weights has changed."""
    torch.manual_seed(0)
    config = ExactConfig(text_window=8, sink_tokens=4, kept_tokens=kept, window=(3, 4, 4))
    block = ExactMMATE(DIM, HEADS, GROUPS, P, qkv_bias=True, config=config).double()
    z = torch.randn(2, 40, DIM, dtype=torch.float64)
    layout = layout_of([[((2, 1, 3), list(range(2, 8)))], [((1, 2, 3), [4, 5, 7, 8, 10, 11])]], 40)
    q, k, v = (t.transpose(1, 2) for t in block.windows.project(z))
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    attention = block.o_proj(y.transpose(1, 2).flatten(2))
    # Eight leave at a time, when as many others are the last eight; tokens 0 and 1 are sinks.
    far = torch.arange(40) >= 15 + (0 if kept < 6 else 8)
    for _ in range(2):
        with torch.no_grad():
            for p in block.scan.parameters():
                p.add_(torch.randn_like(p))
            block.share.weight.normal_()
            block.share.bias.zero_()
        out = block(z, layout=layout)
        torch.testing.assert_close(out[0, ~far], attention[0, ~far])
        assert (out[0, far] - attention[0, far]).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("name", EXACTS)
def test_what_is_far_gains_no_weight_with_a_number_beyond_the_limit(name):
    """Many more far tokens than the limit, all of them alike: the share is that of as many as the limit."""
    block, limit = build(OPTIONS[name]).eval(), 32
    z = torch.randn(1, 1, DIM, dtype=torch.float64).expand(1, 200, DIM)
    shares = {}
    with torch.no_grad():
        block.scan.A_log.fill_(-50.0)  # nothing is forgotten
        for far_limit in (limit, 2**62):
            block.far_limit.fill_(far_limit)
            near, mean, _ = block._far_mass(z, block._call(z, None, None, None, None, None, False, None))
            shares[far_limit] = (block._rest(z, near.far) + mean.log_total)[0]
    far = near.far[0]
    assert far.max() > 4 * limit
    few, at_limit = far <= limit, far == far[far <= limit].max()
    assert torch.equal(shares[limit][few], shares[2**62][few])
    assert not torch.isclose(shares[2**62][-1], shares[2**62][at_limit][0]).any()
    if OPTIONS[name].far == "scan":
        want = shares[2**62][at_limit][0] + (limit / far[at_limit][0]).log()
        torch.testing.assert_close(shares[limit][-1], want, rtol=1e-6, atol=1e-6)


def test_a_block_that_was_saved_before_there_was_a_limit_has_none():
    """And a part of a block's tensors, as adapters are, leaves the limit as it is."""
    block = build(OPTIONS["exact"])
    old = {name: tensor for name, tensor in block.state_dict().items() if name != "far_limit"}
    block.load_state_dict({name: tensor for name, tensor in old.items() if "scan" in name}, strict=False)
    assert block.far_limit == 4 and "far_limit" not in old
    nn.ModuleList([block]).load_state_dict({f"0.{name}": tensor for name, tensor in old.items()})
    assert block.far_limit == 2**62


@pytest.mark.parametrize("name", EXACTS)
def test_the_share_is_fitted_to_the_mass_of_what_is_far(name, monkeypatch):
    monkeypatch.setattr("linmu_ops.nn.exact._CLOSED", 0.0)
    block = build(OPTIONS[name])
    z, rotary, blocks = prompt()
    inputs = dict(layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    call = block._call(z, inputs["layout"], None, rotary, None, None, False, None)
    near, mean, mass = block._far_mass(z, call)
    for i in range(2):
        turned, scan = tuple(t[i] for t in rotary), block.scan
        by = nn.functional.softplus(scan.dt_proj(z[i]) + scan.dt_bias).unflatten(1, (GROUPS, -1)).sum(-1)
        *exact, far, _ = definition.sets(block, z.shape[1], blocks[i], by)
        scores = definition.attention_scores(block.windows, z[i], turned)[0].exp()
        for found, tokens in ((near.lse[i], exact[0] | exact[1]), (mass[i], far)):
            wanted = scores * tokens.repeat_interleave(HEADS // GROUPS, dim=0)
            torch.testing.assert_close(found.exp(), wanted.sum(-1).T)
        assert all(torch.equal(near.far[i], tokens.sum(1)) for tokens in far)
    use = near.far > 0

    def error(at=use):
        share = (near.lse - block.share(z) - mean.log_total).sigmoid()
        return (share - (near.lse - mass).sigmoid())[at].abs().mean()

    before = error()
    batches = [(dict(hidden_states=z, **inputs), torch.randn_like(z))]
    block.calibrate(batches)
    assert error() < 0.5 * before
    assert block.far_limit == near.far.max()
    few = use & (use.flatten().cumsum(0).view_as(use) % 5 == 0)
    before = error(few)
    block.calibrate(batches, [few.float()])
    assert error(few) < before


def test_branches_can_be_switched_off():
    block = build(OPTIONS["literal"])
    z, rotary, blocks = prompt()
    call = dict(layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)
    both = block(z, **call)
    for branch in ("scan", "windows"):
        setattr(block, f"{branch}_enabled", False)
        torch.testing.assert_close(block(z, **call), rows(block, z, rotary, blocks), rtol=1e-9, atol=1e-9)
        setattr(block, f"{branch}_enabled", True)
    assert torch.equal(block(z, **call), both)


def test_grid_is_a_layout():
    block = build(OPTIONS["same_window"])
    z = torch.randn(2, 24, DIM, dtype=torch.float64)
    layout = TokenLayout.from_grid((2, 3, 4), 2)
    assert torch.equal(block(z, grid=(2, 3, 4)), block(z, layout=layout))


@pytest.mark.parametrize("config", [*OPTIONS.values(), PAPER, LITERAL, EXACT])
def test_config_is_json(config):
    assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_initial_decay():
    for decay in (0.985, (0.9, 0.999)):
        scan = MMATE(DIM, HEADS, config=MMATEConfig(initial_decay=decay)).scan
        got = torch.exp(-nn.functional.softplus(scan.dt_bias) * scan.A_log.exp())
        torch.testing.assert_close(got[[0, -1]], torch.tensor(decay_range(decay)))


def test_the_literal_start_is_mamba2s():
    """-A uniform in [1, 16], dt log-uniform in [0.001, 0.1], and its projection a linear map's own start."""
    scan = MMATE(64, 64, config=LITERAL).scan
    for proj, bias, A_log in scan._directions():
        dt = nn.functional.softplus(bias)
        assert 1e-3 <= dt.min() < 4e-3 and 3e-2 < dt.max() <= 0.1001
        assert 1 <= A_log.exp().min() < 4 and 12 < A_log.exp().max() <= 16
        assert 0 < proj.weight.std() < 1 / math.sqrt(64)
    assert scan.scale is None and scan.reverse_c_proj is not None and scan.gate_proj is not None


def test_presets_are_what_they_say():
    """`LITERAL` departs from `PAPER` in what the paper states, and in nothing else."""
    changed = {k for k, v in dataclasses.asdict(LITERAL).items() if v != getattr(PAPER, k)}
    assert changed == {"literal", "initial_decay", "initial_scale"}
    block = MMATE(DIM, HEADS, config=LITERAL)
    assert block.norm.kind == "layer" and block.mix_proj is not None
    with pytest.raises(ValueError, match="MMATE: calibrate must not be called with literal=True"):
        block.calibrate([])


@pytest.mark.parametrize(
    "config, options, message",
    [
        (MMATEConfig, dict(branches="none"), "MMATEConfig: branches must be one of both, flex, swin, got 'none'"),
        (MMATEConfig, dict(initial_decay=1.0), r"MMATEConfig: initial_decay must be in \[0.0001, 1\), got 1.0"),
        (ExactConfig, dict(initial_decay=1e-30), r"initial_decay must be in \[0.0001, 1\), got 1e-30"),
        (ExactConfig, dict(initial_decay=(0.5, float("nan"))), r"initial_decay must be in \[0.0001, 1\), got "),
        (MMATEConfig, dict(window=(4, 4)), r"window must be of type tuple\[int, int, int\], got \(4, 4\)"),
        (MMATEConfig, dict(window=(4, 4, 0)), r"MMATEConfig: window must be three sizes in .*, got \(4, 4, 0\)"),
        (MMATEConfig, dict(reverse="False"), "MMATEConfig: reverse must be of type bool, got 'False'"),
        (MMATEConfig, dict(text_window="256"), "MMATEConfig: text_window must be of type int, got '256'"),
        (MMATEConfig, dict(text_window=True), "MMATEConfig: text_window must be of type int, got True"),
        (MMATEConfig, dict(initial_decay=(0.9, None)), "MMATEConfig: initial_decay must be of type float"),
        (MMATEConfig, dict(initial_scale=float("nan")), r"initial_scale must be in \[0.0001, 10000.0\], got nan"),
        (ExactConfig, dict(initial_scale=1e300), r"initial_scale must be in \[0.0001, 10000.0\], got 1e\+300"),
        (MMATEConfig, dict(branches="flex", text_window=8), 'text_window must be left out with branches="flex", got 8'),
        (MMATEConfig, dict(branches="swin", reverse=False), 'reverse must be left out with branches="swin"'),
        (MMATEConfig, dict(branches="swin", z_gate=True), 'z_gate must be left out with branches="swin", got True'),
        (ExactConfig, dict(text_window=0), r"ExactConfig: text_window must be in \[1, 1048576\], got 0"),
        (ExactConfig, dict(sink_tokens=-1), r"ExactConfig: sink_tokens must be in \[0, 1048576\], got -1"),
        (ExactConfig, dict(feature_dim=10**12), r"ExactConfig: feature_dim must be in \[0, 4096\]"),
        (ExactConfig, dict(far="attention"), "ExactConfig: far must be scan or delta, got 'attention'"),
        (ExactConfig, dict(far="delta", initial_scale=3.0), 'initial_scale must be left out with far="delta", got 3.0'),
        (ExactConfig, dict(initial_decay=None), "ExactConfig: initial_decay must be of type float"),
    ],
)
def test_config_errors(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_every_option_names_what_justifies_it():
    """An equation, algorithm or table of the paper, or the table and row that measured it."""
    tables = tables_and_rows()
    for config in (MMATEConfig, ExactConfig):
        names = [f.name for f in dataclasses.fields(config)]
        assert len(names) <= 12
        words = option_texts(config)
        assert list(words) == names
        for name, text in words.items():
            cited = re.findall(r"`(\w+)/([\w.-]+)`", text)
            assert cited or re.search(r"Eq\. \d|Algorithm \d|Table \d", text), name
            for table, row in cited:
                assert row in tables[table], (name, table, row)


def test_errors():
    block = build(OPTIONS["default"])
    z = torch.randn(2, 6, DIM, dtype=torch.float64)
    layout = TokenLayout.from_grid((1, 2, 3), 2)
    with pytest.raises(ValueError, match=r"MMATE: hidden_states must be \(B, L, D\) with D=12"):
        block(z[..., :5])
    with pytest.raises(TypeError, match=r"MMATE: hidden_states must be of a float dtype, got int64"):
        block(torch.zeros(2, 5, 12, dtype=torch.long))
    cos = torch.zeros(1, 5, 2)
    for rotary in ((cos, cos[:, :4]), (cos[0], cos), (cos, torch.zeros(1, 5, 99)), (cos.expand(3, 5, 2), cos)):
        with pytest.raises(ValueError, match=r"MMATE: position_embeddings must be cos and sin .* L=5, R <= "):
            block(z[:, :5], position_embeddings=rotary)
    with pytest.raises(TypeError, match=r"MMATE: position_embeddings must be a pair, .*, got a Tensor"):
        block(z[:, :5], position_embeddings=cos)
    for sizes, said in ((("12", 4), "dim .* got '12'"), ((-12, 4), "dim .* got -12"), ((12, 0), "num_heads .* got 0")):
        with pytest.raises(ValueError, match=f"MMATE: {said}".replace(" .*", " must be a positive integer,")):
            MMATE(*sizes)
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
    with pytest.raises(TypeError, match="MMATE: config must be a MMATEConfig, got a ExactConfig"):
        MMATE(DIM, 4, config=EXACT)
