"""A model with attention, on rows split over processes, gives the states and the attention of whole rows."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

import linmu_models
from linmu_distill.packing import pack
from linmu_distill.teacher import model_inputs
from linmu_models import split_attention
from linmu_models.accumulated_attention import each_alone, record_attention
from linmu_models.hooks import attention_modules, decoder_of, record_inputs, record_outputs
from linmu_ops.context_parallel import ContextParallel

from . import tiny

# Grids; features that are added deep inside; windows, and images that are seen both ways; text.
FEW = ("qwen2_5_vl", "qwen3_vl", "gemma3", "qwen2")
HYBRIDS = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "lfm2_vl")


def moved(group, tensors, lengths, shares):
    """Whole rows of this process's heads, and the slab that comes back of them."""
    context = ContextParallel(group, lengths)
    query, key, value = (context.shard(t, 2) for t in tensors)
    q, k, v = split_attention.to_heads(context, query, key, value)
    return q, k, v, split_attention.to_tokens(context, q.transpose(1, 2).contiguous(), shares)


@pytest.mark.parametrize(
    "heads, groups, lengths",
    [(12, 4, [2, 3, 1]), (4, 2, [1, 0, 3, 2]), (2, 1, [2, 1, 2]), (6, 6, [3, 2]), (28, 4, [1, 1, 1, 2])],
)
def test_heads_are_shared_out(gang, heads, groups, lengths):
    """Shares that cut the heads that look at one; slabs of no token; more processes than heads; wider values."""
    n, length = len(lengths), sum(lengths)
    torch.manual_seed(0)
    tensors = [torch.randn(2, h, length, p) for h, p in ((heads, 3), (groups, 3), (groups, 5))]
    shares = split_attention.share_heads(heads, groups, n)
    assert [head for mine, _ in shares for head in mine] == list(range(heads))
    assert max(len(mine) for mine, _ in shares) - min(len(mine) for mine, _ in shares) <= 1
    found = gang(n, moved, tensors, lengths, shares)
    query, key, value = tensors
    for (q, k, v, back), (mine, seen), slab in zip(found, shares, query.split(lengths, 2), strict=True):
        assert torch.equal(q, query[:, list(mine)])
        if mine:
            assert k.shape[1] in (len(mine), len(seen))
            each = len(mine) // k.shape[1]
            looked_at = [head // (heads // groups) for head in mine]
            assert torch.equal(k.repeat_interleave(each, 1), key[:, looked_at])
            assert torch.equal(v.repeat_interleave(each, 1), value[:, looked_at])
        assert torch.equal(back, slab.transpose(1, 2))


def rows_of(family, kind):
    if kind == "packed":
        every = [tiny.example(family, k) for k in tiny.MIXED.get(family, ("text",) * 3)]
        every[-1] = {**every[-1], **tiny.batch(tiny.text_ids(14, 2))} if len(every[-1]) == 2 else every[-1]
        longest = max(row["input_ids"].shape[1] for row in every)
        out = {}
        for name in {name for row in every for name in row}:
            values = [row[name] for row in every if name in row]
            if values[0].shape == every[0]["input_ids"].shape or name == "mm_token_type_ids":
                zeros = torch.zeros_like
                values = [row.get(name, zeros(row["input_ids"])) for row in every]
                values = [torch.nn.functional.pad(v, (0, longest - v.shape[1])) for v in values]
            out[name] = torch.cat(values)
        return out
    every = (tiny.example(family, k) for k in ("video", "images", "image", "text"))
    found = [row for row in every if row is not None]
    return tiny.left_padded(found[:2]) if kind == "padded" else found[0]


def teacher_of(family):
    model = copy.deepcopy(tiny.teacher(family)).double()
    model.set_experts_implementation("eager")  # PyTorch multiplies groups in float32 and narrower types alone
    return model


def seen(model, batch, asking, context=None):
    """Final states, what each attention is given and gives, and what it reads; of a slab where there is a context."""
    batch = {k: v.to(model.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    modules = list(attention_modules(model).values())
    with (
        torch.no_grad(),
        each_alone(model, batch["seq_idx"]) if "seq_idx" in batch else nullcontext(),
        record_outputs(modules) as outputs,
        record_inputs(modules) as inputs,
        nullcontext([]) if asking is None else record_attention(model, modules, asking) as received,
        nullcontext() if context is None else split_attention.split_attention(model, context),
    ):
        states = model.model(**model_inputs(batch), use_cache=False).last_hidden_state
    return [states, *outputs, *(given["hidden_states"] for given in inputs), *(r.transpose(1, 2) for r in received)]


def work(group, family, batch, asking):
    context = ContextParallel(group, batch["input_ids"].shape[1])
    return seen(teacher_of(family), batch, asking, context)


def check(gang, n, family, kind, reads=False):
    model, batch = teacher_of(family), rows_of(family, kind)
    assert split_attention.why_whole(model) is None
    if kind == "packed":
        batch = pack({**batch, "labels": batch["input_ids"]}, model.model)
        assert batch["input_ids"].shape[0] == 1 < int(batch["seq_idx"].max()) + 1
    asking = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.5 if reads else None
    want, found = seen(model, batch, asking), gang(n, work, family, batch, asking)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    rounding = 1e-12 if model.dtype == torch.float64 and family != "gemma4" else 1e-5  # its embeddings are float32
    assert len(want) == 1 + (2 + reads) * len(attention_modules(model))
    for i, whole in enumerate(want):
        together = torch.cat([slabs[i] for slabs in found], dim=1)
        assert together.shape == whole.shape
        assert (together - whole)[real].abs().max() <= rounding * max(1, whole[real].abs().max())


TRIED = [family for family in tiny.EVERY if family not in (*HYBRIDS, "llama4")]  # the last is refused as a teacher


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in FEW else pytest.mark.sweep) for f in TRIED])
def test_a_teacher_on_split_rows_is_the_teacher(gang, family):
    check(gang, 2, family, "one row")


@pytest.mark.parametrize("n, family", [(3, "qwen2_5_vl"), (2, "gemma3")])
def test_padded_rows_may_be_split(gang, n, family):
    check(gang, n, family, "padded", reads=family != "gemma3")


@pytest.mark.parametrize("n, family", [(3, "qwen2_5_vl"), (4, "qwen2")])
def test_packed_rows_may_be_split(gang, n, family):
    check(gang, n, family, "packed", reads=True)


def test_what_cannot_be_split_says_why():
    for family in HYBRIDS:
        assert "has no attention" in split_attention.why_whole(tiny.teacher(family))
    model = copy.deepcopy(tiny.teacher("qwen2"))
    model.set_attn_implementation("eager")
    assert split_attention.why_whole(model) == "its attention is eager, not sdpa"
    student = linmu_models.convert(tiny.teacher("qwen2"), {"preset": "exact"})
    assert split_attention.why_whole(student) == "its attention is linmu, not sdpa"
    model = copy.deepcopy(tiny.teacher("qwen2"))
    layer = model.model.layers[1]

    class Own(type(layer.self_attn)):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    layer.self_attn.__class__ = Own
    assert split_attention.why_whole(model).startswith("layer 1 computes attention on its own, not by transformers'")


def refusals(group):
    model, texts = copy.deepcopy(tiny.teacher("qwen2")), []
    ids = torch.tensor([tiny.text_ids(8)])

    def refused(kind, batch, length=8):
        with pytest.raises(kind) as caught, split_attention.split_attention(model, ContextParallel(group, length)):
            model.model(**{"input_ids": ids, "use_cache": False, **batch})
        assert decoder_of(model).config._attn_implementation == "sdpa" and not split_attention._open
        texts.append(str(caught.value))

    refused(ValueError, {"use_cache": True})
    refused(ValueError, {}, length=7)
    refused(ValueError, {"position_bias": torch.zeros(1)})
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    refused(RuntimeError, {})
    return texts


def test_a_call_that_cannot_be_split_says_so(gang):
    for texts in gang(2, refusals):
        assert texts == [
            "linmu: use_cache must be False where rows are split over processes, got True",
            "linmu: rows must have L=7 tokens to be split, got 8",
            "linmu: position_bias must be None where rows are split over processes, got a tensor",
            "linmu: each layer's attention must be called by transformers' AttentionInterface where rows are split, "
            "got 2 of 3",
        ]
