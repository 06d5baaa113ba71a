"""Attention weights go into both branches, and into a vision transformer's and a Swin stage's place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from linmu_ops import MMATE, ExactMMATE, GridAttention, MMATEConfig, window_attention
from linmu_ops._testing import assert_within_twice
from linmu_ops.nn import LITERAL

transformers = pytest.importorskip("transformers")


class Attention(nn.Module):
    """A GQA layer with norms of q and k, as in Qwen3."""

    def __init__(self, dim=12, heads=4, groups=2, head_dim=6, bias=True):
        super().__init__()
        self.num_heads, self.scaling = heads, 0.3
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, groups * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, groups * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(head_dim, eps=1e-5), nn.RMSNorm(head_dim, eps=1e-5)
        nn.init.normal_(self.k_norm.weight)


COPIES = {
    "scan.c_proj": "q_proj", "scan.b_proj": "k_proj", "scan.x_proj": "v_proj", "scan_o_proj": "o_proj",
    "scan.c_norm": "q_norm", "scan.b_norm": "k_norm", "scan.reverse_c_proj": "q_proj", "scan.reverse_b_proj": "k_proj",
    "windows.q_proj": "q_proj", "windows.k_proj": "k_proj", "windows.v_proj": "v_proj", "windows_o_proj": "o_proj",
    "windows.q_norm": "q_norm", "windows.k_norm": "k_norm", "o_proj": "o_proj",
}  # fmt: skip


@pytest.mark.parametrize("cls, config", [(MMATE, LITERAL), (ExactMMATE, None)])
def test_from_attention(cls, config):
    attention = Attention().double()
    block = cls.from_attention(attention, layer_idx=3, config=config)
    shape = block.shape
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.scale) == (4, 2, 6, 0.3)
    assert block.layer_idx == 3
    assert pickle.loads(pickle.dumps(block)).shape.head_dim == 6
    assert block.scan.dt_bias.dtype == torch.float64
    modules, found = dict(block.named_modules()), set()
    for mine, theirs in COPIES.items():
        for name, value in getattr(attention, theirs).named_parameters() if mine in modules else ():
            copied = modules[mine].get_parameter(name)
            assert torch.equal(copied, value)
            assert copied.data_ptr() != value.data_ptr()
            found.add(f"{mine}.{name}")
    new = {"scan.dt_proj", "scan.reverse_dt_proj", "scan.gate_proj", "scan.z_proj", "mix_proj", "norm", "share"}
    rest = {n for n, _ in block.named_parameters() if n not in found and n.rpartition(".")[0] not in new}
    assert all((n.startswith("scan.") and n.count(".") == 1) or n == "mix" for n in rest)


def test_report():
    attention = Attention()
    block = MMATE(12, 4, 2, 6, qkv_bias=True, qk_norm=lambda size: nn.RMSNorm(size, eps=1e-5))
    rows = block.load_attention_weights(
        **{f"{p}_weight": getattr(attention, f"{p}_proj").weight for p in "qkvo"},
        **{f"{p}_bias": getattr(attention, f"{p}_proj").bias for p in "qkvo"},
        q_norm=attention.q_norm, k_norm=attention.k_norm, names={"o": "out"},
    )  # fmt: skip
    assert [r.name for r in rows] == [name for name, _ in block.named_parameters()]
    by_name = {r.name: r for r in rows}
    assert by_name["scan.c_proj.weight"][1:] == ("q_proj.weight", "copied")
    assert by_name["windows_o_proj.weight"][1:] == ("out.weight", "copied")
    assert by_name["scan.b_norm.weight"][1:] == ("k_norm.weight", "copied")
    assert by_name["scan.A_log"][1:] == ("", "new")
    new = {r.name for r in rows if r.how == "new"}
    assert new == {
        "mix", "scan.scale", "scan.gate", "scan.dt_bias", "scan.A_log", "scan.dt_proj.weight",
        "scan.reverse_dt_bias", "scan.reverse_A_log", "scan.reverse_dt_proj.weight",
    }  # fmt: skip


def test_missing_biases_become_zero():
    attention = Attention(bias=False)
    attention.v_proj = nn.Linear(12, 12)
    block = MMATE.from_attention(attention)
    assert torch.equal(block.scan.x_proj.bias, attention.v_proj.bias)
    assert not block.scan.c_proj.bias.any()
    assert not block.windows.k_proj.bias.any()


def test_load_errors():
    attention = Attention()
    weights = {f"{p}_weight": getattr(attention, f"{p}_proj").weight for p in "qkvo"}
    with pytest.raises(ValueError, match=r"q_proj.weight must be \(12, 12\) for scan.c_proj.weight, got \(24, 12\)"):
        MMATE(12, 4, 2, 3).load_attention_weights(**weights)
    with pytest.raises(ValueError, match=r"scan.c_proj.bias must exist to hold q_proj.bias"):
        MMATE(12, 4, 2, 6).load_attention_weights(**weights, q_bias=attention.q_proj.bias)
    with pytest.raises(ValueError, match=r"scan.c_norm.weight must exist to hold q_norm.weight"):
        MMATE(12, 4, 2, 6).load_attention_weights(**weights, q_norm=attention.q_norm)
    with pytest.raises(ValueError, match="from_attention: Linear must have a projection for q, k, v, o"):
        MMATE.from_attention(nn.Linear(3, 3))
    del attention.num_heads
    with pytest.raises(ValueError, match="from_attention: num_heads must be given for Attention, got None"):
        MMATE.from_attention(attention)


@pytest.mark.parametrize("fused", ["timm", "torch"])
def test_fused_projections(fused):
    """With one window over the whole grid and no scan, the block is the attention it was made from."""
    torch_layer = nn.MultiheadAttention(12, 3, batch_first=True)
    nn.init.normal_(torch_layer.in_proj_bias)
    layer: nn.Module = torch_layer
    if fused == "timm":
        layer = nn.Module()
        layer.num_heads, layer.scale = 3, 0.5
        layer.qkv, layer.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        layer.qkv.load_state_dict(dict(weight=torch_layer.in_proj_weight, bias=torch_layer.in_proj_bias))
        layer.proj.load_state_dict(torch_layer.out_proj.state_dict())
    z = torch.randn(2, 20, 12)
    block = MMATE.from_attention(layer, config=MMATEConfig(branches="swin", window=(1, 5, 4), image_window=None))
    expected = torch_layer(z, z, z)[0]
    torch.testing.assert_close(block(z, grid=(1, 5, 4)), expected)


def test_calibrate():
    """The output takes the size of the target, padding not counted."""
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    batches = []
    for _ in range(2):
        target = 5 * torch.randn(2, 12, 12)
        target[~mask] = 1e6
        batches.append((dict(hidden_states=torch.randn(2, 12, 12), attention_mask=mask), target))
    size = torch.cat([t[mask] for _, t in batches]).square().mean().sqrt()
    for options in ({}, dict(head_norm=True), dict(z_gate=True), dict(branches="flex")):
        block = MMATE.from_attention(Attention(), config=MMATEConfig(**options))
        assert block.calibrate(batches) == pytest.approx(size.item())
        with torch.no_grad():
            out = torch.cat([block(**inputs)[mask] for inputs, _ in batches])
        torch.testing.assert_close(out.square().mean().sqrt(), size, rtol=1e-4, atol=0)


def vit():
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, image_size=32, patch_size=8
    )
    return transformers.ViTModel(config).eval()


def test_vision_transformer():
    """The five lines of GridAttention's docstring; CLS reads every patch, patches do not read CLS."""
    model = vit()
    for i, layer in enumerate(model.layers):
        block = MMATE.from_attention(layer.attention, layer_idx=i)
        layer.attention = GridAttention(block, grid=(1, 4, 4), prefix_tokens=1, return_weights=True)
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    out = model(pixels).last_hidden_state
    assert out.shape == (2, 17, 24)
    out[0, 0].sum().backward()
    patches = pixels.grad[0].unfold(1, 8, 8).unfold(2, 8, 8).abs().sum((0, 3, 4))
    assert (patches > 0).all()
    assert not pixels.grad[1].any()
    with torch.no_grad():
        model.embeddings.cls_token.normal_()
        changed = model(pixels).last_hidden_state
    assert torch.equal(changed[:, 1:], out[:, 1:])
    assert not torch.equal(changed[:, 0], out[:, 0])


def test_vision_transformer_trains():
    model = vit().train()
    for i, layer in enumerate(model.layers):
        block = MMATE.from_attention(layer.attention, layer_idx=i)
        layer.attention = GridAttention(block, grid=(1, 4, 4), prefix_tokens=1, return_weights=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixels, target = torch.randn(4, 3, 32, 32), torch.randn(4, 24)
    losses = []
    for _ in range(4):
        loss = (model(pixels).last_hidden_state[:, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


class SwinLayerOverOps(nn.Module):
    """A transformers SwinLayer whose attention is the op: no partition, roll, pad or mask."""

    def __init__(self, layer, layer_idx):
        super().__init__()
        self.layer, self.heads = layer, layer.attention.num_attention_heads
        side = layer.window_size
        self.window = dict(window=(1, side, side), shift=(0, *[side // 2 * (layer_idx % 2)] * 2), wrap="mask")
        self.projections = [getattr(layer.attention, f"{n}_proj") for n in "qkvo"]

    def forward(self, hidden_states, input_dimensions, **kwargs):
        z = self.layer.layernorm_before(hidden_states)
        q, k, v = (p(z).unflatten(-1, (self.heads, -1)) for p in self.projections[:3])
        table = self.layer.attention.relative_position_bias.relative_position_bias_table
        span = [2 * w - 1 for w in self.window["window"]]
        y = window_attention(q, k, v, grid=(1, *input_dimensions), bias=table.T.reshape(-1, *span), **self.window)
        x = hidden_states + self.projections[3](y.flatten(2))
        return x + self.layer.mlp(self.layer.layernorm_after(x)), None


def swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0
    )
    model = transformers.SwinModel(config).eval()
    for name, p in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(p, std=0.5)
    return model


def test_swin_stage():
    """A Swin over the op is the Swin, and trains."""
    model = swin()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        exact = copy.deepcopy(model).double()(pixels.double()).last_hidden_state
    ours = copy.deepcopy(model)
    for stage in ours.encoder.layers:
        for i, layer in enumerate(stage.blocks):
            stage.blocks[i] = SwinLayerOverOps(layer, i)
    got = ours(pixels).last_hidden_state
    assert_within_twice(got.detach(), exact, expected)
    got.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
