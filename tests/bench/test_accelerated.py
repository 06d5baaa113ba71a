"""The bench of transformers' linear layers: what is timed is right, and what costs nothing is left out."""

import pytest
import torch

from bench.models import accelerated


@pytest.fixture(scope="module")
def small():
    before = accelerated.SIZES["qwen3_5"]
    sizes = dict(
        before[1], hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    accelerated.SIZES["qwen3_5"] = (before[0], sizes)
    yield
    accelerated.SIZES["qwen3_5"] = before


def test_rows_of_a_model(small, tmp_path):
    rows = list(accelerated.measure("qwen3_5", 40, 0.0, small=True))
    assert all(row["status"] == "ok" and row["apart"] < 1e-3 for row in rows)
    told = {(row["part"], row["kind"], row["variant"]) for row in rows}
    assert len(told) == len(rows) == 13
    assert ("core", "prompt", "bound") not in told and ("model", "token", "bound") in told
    place = dict(commit="c", device="d", isa="i", threads=1)
    page = accelerated.write_page([row | place for row in rows], tmp_path).read_text()
    assert page.count("| qwen3_5 |") == 5 and "of the bound" in page


@torch.no_grad()
def test_a_core_is_the_layer_and_a_skipped_layer_its_projections(small):
    model = accelerated.build("qwen3_5", small=True)
    ids, layer = torch.randint(128, (1, 9)), accelerated.mixers(model)[0]
    called = []
    handle = layer.register_forward_hook(
        lambda _, args, given, out: called.append((args, given, out)), with_kwargs=True
    )
    run = accelerated.core(model, lambda: accelerated.prefill(model, ids), again=False)
    handle.remove()
    args, given, out = called[-1]
    for _ in range(2):
        torch.testing.assert_close(layer.out_proj(run()), out)
    z = args[0] if args else given["hidden_states"]
    with accelerated.Skipped(model):
        widest = layer.in_proj_qkv(z)[..., : layer.out_proj.in_features]
        torch.testing.assert_close(layer(z), layer.out_proj(widest))
    assert "forward" not in vars(layer)
