"""Teachers some of whose layers are linear already: those stay and run on our kernels, attention becomes blocks."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from transformers import DynamicCache

import linmu_models
from linmu_models.accelerate import _replaced
from linmu_models.cache import cache_bytes

from . import tiny

MODULE = "transformers.models.qwen3_5.modeling_qwen3_5"


def student(**options):
    return linmu_models.convert(tiny.teacher("qwen3_5_text"), tiny.NARROW, **options)


def test_layers_with_attention_become_blocks_and_no_others():
    model = student()
    attention = [getattr(layer, "self_attn", None) for layer in model.linmu_layers()]
    assert [isinstance(m, linmu_models.LinmuAttention) for m in attention] == [False, True] * 2
    assert model.is_linear and model.linmu_report.linear_layers == [1, 3]
    kept = student(keep_attention=[-1])
    assert kept.linmu_report.linear_layers == [1] and not kept.is_linear
    ids = torch.tensor([tiny.text_ids(9)])
    with torch.no_grad():
        assert torch.isfinite(kept.generate(ids, max_new_tokens=3, do_sample=False)).all()
    with pytest.raises(ValueError, match="keep_attention must hold layers with attention, got 0, which is linear in"):
        student(keep_attention=[0])


def test_gates_come_from_the_projection_of_queries():
    rows = {row.tensor.rpartition("self_attn.")[2]: row for row in student().linmu_report.rows}
    assert rows["gate_proj.weight"].source.endswith("q_proj.weight")
    assert rows["gated_o_proj.weight"].source.endswith("o_proj.weight")
    assert {rows[f"{name}.weight"].how for name in ("gate_proj", "gated_o_proj")} == {"copied"}
    model, theirs = student().linmu_layers()[1].self_attn, tiny.teacher("qwen3_5_text").model.layers[1].self_attn
    both = theirs.q_proj.weight.unflatten(0, (4, 2, 16))
    assert torch.equal(model.gate_proj.weight, both[:, 1].flatten(0, 1))


@pytest.mark.parametrize("preset", ["paper", "literal"])
def test_the_papers_block_has_no_place_for_gates(preset):
    with pytest.raises(ValueError, match="options must be of the preset exact for a teacher with output gates"):
        linmu_models.convert(tiny.teacher("qwen3_5_text"), {"preset": preset})


@torch.no_grad()
def test_the_cache_stops_growing():
    model, sizes = student(), []
    for length in (40, 400):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([tiny.text_ids(length)]), cache=cache)
        assert cache.get_seq_length() == length
        sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1] > 4 * 2 * 4 * 8 * 8  # with the states of the delta rule


@torch.no_grad()
def test_a_packed_row_is_its_sequences():
    """Positions alone tell where they begin; the layers of the delta rule are told."""
    model, rows = student().double(), [tiny.text_ids(n, n) for n in (6, 1, 13)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(
        torch.tensor([[token for row in rows for token in row]]), position_ids=positions, use_cache=False
    ).logits[0]
    for got, row in zip(packed.split([len(row) for row in rows]), rows, strict=True):
        torch.testing.assert_close(got, model(torch.tensor([row])).logits[0], rtol=1e-9, atol=1e-9)


def test_short_convolutions_cannot_part_sequences():
    model = linmu_models.convert(tiny.teacher("lfm2_vl"))
    with pytest.raises(ValueError, match="rows must be one sequence each in a model with short convolutions"):
        model(torch.tensor([tiny.text_ids(6)]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


def students():
    gc.collect()
    return _replaced.get((MODULE, "torch_chunk_gated_delta_rule"), (None, 0))[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_kernels_of_its_own(copied):
    """Without them rows of several sequences would be read as one."""
    before = students()
    other = copied(student())
    assert students() == before + 1
    rows = [tiny.text_ids(n, n) for n in (6, 1, 13)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        packed = other(
            torch.tensor([[token for row in rows for token in row]]), position_ids=positions, use_cache=False
        ).logits[0]
        for got, row in zip(packed.split([len(row) for row in rows]), rows, strict=True):
            torch.testing.assert_close(got, other(torch.tensor([row])).logits[0], rtol=1e-3, atol=1e-4)
    del other
    assert students() == before


def test_kernels_serve_as_long_as_a_student_lives():
    before = students()
    model = student()
    assert students() == before + 1
    other = student()
    del model
    assert students() == before + 1
    del other
    assert students() == before
