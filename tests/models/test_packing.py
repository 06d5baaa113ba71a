"""Rows of several sequences, as collators pack them: each sequence is as it is alone, or one line says why not."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch.nn.functional import cross_entropy

import linmu_models

from . import tiny

ROW = [6, 1, 13, 7]


@pytest.fixture(scope="module")
def students():
    made = {}

    def student(family):
        if family not in made:
            made[family] = linmu_models.convert(tiny.teacher(family), tiny.NARROW)
        return made[family]

    return student


def collated(**options):
    """What transformers' collator makes of sequences of the lengths `ROW`, and these."""
    rows = [tiny.text_ids(n, i) for i, n in enumerate(ROW)]
    collate = hf.DataCollatorWithFlattening(return_tensors="pt", **options)
    return collate([{"input_ids": ids} for ids in rows]), rows


COLLATORS = {
    "positions": {},
    "numbers": dict(return_seq_idx=True),
    "lengths": dict(return_flash_attn_kwargs=True),
    "all": dict(return_seq_idx=True, return_flash_attn_kwargs=True),
    "numbers_alone": dict(return_seq_idx=True, return_position_ids=False),
    "lengths_alone": dict(return_flash_attn_kwargs=True, return_position_ids=False),
    "from_two": dict(position_ids_start=2),
}


@pytest.mark.parametrize("name", COLLATORS)
@torch.no_grad()
def test_a_collated_row_is_its_sequences(students, name):
    student = copy.deepcopy(students("qwen2")).double()
    batch, rows = collated(**COLLATORS[name])
    out = student(**batch, use_cache=False).logits[0].split(ROW)
    start = COLLATORS[name].get("position_ids_start", 0)
    for got, ids in zip(out, rows, strict=True):
        alone = student(torch.tensor([ids]), position_ids=torch.arange(start, start + len(ids))[None]).logits[0]
        torch.testing.assert_close(got, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_vl"])
def test_loss_and_gradients(students, family):
    """Of each sequence as alone; and a neighbour's tokens change no bit of a sequence's logits and gradients."""
    student = copy.deepcopy(students(family)).requires_grad_(False)
    batch, rows = collated()
    labels, embed = batch["labels"], student.get_input_embeddings()
    found = []
    for seed in (0, 1):
        ids = batch["input_ids"].clone()
        ids[:, 7:20] = torch.tensor(tiny.text_ids(13, 2 if seed == 0 else 5))
        z = embed(ids).detach().requires_grad_()
        out = student(inputs_embeds=z, position_ids=batch["position_ids"], labels=labels, use_cache=False)
        losses = [
            cross_entropy(out.logits[0, at : at + n - 1], ids[0, at + 1 : at + n], reduction="sum")
            for at, n in zip((0, 6, 7, 20), ROW, strict=True)
        ]
        if seed == 0:
            torch.testing.assert_close(out.loss, sum(losses) / (sum(ROW) - len(ROW)))
            alone = [student(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows]
            for i in (0, 2, 3):
                torch.testing.assert_close(losses[i], alone[i], rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(losses[0] + losses[3], z)
        others = [slice(0, 6), slice(20, 27)]
        found.append([*(out.logits[0, at] for at in others), *(grad[0, at] for at in others), losses[0], losses[3]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def positions_of(model, batch):
    """What a model gives its decoder for this batch."""
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    with handle:
        out = model(**batch, use_cache=False).logits
    length = batch["input_ids"].shape[1]
    return out, torch.arange(length)[None] if seen[0] is None else seen[0]


@pytest.mark.parametrize("family", tiny.MIXED)
@torch.no_grad()
def test_images_and_videos_in_packed_rows(students, family):
    student = copy.deepcopy(students(family)).double()
    parts = [tiny.example(family, kind) for kind in tiny.MIXED[family]]
    parts = [{k: v.double() if v.is_floating_point() else v for k, v in part.items()} for part in parts]
    alone, positions = zip(*(positions_of(student, part) for part in parts), strict=True)
    most = max(p.dim() for p in positions)
    positions = [p if p.dim() == most else p.expand(3, 1, -1) for p in positions]
    packed = {"input_ids": torch.cat([p["input_ids"] for p in parts], 1)}
    if "mm_token_type_ids" in parts[0]:
        kinds = [p.get("mm_token_type_ids", torch.zeros_like(p["input_ids"])) for p in parts]
        packed["mm_token_type_ids"] = torch.cat(kinds, 1)
    for name in {name for part in parts for name in part} - {*packed, "attention_mask"}:
        packed[name] = torch.cat([p[name] for p in parts if name in p])
    position_ids = torch.cat(positions, dim=-1)
    lengths = [p["input_ids"].shape[1] for p in parts]
    number = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(lengths))[None].int()
    ways = [dict(position_ids=position_ids), dict(position_ids=position_ids, seq_idx=number), dict(seq_idx=number)]
    if most == 3:
        text = torch.cat([torch.arange(n) for n in lengths])[None, None]
        ways.append(dict(position_ids=torch.cat((text, position_ids))))
    for way in ways:
        out, used = positions_of(student, {**packed, **way})
        at = used[-most:].split(lengths, dim=-1)
        for part, got, want, own in zip(parts, out[0].split(lengths), alone, at, strict=True):
            if "position_ids" not in way:  # the model may count on where a sequence begins; what is far notices
                want = student(**part, position_ids=own, use_cache=False).logits
            torch.testing.assert_close(got, want[0], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_padding_of_packed_rows(students):
    """Rows of different lengths, padded on either side, with what collators put at padding."""
    student = students("qwen2")
    rows = [[5, 9], [4, 3, 2]]
    for left in (False, True):
        for fill in (0, 1, 77):
            ids, positions, mask, where = [], [], [], []
            for r, sizes in enumerate(rows):
                pad = 14 - sum(sizes) + 2
                words = [tiny.text_ids(n, 10 * r + n) for n in sizes]
                flat, place = [i for word in words for i in word], [p for n in sizes for p in range(n)]
                ids.append([0] * pad + flat if left else flat + [0] * pad)
                positions.append([fill] * pad + place if left else place + [fill] * pad)
                mask.append([0] * pad + [1] * len(flat) if left else [1] * len(flat) + [0] * pad)
                at = pad if left else 0
                for n, word in zip(sizes, words, strict=True):
                    where.append((r, at, word))
                    at += n
            out = student(
                torch.tensor(ids), position_ids=torch.tensor(positions), attention_mask=torch.tensor(mask),
                use_cache=False,
            ).logits  # fmt: skip
            for r, at, word in where:
                alone = student(torch.tensor([word])).logits[0]
                torch.testing.assert_close(out[r, at : at + len(word)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "llava"])
@torch.no_grad()
def test_what_generation_passes_is_no_packing(students, family):
    """Left padding has positions 0 or 1; images repeat positions; a step has one."""
    student = students(family)
    kind = "text" if family == "qwen2" else "image"
    rows = [tiny.example(family, kind), tiny.longer(tiny.example(family, kind), torch.cat(
        (tiny.example(family, kind)["input_ids"], torch.tensor([tiny.text_ids(3)])), 1))]  # fmt: skip
    seen = []
    for layer in student.linmu_layers():
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["linmu"].seq_idx), with_kwargs=True
        )
    student.generate(**tiny.left_padded(rows), max_new_tokens=3, do_sample=False)
    cache = hf.DynamicCache(config=student.config)
    words = student.generate(**rows[0], max_new_tokens=3, do_sample=False, past_key_values=cache)
    turn = tiny.longer(rows[0], torch.cat((words, torch.tensor([tiny.text_ids(4)])), 1))
    turn = {name: value for name, value in turn.items() if name != "pixel_values"}
    student.generate(**turn, max_new_tokens=2, do_sample=False, past_key_values=cache)
    student(**tiny.left_padded(rows))
    assert seen and all(number is None for number in seen)


@torch.no_grad()
def test_a_cache_begins_with_packed_rows_but_does_not_go_on(students):
    student = students("qwen2")
    batch, _ = collated()
    plain = student(**batch, use_cache=False).logits
    out = student(**batch)
    assert torch.equal(out.logits, plain)
    cache = next(v for k, v in out.items() if k in ("cache", "past_key_values"))
    with pytest.raises(ValueError, match="a cache must not go on after rows of several sequences") as error:
        student(batch["input_ids"][:, :1], past_key_values=cache)
    assert "\n" not in str(error.value)
    filled = hf.DynamicCache(config=student.config)
    student(batch["input_ids"], past_key_values=filled)
    with pytest.raises(ValueError, match="must begin a cache, got one with tokens"):
        student(**batch, past_key_values=filled)


@torch.no_grad()
def test_contradictions_are_refused(students):
    student = students("qwen2")
    batch, _ = collated(return_seq_idx=True, return_flash_attn_kwargs=True)
    length = sum(ROW)
    for change, words in (
        (dict(position_ids=torch.arange(length)[None]), "position_ids and seq_idx must agree where .* row 0, token 6"),
        (dict(seq_idx=torch.zeros(1, length, dtype=torch.int32)), "position_ids and seq_idx must agree"),
        (dict(seq_idx=batch["seq_idx"][:, 1:]), r"seq_idx must be \(B, L\) = \(1, 27\), got shape \(1, 26\)"),
        (dict(cu_seq_lens_q=torch.tensor([0, 6, 20, 27]), cu_seq_lens_k=None), "position_ids and cu_seq_lens_q must"),
        (dict(cu_seq_lens_q=torch.tensor([0, 6, 20]), cu_seq_lens_k=None), "must rise from 0 to L=27 in one row"),
        (dict(cu_seq_lens_k=torch.tensor([0, 27])), "cu_seq_lens_k must be cu_seq_lens_q"),
        (dict(position_ids=batch["position_ids"][:, 1:]), r"position_ids must be \(B, L\) = \(1, 27\)"),
        (dict(position_ids=batch["position_ids"][0]), r"position_ids must be \(B, L\) = \(1, 27\), got shape \(27,\)"),
        (dict(cu_seq_lens_q=torch.tensor([[0, 27]])), r"cu_seq_lens_q must be \(n \+ 1,\), of n sequences, got shape"),
    ):
        with pytest.raises(ValueError, match=words):
            student(**{**batch, **change}, use_cache=False)
    with pytest.raises(ValueError, match=r"attention_mask must be 0 or 1; the sequences .* got 4"):
        student(batch["input_ids"], attention_mask=batch["seq_idx"].long() + 1)
    image = tiny.example("llava")
    del image["attention_mask"]
    cut = torch.zeros_like(image["input_ids"], dtype=torch.int32)
    cut[:, 8:] = 1
    with pytest.raises(ValueError, match="an image or video must lie in one sequence, got one that row 0 cuts"):
        students("llava")(**image, seq_idx=cut, use_cache=False)


@torch.no_grad()
def test_sequences_are_told_by_tensors(students):
    student, (batch, _) = students("qwen2"), collated(**COLLATORS["all"])
    for name in ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"):
        with pytest.raises(TypeError, match=f"^linmu: {name} must be a tensor, got a list$"):
            student(batch["input_ids"], **{"seq_idx": batch["seq_idx"], name: batch[name].tolist()}, use_cache=False)
        wrong = batch[name].to(torch.complex64 if name == "position_ids" else torch.float32)
        with pytest.raises(TypeError, match=f"^linmu: {name} must be (integers|real numbers), got (float|complex)"):
            student(batch["input_ids"], **{"seq_idx": batch["seq_idx"], name: wrong}, use_cache=False)


@torch.no_grad()
def test_layers_that_keep_attention():
    student = linmu_models.convert(tiny.teacher("qwen2"), tiny.NARROW, keep_attention=[1])
    for name in ("positions", "numbers_alone"):
        batch, rows = collated(**COLLATORS[name])
        out = student(**batch, use_cache=False).logits[0].split(ROW)
        for got, ids in zip(out, rows, strict=True):
            torch.testing.assert_close(got, student(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-4)
        for other in (dict(), dict(use_cache=False, attention_mask=torch.ones_like(batch["input_ids"]))):
            with pytest.raises(ValueError, match="beside layers that keep attention, rows of several sequences must"):
                student(**batch, **other)


def test_calibration_by_packed_rows():
    teacher = tiny.teacher("qwen2")
    batch, rows = collated()
    del batch["labels"]
    packed = linmu_models.convert(teacher, tiny.NARROW, calibration=[batch])
    apart = linmu_models.convert(
        teacher, tiny.NARROW, calibration=[dict(input_ids=torch.tensor([ids])) for ids in rows]
    )
    for (name, a), b in zip(packed.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)
