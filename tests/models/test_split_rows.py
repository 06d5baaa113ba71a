"""Models on rows split over processes give their states, losses and gradients of whole rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import linmu_models
from linmu_models.split_rows import split_rows
from linmu_ops.context_parallel import ContextParallel

from . import tiny

# Grids; features that are added deep inside; images of several parts; text.
FEW = ("qwen2_5_vl", "qwen3_vl", "llava_next", "qwen2")
REFUSED = {
    "smolvlm": "must have its tokens in the order of their positions to be cut",
    **dict.fromkeys(("gemma3", "paligemma"), "context must not cut an image or video whose tokens see later ones"),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_text", "lfm2_vl"),
        "every decoder layer must have a block where rows are split over processes, got layer",
    ),
}
OPTIONS = {"exact": tiny.NARROW, "paper": {"preset": "paper", "window": (2, 2, 2), "text_window": 3}}


def student_of(family, options, checkpointing=False):
    torch.manual_seed(0)
    student = linmu_models.convert(tiny.teacher(family), OPTIONS[options]).double().train()
    if options == "exact":
        for module in student.modules():
            if isinstance(module, linmu_models.attention.LinmuExactMMATE):
                module.share.bias.data.zero_()  # it starts where what is far hardly counts
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("vis" not in name)  # towers know float32 alone
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def batch_of(family, kind):
    if kind == "packed":
        rows = [tiny.text_ids(n, i) for i, n in enumerate((9, 3, 17))]
        places = [p for row in rows for p in range(len(row))]
        return {"input_ids": torch.tensor([[i for row in rows for i in row]]), "position_ids": torch.tensor([places])}
    every = (tiny.example(family, kind) for kind in ("video", "images", "image", "text"))
    found = [batch for batch in every if batch is not None]
    return tiny.left_padded(found[:2]) if kind == "padded" else found[0]


def derived(student, batch, start=0, stop=None):
    """The loss of the tokens from `start` to `stop`, each of which predicts the next; their states; all gradients."""
    length = batch["input_ids"].shape[1]
    stop = length if stop is None else stop
    states = student.model(**batch, use_cache=False).last_hidden_state
    logits = student.get_output_embeddings()(states)
    targets = batch["input_ids"].roll(-1, dims=1)[:, start:stop]
    where = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, start:stop].bool()
    loss = cross_entropy(logits[where], targets[where], reduction="sum") / length + states[:, :0].sum()
    loss.backward()
    states = states.masked_fill(~where[..., None], 0)
    return loss.detach(), states.detach(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def doubled(batch):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def work(group, family, options, batch, checkpointing):
    student, context = student_of(family, options, checkpointing), ContextParallel(group, batch["input_ids"].shape[1])
    with split_rows(student, context):
        return derived(student, batch, context.start, context.stop)


def check(gang, n, family, options, kind="one row", checkpointing=False):
    batch = doubled(batch_of(family, kind))
    loss, states, gradients = derived(student_of(family, options), batch)
    found = gang(n, work, family, options, batch, checkpointing)
    torch.testing.assert_close(sum(f[0] for f in found), loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([f[1] for f in found], dim=1), states, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        parts = [f[2][name] for f in found if name in f[2]]
        rounding = 1e-6 if family == "gemma4" else 1e-9  # whose embeddings are added up in float32
        assert (sum(parts) - gradient).abs().max() <= rounding * max(1, gradient.abs().max()), name


TRIED = [f for f in tiny.BUILDERS if f != "llama4"]  # whose experts know float32 alone


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in FEW else pytest.mark.sweep) for f in TRIED])
def test_a_family_on_split_rows_is_the_family(gang, family):
    if family not in REFUSED:
        check(gang, 2, family, "exact")
        return
    for text in gang(2, refusal, family, doubled(batch_of(family, "one row"))):
        assert REFUSED[family] in text


def refusal(group, family, batch):
    with pytest.raises(ValueError) as caught:
        work(group, family, "exact", batch, False)
    return str(caught.value)


def other_refusals(group):
    student, texts = student_of("qwen2", "exact"), []
    context, ids = ContextParallel(group, 8), torch.tensor([tiny.text_ids(8)])
    with split_rows(student, context):
        for batch in (dict(input_ids=ids, use_cache=True), dict(input_ids=ids[:, :7])):
            with pytest.raises(ValueError) as caught:
                student.model(**batch, **({} if "use_cache" in batch else {"use_cache": False}))
            texts.append(str(caught.value))
    student.model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ValueError) as caught, split_rows(student, context):
        pass
    return [*texts, str(caught.value)]


def test_what_cannot_be_split_says_so(gang):
    for cache, length, rope in gang(2, other_refusals):
        assert cache == "linmu: use_cache must be False where rows are split over processes, got True"
        assert length == "linmu: rows must have L=8 tokens to be split, got 7"
        assert rope.startswith("linmu: rope_type must be one") and rope.endswith("got 'dynamic'")


@pytest.mark.parametrize("n", [3, 4])
def test_packed_rows_may_be_split(gang, n):
    check(gang, n, "qwen2", "exact", kind="packed")


def test_padded_rows_may_be_split(gang):
    check(gang, 3, "qwen2_5_vl", "exact", kind="padded")


def test_split_rows_may_be_checkpointed(gang):
    check(gang, 2, "qwen2_5_vl", "exact", checkpointing=True)


def test_the_papers_block_takes_split_rows(gang):
    check(gang, 3, "qwen2_5_vl", "paper")
