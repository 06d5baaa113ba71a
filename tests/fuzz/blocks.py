"""Random blocks: either, with any options against its definition, in pieces, token by token, and in padded batches."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st

from linmu_ops import MMATE, ExactConfig, ExactMMATE, MMATEConfig, TokenLayout

from .tensors import seeds

WINDOWS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)).map(list)
DECAYS = st.sampled_from((0.5, 0.9999, (0.9, 0.999)))
# Values of options that are no switch; and of the facts of a teacher.
VALUES: dict[str, st.SearchStrategy[Any]] = dict(
    branches=st.sampled_from(("flex", "swin")), far=st.just("delta"), feature_dim=st.sampled_from((4, 8, 11)),
    initial_decay=DECAYS, initial_scale=st.sampled_from((0.5, 8.0)), window=WINDOWS, image_window=st.none() | WINDOWS,
    text_window=st.integers(1, 9), sink_tokens=st.integers(0, 5), kept_tokens=st.integers(0, 6),
)  # fmt: skip


def options_of(config: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    fields = dataclasses.fields(config)
    switches = {f.name: st.just(not f.default) for f in fields if isinstance(f.default, bool)}
    return st.fixed_dictionaries(
        {}, optional=switches | {f.name: VALUES[f.name] for f in fields if f.name not in switches}
    )


options = st.tuples(st.just("MMATE"), options_of(MMATEConfig)) | st.tuples(
    st.just("ExactMMATE"), options_of(ExactConfig)
)
facts = st.fixed_dictionaries({}, optional=dict(interleaved_rotary=st.just(True), causal_windows=st.booleans()))
# Of a row: [text before, gaps, sizes] of each block, then text.
rows = st.tuples(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 2), st.tuples(*[st.integers(1, 3)] * 3).map(list)).map(list),
        max_size=2,
    ),
    st.integers(1, 6),
).map(list)  # fmt: skip
cases = st.fixed_dictionaries(dict(
    seed=seeds, options=options, facts=facts, layer_idx=st.integers(0, 5),
    heads=st.sampled_from(([1, 1], [2, 1], [2, 2], [4, 2])), head_dim=st.sampled_from((2, 4, 6)),
    rotary=st.integers(0, 3), qk_norm=st.booleans(), bias=st.booleans(), rows=st.lists(rows, min_size=1, max_size=3),
))  # fmt: skip
DIM = 10


@functools.cache
def definition() -> Any:
    path = Path(__file__).parents[1] / "nn" / "definition.py"
    spec = importlib.util.spec_from_file_location("definition", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(case: dict[str, Any]) -> MMATE | ExactMMATE:
    """A block in float64, every parameter moved off its neutral start."""
    name, given = case["options"]
    kind, block_class = {"MMATE": (MMATEConfig, MMATE), "ExactMMATE": (ExactConfig, ExactMMATE)}[name]
    small = {} if given.get("branches") == "flex" else dict(window=(2, 2, 2), image_window=(1, 2, 3))
    try:
        config = kind(**small | given)
    except ValueError:
        reject()
    torch.manual_seed(case["seed"])
    H, G = case["heads"]
    norm = functools.partial(torch.nn.RMSNorm, eps=1e-6) if case["qk_norm"] else None
    block = block_class(
        DIM, H, G, case["head_dim"], layer_idx=case["layer_idx"], qkv_bias=case["bias"], out_bias=case["bias"],
        qk_norm=norm, config=config, **case["facts"],
    )  # fmt: skip
    with torch.no_grad():
        if isinstance(block, ExactMMATE):
            block.share.bias.zero_()  # it starts where what is far hardly counts
            block.far_limit.fill_(case["seed"] % 9 + 1)
        for p in block.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return block.double()


def blocks_of(row: list[Any], generator: torch.Generator) -> tuple[list[Any], int]:
    """[(sizes, positions)] and the length of a row; text lies within a block where it has gaps."""
    found, at = [], 0
    for before, gaps, sizes in row[0]:
        at += before
        n = math.prod(sizes)
        slots = torch.randperm(n + gaps, generator=generator)[:n].sort().values + at
        found.append((tuple(sizes), slots.tolist()))
        at += n + gaps
    return found, at + row[1]


def layout_of(blocks: list[list[Any]], length: int) -> TokenLayout:
    table = [(i, *sizes) for i, many in enumerate(blocks) for sizes, _ in many]
    return TokenLayout(table, [p for many in blocks for _, at in many for p in at], len(blocks), length)


class Prompt:
    """Hidden states, rotary embeddings and blocks of each row of the case, of its own length."""

    def __init__(self, case: dict[str, Any]) -> None:
        g = self.generator = torch.Generator().manual_seed(case["seed"])
        self.blocks, self.z, self.turns = [], [], []
        R = min(case["rotary"], case["head_dim"] // 2)
        for row in case["rows"]:
            blocks, length = blocks_of(row, g)
            self.blocks.append(blocks)
            self.z.append(torch.randn(length, DIM, generator=g, dtype=torch.float64))
            angle = torch.randn(length, R, generator=g, dtype=torch.float64)
            if case["facts"].get("interleaved_rotary"):
                angle = angle.repeat_interleave(2, -1)
            else:
                angle = torch.cat((angle, angle), -1)
            self.turns.append((angle.cos(), angle.sin()))

    def call(self, i: int, start: int = 0, end: int | None = None) -> dict[str, Any]:
        """Arguments of a call on a part of row i."""
        end = len(self.z[i]) if end is None else end
        inside = [(s, [p - start for p in ps]) for s, ps in self.blocks[i] if start <= ps[0] < end]
        cos, sin = (t[None, start:end] for t in self.turns[i])
        layout = layout_of([inside], end - start) if inside else None
        return dict(hidden_states=self.z[i][None, start:end], layout=layout, position_embeddings=(cos, sin))

    def batch(self, side: str, extra: int) -> tuple[Any, ...]:
        """(z, rotary embeddings, mask, blocks, positions of each row's tokens), with NaN at padding on this side."""
        B, L = len(self.z), max(map(len, self.z)) + extra
        z = torch.full((B, L, DIM), float("nan"), dtype=torch.float64)
        turns = tuple(torch.zeros(B, L, self.turns[0][0].shape[1], dtype=torch.float64) for _ in range(2))
        mask, blocks, kept = torch.zeros(B, L, dtype=torch.bool), [], []
        for i, row in enumerate(self.z):
            spare = L - len(row)
            first = {"left": spare, "right": 0, "both": spare // 2, "text": 0}[side]
            at = list(range(first, first + len(row)))
            if side == "text":  # anywhere
                at = torch.randperm(L, generator=self.generator)[: len(row)].sort().values.tolist()
            kept.append(at)
            z[i, at], mask[i, at] = row, True
            for t, own in zip(turns, self.turns[i], strict=True):
                t[i, at] = own
            blocks.append([(s, [at[p] for p in ps]) for s, ps in self.blocks[i]])
        return z, turns, mask, blocks, kept


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def defined(case: dict[str, Any]) -> None:
    """The whole forward is that of the definition."""
    block, prompt = build(case), Prompt(case)
    for i in range(len(prompt.z)):
        turn = prompt.turns[i]
        close(block(**prompt.call(i))[0], definition().block(block, prompt.z[i], prompt.blocks[i], turn))


carried_cases = st.tuples(cases, st.lists(st.integers(1, 60), max_size=4), st.booleans()).map(
    lambda c: c[0] | dict(cuts=c[1], grad=c[2])
)


def carried(case: dict[str, Any]) -> None:
    """Prefill in pieces, then token by token, is one call; so are the gradients where the state carries them."""
    block, prompt = build(case), Prompt(case)
    z = prompt.z[0]
    if case["grad"]:
        z.requires_grad_()
    whole = block(**prompt.call(0))
    ends = [(min(ps), max(ps) + 1) for _, ps in prompt.blocks[0]]
    last = max((b for _, b in ends), default=0)
    cuts = {c % len(z) for c in case["cuts"]} | set(range(last + 1, len(z)))
    cuts = [0, *sorted(c for c in cuts if c > 0 and not any(a < c < b for a, b in ends)), len(z)]
    state, found = block.init_state(1), []
    with torch.set_grad_enabled(case["grad"]):
        for a, b in itertools.pairwise(cuts):
            y, state = block(**prompt.call(0, a, b), state=state, return_state=True)
            found.append(y)
    close(torch.cat(found, 1), whole)
    if case["grad"] and whole.requires_grad:  # nothing but text, where no branch reads it
        wrt = [z, *(p for p in block.parameters())]
        weight = torch.randn(whole.shape, generator=prompt.generator, dtype=whole.dtype)
        pairs = zip(*(torch.autograd.grad((y * weight).sum(), wrt, allow_unused=True) for y in (
            torch.cat(found, 1), whole
        )), strict=True)  # fmt: skip
        for p, (got, want) in zip(wrt, pairs, strict=True):
            zero = torch.zeros_like(p)
            got, want = (zero if g is None else g for g in (got, want))
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8 * float(1 + want.abs().max()))


padded_cases = st.tuples(cases, st.sampled_from(("left", "right", "both", "text")), st.integers(0, 3)).map(
    lambda c: c[0] | dict(side=c[1], extra=c[2])
)


@torch.no_grad()
def padded(case: dict[str, Any]) -> None:
    """A batch of rows of different lengths, with NaN at padding, is each row alone, and so are later steps."""
    block, prompt = build(case), Prompt(case)
    z, turns, mask, blocks, kept = prompt.batch(case["side"], case["extra"])
    B, L = mask.shape
    out, state = block(
        z, layout=layout_of(blocks, L), position_embeddings=turns, attention_mask=mask, return_state=True
    )
    assert out.isfinite().all()
    alone = [block(**prompt.call(i), return_state=True) for i in range(B)]
    for i, at in enumerate(kept):
        close(out[i, at], alone[i][0][0])
    new = torch.randn(B, 2, DIM, generator=prompt.generator, dtype=torch.float64)
    turn = tuple(t[:, :1].clone() for t in turns)
    for step in range(2):
        out = block(new[:, step : step + 1], position_embeddings=turn, state=state)
        for i in range(B):
            own = tuple(t[i : i + 1] for t in turn)
            one = block(new[i : i + 1, step : step + 1], position_embeddings=own, state=alone[i][1])
            close(out[i], one[0])


exact = st.tuples(st.just("ExactMMATE"), options_of(ExactConfig))
cut_cases = st.tuples(padded_cases, exact, st.lists(st.integers(1, 200), max_size=6)).map(
    lambda c: c[0] | dict(options=c[1], cuts=c[2])
)


@torch.no_grad()
def cut(case: dict[str, Any]) -> None:
    """A batch that is cut anywhere, within images and videos too, is one call; so are its state, and later steps."""
    block, prompt = build(case), Prompt(case)
    z, turns, mask, blocks, _ = prompt.batch(case["side"], case["extra"])
    B, L = mask.shape
    layout = layout_of(blocks, L)
    whole, after = block(z, layout=layout, position_embeddings=turns, attention_mask=mask, return_state=True)
    state, found = None, []
    for a, b in itertools.pairwise(sorted({0, L, *(c % L for c in case["cuts"])})):
        part = dict(layout=layout.part(a, b), position_embeddings=tuple(t[:, a:b] for t in turns))
        try:
            y, state = block(z[:, a:b], **part, attention_mask=mask[:, a:b], state=state, return_state=True)
        except ValueError as error:
            if case["facts"].get("causal_windows", True) or "must be cut where the windows" not in str(error):
                raise
            reject()  # a window that looks ahead
        found.append(y)
    close(torch.cat(found, 1)[mask], whole[mask])
    for mine, its in zip(state, after, strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            close(mine, its)
    new = torch.randn(B, 2, DIM, generator=prompt.generator, dtype=torch.float64)
    for step in range(2):
        one = dict(hidden_states=new[:, step : step + 1], position_embeddings=tuple(t[:, :1] for t in turns))
        close(block(**one, state=state), block(**one, state=after))


@torch.no_grad()
def packed(case: dict[str, Any]) -> None:
    """A row of several sequences is each of them alone, and a step goes on with the last."""
    block, prompt = build(case), Prompt(case)
    blocks, at = [], 0
    for own, z in zip(prompt.blocks, prompt.z, strict=True):
        blocks += [(sizes, [at + p for p in positions]) for sizes, positions in own]
        at += len(z)
    number = torch.cat([torch.full((len(z),), i, dtype=torch.int32) for i, z in enumerate(prompt.z)])
    turns = tuple(torch.cat(t)[None] for t in zip(*prompt.turns, strict=True))
    out, state = block(
        torch.cat(prompt.z)[None], layout=layout_of([blocks], at) if blocks else None, position_embeddings=turns,
        seq_idx=number[None], return_state=True,
    )  # fmt: skip
    alone = [block(**prompt.call(i), return_state=True) for i in range(len(prompt.z))]
    close(out, torch.cat([one for one, _ in alone], 1))
    step = dict(hidden_states=prompt.z[0][None, :1], position_embeddings=tuple(t[:, :1] for t in turns))
    close(block(**step, state=state), block(**step, state=alone[-1][1]))
