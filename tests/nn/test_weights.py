"""Whoever holds the weights, a block and its state are those of the plain weights of the same values."""

from __future__ import annotations

import copy
import dataclasses
import os
import socket

import pytest
import torch
from blocks import OPTIONS, block_class, build, prompt
from torch import nn

from linmu_ops import MMATEConfig

NAMES = ["default", "literal", "text_window", "exact", "exact_wide", "exact_delta", "windows_alone"]
CASES = {**OPTIONS, "windows_alone": MMATEConfig(branches="swin", text_window=3)}
DTYPES = [torch.float32, torch.bfloat16]


def block_of(name, dtype):
    """Sizes that quantisers take; what is not a matrix stays float32, as in a converted model."""
    config = dataclasses.replace(CASES[name], window=(2, 2, 2), image_window=None)
    torch.manual_seed(0)
    block = block_class(config)(64, 2, 1, 32, config=config).eval().requires_grad_(False)
    for key, p in block.named_parameters():
        if p.dim() > 1:
            p.copy_(torch.randn_like(p) * 0.1)
        if p.dim() > 1 or "_proj" in key:
            p.data = p.data.to(dtype)
    return block


def linears(block):
    return [(n, m) for n, m in block.named_modules() if type(m) is nn.Linear]


def use(block, dtype, state=None):
    """Prefill and steps: outputs and the state."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(2, 7, 64, generator=g).to(dtype)
    with torch.no_grad():
        first, state = block(z[:, :4], state=state, return_state=True)
        steps = [block(z[:, t : t + 1], state=state) for t in range(4, 7)]
    return torch.cat([first, *steps], dim=1), state


def assert_alike(held, plain, dtype, exact=True):
    """Its first state, its prefill and its steps."""
    for start in (False, True):
        out, state = use(held, dtype, held.init_state(2) if start else None)
        want, expected = use(plain, dtype, plain.init_state(2) if start else None)
        for a, b in zip((out, *state), (want, *expected), strict=True):
            assert (a is None) == (b is None)
            if a is None:
                continue
            assert (a.dtype, a.device.type) == (b.dtype, b.device.type)
            tolerance = {} if not exact else dict(rtol=0, atol=0)
            if not exact and dtype != torch.float32:
                tolerance = dict(rtol=0.05, atol=0.05 * float(b.float().abs().max()))
            torch.testing.assert_close(a, b, **tolerance)


def quantised(block, dtype, bits):
    """A copy with the linear maps of bitsandbytes, and one with plain maps; of 4 bits, with the same values."""
    bnb = pytest.importorskip("bitsandbytes")
    held, plain = copy.deepcopy(block), copy.deepcopy(block)
    for where, linear in linears(block):
        sizes, weight = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight.data.clone()
        if bits == 4:
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype)
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, False)
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = linear.bias
        held.set_submodule(where, new.to("cpu"))
        if bits == 4:
            assert new.weight.dtype == torch.uint8
            values = bnb.functional.dequantize_4bit(new.weight.data, new.weight.quant_state)
            plain.get_submodule(where).weight.copy_(values)
    return held, plain


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_bitsandbytes_4_bit(name, dtype):
    held, plain = quantised(block_of(name, dtype), dtype, 4)
    assert_alike(held, plain, dtype, exact=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_bitsandbytes_8_bit(name, dtype):
    held, plain = quantised(block_of(name, dtype), dtype, 8)
    # Activations are rounded to 8 bits too, so that values are near only.
    for start in (False, True):
        out, state = use(held, dtype, held.init_state(2) if start else None)
        want, expected = use(plain, dtype, plain.init_state(2) if start else None)
        assert out.dtype == want.dtype and (out - want).float().norm() < 0.1 * want.float().norm()
        for a, b in zip(state, expected, strict=True):
            # Where nothing tells the model's dtype, a state that is too wide rounds nothing.
            assert (a is None and b is None) or torch.promote_types(a.dtype, b.dtype) == a.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_torchao(name, dtype):
    quantization = pytest.importorskip("torchao.quantization")
    held = block_of(name, dtype)
    quantization.quantize_(held, quantization.Int8WeightOnlyConfig())
    plain = copy.deepcopy(held)
    for where, linear in [(n, m) for n, m in plain.named_modules() if isinstance(m, nn.Linear)]:
        weight = linear.weight
        assert type(held.get_submodule(where).weight) is not nn.Parameter
        linear.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    assert_alike(held, plain, dtype, exact=False)


class Stub(nn.Module):
    """A quantised map as some libraries have it: bytes, and no `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.scale = float(linear.weight.abs().max()) / 127
        self.register_buffer("packed", (linear.weight / self.scale).round().to(torch.int8).view(torch.uint8))
        self.bias = linear.bias

    def values(self, dtype):
        return (self.packed.view(torch.int8).float() * self.scale).to(dtype)

    def forward(self, x):
        return nn.functional.linear(x, self.values(x.dtype), self.bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["exact", "exact_wide", "exact_delta"])
def test_maps_without_a_weight(name, dtype):
    held = block_of(name, dtype)
    plain = copy.deepcopy(held)
    for where, linear in linears(held):
        stub = Stub(linear)
        held.set_submodule(where, stub)
        plain.get_submodule(where).weight.copy_(stub.values(dtype))
    assert_alike(held, plain, dtype)


@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("name", NAMES)
def test_offload(name, to, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = block_of(name, torch.bfloat16)
    held = copy.deepcopy(plain)
    if to == "cpu":
        accelerate.cpu_offload(held, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(held, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in held.parameters())
    assert_alike(held, plain, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_weight_norm(name):
    held = block_of(name, torch.float32)
    for _, linear in linears(held):
        nn.utils.parametrizations.weight_norm(linear)
    assert_alike(held, block_of(name, torch.float32), torch.float32, exact=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_lora(name, dtype):
    peft = pytest.importorskip("peft")
    targets = ["c_proj", "b_proj", "x_proj", "o_proj", "q_proj", "k_proj", "v_proj"]
    held = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=True), block_of(name, dtype)
    )
    assert_alike(held, block_of(name, dtype), dtype)


@pytest.mark.parametrize("name", ["default", "exact", "exact_wide", "exact_delta"])
def test_fsdp2_with_mixed_precision(name):
    """Parameters are float32 and sharded; a call computes in bfloat16."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        plain = block_of(name, torch.float32)
        held = copy.deepcopy(plain)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        policy = fsdp.MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False)
        fsdp.fully_shard(held, mesh=mesh, mp_policy=policy)
        assert_alike(held, plain.bfloat16(), torch.bfloat16)
        casting = copy.deepcopy(plain).float()
        fsdp.fully_shard(casting, mesh=mesh, mp_policy=fsdp.MixedPrecisionPolicy(torch.bfloat16))
        with pytest.raises(TypeError, match=r"state.ssm must be float32 or float64, .*cast_forward_inputs=False"):
            casting(torch.randn(1, 1, 64), state=casting.init_state(1))
    finally:
        torch.distributed.destroy_process_group()


def test_a_state_of_bytes_is_refused():
    block = build(OPTIONS["text_window"])
    z, rotary, _ = prompt(1)
    state = block.init_state(1)
    state = state._replace(keys=state.keys.byte())
    with pytest.raises(TypeError, match=r"MMATE: state.keys must be float64, float32, bfloat16 or float16, got uint8"):
        block(z[:, :1], position_embeddings=tuple(t[:, :1] for t in rotary), state=state)
