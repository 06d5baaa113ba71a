"""A student whose layers two processes share (FSDP2, computing in bfloat16) is the plain student of those weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import linmu_models

from . import tiny

CASES = [
    ("qwen2", tiny.NARROW), ("qwen2_vl", tiny.NARROW), ("qwen3_5", tiny.NARROW), ("gemma3", tiny.NARROW),
    ("qwen2_vl", {"preset": "paper"}),
]  # fmt: skip


def use(model, batch):
    """Of a prefill and three steps: logits, and every tensor of the state."""
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        found = [out.logits]
        for token in (7, 8, 9):
            step = torch.full((out.logits.shape[0], 1), token)
            out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    state = {f"{i}.{k}": v for i, layer in enumerate(out.past_key_values.layers) for k, v in layer.value().items()}
    return {"logits": torch.cat(found, dim=1), **state}


def sharded(group, family, options, whole, casts):
    """What differs from the plain student. whole: a layer is a part, else its block is one of its own."""
    held = linmu_models.convert(tiny.teacher(family), options).eval()
    plain = copy.deepcopy(held)
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16()
    mesh = DeviceMesh.from_group(group, "cpu")
    policy = MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=casts)
    for layer in held.linmu_layers():
        if not whole and hasattr(layer, "self_attn"):
            fully_shard(layer.self_attn, mesh=mesh, mp_policy=policy)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(held, mesh=mesh, mp_policy=policy)
    assert all(p.dtype == torch.float32 and p.to_local().numel() < p.numel() for p in held.parameters() if p.dim() > 1)
    batch = tiny.example(family, "text" if family == "qwen2" else "image")
    narrow = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    # What the model is given is cast, or is what its parameters are in a call.
    got, want = use(held, batch if casts else narrow), use(plain, narrow)
    assert got.keys() == want.keys() and len(want) > 3
    return [k for k, v in want.items() if v.dtype != got[k].dtype or not torch.equal(got[k], v)]


@pytest.mark.parametrize("whole, casts", [(False, False), (True, True)], ids=["blocks", "layers, cast"])
@pytest.mark.parametrize("family, options", CASES, ids=lambda v: v if isinstance(v, str) else v.get("preset", "exact"))
def test_fsdp2_with_mixed_precision(gang, family, options, whole, casts):
    assert gang(2, sharded, family, options, whole, casts) == [[], []]
