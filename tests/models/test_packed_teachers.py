"""A teacher that is given samples in one row says of each, to rounding, what it says of it alone."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from linmu_distill.packing import PACKABLE, check_packable, pack
from linmu_distill.teacher import model_inputs
from linmu_models.accelerate import accelerate_transformers, families_of
from linmu_models.accumulated_attention import each_alone, record_attention
from linmu_models.hooks import attention_modules

from . import tiny

KINDS = {**tiny.MIXED, "llama": ("text",) * 3, "qwen2": ("text",) * 3, "qwen3": ("text",) * 3}
KINDS["qwen3_5_text"] = ("text",) * 3


def padded(parts):
    """Samples one above the other, padded on the right; every token has a label."""
    longest = max(part["input_ids"].shape[1] for part in parts)
    out = {}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in parts[0]:
            rows = [part.get(name, torch.zeros_like(part["input_ids"]))[0] for part in parts]
            out[name] = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    out["labels"] = torch.where(out["attention_mask"] > 0, out["input_ids"], -100)
    for name in {name for part in parts for name in part} - set(out):
        out[name] = torch.cat([part[name] for part in parts if name in part])
    return out


def parts_of(family):
    parts = [tiny.example(family, kind) for kind in KINDS[family]]
    for i, part in enumerate(parts):  # of unequal lengths
        if "pixel_values" not in part and "pixel_values_videos" not in part:
            ids = torch.tensor([tiny.text_ids(3 + 5 * i, i)])
            part["input_ids"], part["attention_mask"] = ids, torch.ones_like(ids)
            if "mm_token_type_ids" in part:
                part["mm_token_type_ids"] = torch.zeros_like(ids)
    return parts


def seen(teacher, batch, asking, apart=None):
    """Final states, and the attention that tokens get from `asking`."""
    inputs = model_inputs(batch)
    one_by_one = nullcontext() if apart is None else each_alone(teacher, apart)
    with (
        torch.no_grad(),
        one_by_one,
        record_attention(teacher, list(attention_modules(teacher).values()), asking) as received,
    ):
        states = teacher.model(**inputs, use_cache=False).last_hidden_state
    return states, received


def test_every_family_that_is_packed_is_tried():
    assert set(KINDS) == PACKABLE


@pytest.mark.parametrize("family", sorted(KINDS))
def test_each_sample_is_as_alone(family):
    teacher = copy.deepcopy(tiny.teacher(family)).double()
    parts = parts_of(family)
    packed = pack(padded(parts), teacher.model)
    number = packed["seq_idx"]
    lengths = [part["input_ids"].shape[1] for part in parts]
    assert packed["input_ids"].shape == number.shape == (1, sum(lengths)) and "attention_mask" not in packed
    begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    assert (packed["labels"][0, begins] == -100).all()
    assert int((packed["labels"] == -100).sum()) == len(parts)
    asking = torch.rand(number.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    states, received = seen(teacher, packed, asking, number)
    for i, (part, begin, length) in enumerate(zip(parts, begins.tolist(), lengths, strict=True)):
        at = slice(begin, begin + length)
        # transformers' own delta rule rounds to float32; ours has no need to.
        with accelerate_transformers(teacher) if families_of(teacher) else nullcontext():
            alone, wanted = seen(teacher, part, asking[:, at])
        torch.testing.assert_close(states[:, at], alone, rtol=1e-5, atol=1e-5, msg=f"{family}, sample {i}")
        for ours, theirs in zip(received, wanted, strict=True):
            torch.testing.assert_close(ours[:, :, at], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "mistral3", "qwen2_5_vl"])
def test_a_neighbour_changes_no_bit(family):
    teacher = tiny.teacher(family)
    parts = parts_of(family)
    texts = [i for i, kind in enumerate(KINDS[family]) if kind == "text"]
    other = texts[0]
    packed = pack(padded(parts), teacher.model)
    changed = {**packed, "input_ids": packed["input_ids"].clone()}
    theirs = packed["seq_idx"] == other
    changed["input_ids"][theirs] = torch.tensor(tiny.text_ids(int(theirs.sum()), 77))
    asking = torch.ones_like(theirs)
    (a, received), (b, others) = (seen(teacher, batch, asking, packed["seq_idx"]) for batch in (packed, changed))
    assert torch.equal(a[~theirs], b[~theirs]) and not torch.equal(a[theirs], b[theirs])
    for ours, again in zip(received, others, strict=True):
        assert torch.equal(ours.mT[~theirs.expand(len(ours), -1)], again.mT[~theirs.expand(len(ours), -1)])


def test_a_sliding_window_stays():
    teacher = copy.deepcopy(tiny.teacher("qwen2")).double()
    config = teacher.get_decoder().config
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config.sliding_window = 3
    for layer, kind in zip(teacher.get_decoder().layers, config.layer_types, strict=True):
        layer.self_attn.sliding_window = 3 if kind == "sliding_attention" else None
        layer.attention_type = layer.self_attn.layer_type = kind
    teacher.get_decoder().has_sliding_layers = True
    parts = parts_of("qwen2")
    packed = pack(padded(parts), teacher.model)
    asking = torch.ones_like(packed["seq_idx"]).bool()
    states, received = seen(teacher, packed, asking, packed["seq_idx"])
    at = 0
    for part in parts:
        length = part["input_ids"].shape[1]
        alone, wanted = seen(teacher, part, asking[:, at : at + length])
        torch.testing.assert_close(states[:, at : at + length], alone, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(received, wanted, strict=True):
            torch.testing.assert_close(ours[:, :, at : at + length], theirs, rtol=1e-4, atol=1e-5)
        at += length
    full = copy.deepcopy(tiny.teacher("qwen2")).double()(**model_inputs(parts[-1])).logits
    assert not torch.allclose(full, teacher(**model_inputs(parts[-1])).logits)


def test_what_cannot_be_packed_is_refused():
    for family in ("gemma3", "paligemma", "smolvlm"):
        with pytest.raises(ValueError, match=f"data.packing must be false for a {family} teacher") as error:
            check_packable(tiny.teacher(family).config)
        assert "\n" not in str(error.value)
    batch = padded(parts_of("qwen2"))
    with pytest.raises(ValueError, match=r"data\.packing must be false for a model that takes kinds, one for each"):
        pack({**batch, "kinds": batch["input_ids"]}, tiny.teacher("qwen2").model)
    wrong = each_alone(tiny.teacher("qwen2"), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"seq_idx must be \(1, L\), got shape \(2, 3\)"), wrong:
        pass
