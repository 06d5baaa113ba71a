"""Keys with a large common part, as the biases of Qwen2's are: at most twice the error of PyTorch's own attention."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from blocks import block_class

from linmu_ops import ExactMMATE, MMATEConfig, TokenLayout
from linmu_ops.nn import EXACT
from linmu_ops.nn.text_window import attend_with_lse

# Each block is its attention, exactly: nothing lies beyond its windows. (config, where the image of 6 tokens begins)
BLOCKS = {
    "text": (EXACT, None),
    "sinks": (dataclasses.replace(EXACT, text_window=8), None),
    "image": (EXACT, 3),
    "image_first": (dataclasses.replace(EXACT, text_window=8, sink_tokens=6), 4),
    "windows_alone": (MMATEConfig(branches="swin", text_window=16), None),
    "windows_and_image": (MMATEConfig(branches="swin", text_window=16), 0),
}
BIASES = {"keys_40": (0, 40), "keys_400": (0, 400), "both_40": (40, 40)}
DTYPES = [torch.bfloat16, torch.float16]
L = 12


def biased(biases):
    """PyTorch's attention, 2 heads of 32; of one row, where the error of each token counts."""
    attention = torch.nn.MultiheadAttention(64, 2, batch_first=True)
    with torch.no_grad():
        for part, bias in zip(attention.in_proj_bias.view(3, 64), biases, strict=False):
            part.fill_(bias)
    return attention


def pytorch(attention, h, dtype):
    """The same attention by `scaled_dot_product_attention`, everything in `dtype`."""
    weight, bias = attention.in_proj_weight.to(dtype), attention.in_proj_bias.to(dtype)
    q, k, v = (t.unflatten(2, (2, 32)).transpose(1, 2) for t in F.linear(h.to(dtype), weight, bias).chunk(3, -1))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return F.linear(y, attention.out_proj.weight.to(dtype), attention.out_proj.bias.to(dtype))


def error(got, exact):
    assert got.isfinite().all()
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("biases", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_prefill_and_steps(name, biases, dtype):
    config, image = BLOCKS[name]
    attention, h = biased(biases), torch.randn(4, L, 64).to(dtype)
    block = block_class(config).from_attention(attention, config=config, causal_windows=True)
    layout = None
    if image is not None:
        layout = TokenLayout([(row, 1, 2, 3) for row in range(4)], list(range(image, image + 6)) * 4, 4, L)
    weights = {name: t.to(dtype) for name, t in attention.state_dict().items()}
    attention.load_state_dict(weights)
    exact = pytorch(attention, h, torch.float64)
    bound = 2 * error(pytorch(attention, h, dtype), exact)
    block.to(dtype)
    assert error(block(h, layout=layout), exact) <= bound
    start = 0 if image is None else image + 6
    state, outs = block.init_state(4), []
    if start:
        first = TokenLayout([(row, 1, 2, 3) for row in range(4)], list(range(image, image + 6)) * 4, 4, start)
        outs.append(block(h[:, :start], layout=first, state=state))
    outs += [block(h[:, t : t + 1], state=state) for t in range(start, L)]
    assert error(torch.cat(outs, dim=1), exact) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("biases", BIASES.values(), ids=BIASES)
def test_gradients_of_the_windows(biases, dtype):
    shift = torch.tensor([*biases, 0.0])
    q, k, v = ((torch.randn(2, L, 2, 32) + s).to(dtype) for s in shift)
    mask, dy = torch.ones(2, L, L, dtype=torch.bool).tril(), torch.randn(2, L, 2, 32).to(dtype)

    def gradients(rule, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(rule(*inputs), inputs, dy.to(dtype))

    def theirs(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)

    every = (
        gradients(lambda *t: attend_with_lse(*t, mask, 32**-0.5)[0], dtype), gradients(theirs, dtype),
        gradients(theirs, torch.float64),
    )  # fmt: skip
    for ours, baseline, exact in zip(*every, strict=True):
        assert error(ours, exact) <= 2 * error(baseline, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@torch.no_grad()
def test_what_is_far(dtype, monkeypatch):
    """The mass of the scores of what is near and of what is far are compared: neither may be rounded."""
    monkeypatch.setattr("linmu_ops.nn.exact._CLOSED", 0.0)
    attention, h = biased((10, 40)), torch.randn(4, 48, 64).to(dtype)
    config = dataclasses.replace(EXACT, text_window=8, kept_tokens=8)
    attention.load_state_dict({name: t.to(dtype) for name, t in attention.state_dict().items()})
    block = ExactMMATE.from_attention(attention, config=config)
    block.calibrate([(dict(hidden_states=h.float()), pytorch(attention, h, torch.float32))])
    assert block.share.bias.abs().max() > 100
    for name, p in block.named_parameters():
        if p.dim() > 1 or "_proj" in name:  # as a converted model of half precision holds them
            p.data = p.data.to(dtype)
    exact = copy.deepcopy(block).double()(h.double())
    bound = 2 * error(pytorch(attention, h, dtype), pytorch(attention, h, torch.float64))
    assert error(block(h), exact) <= bound
    with torch.autocast("cpu", dtype):
        assert error(block.float()(h.float()), exact) <= bound
