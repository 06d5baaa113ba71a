"""An option that has no effect beside another is refused: no two configurations that are taken give the same block."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from blocks import DIM, GROUPS, HEADS, P, block_class, layout_of, prompt

from linmu_ops import ExactConfig, ExactMMATE, MMATEConfig

# Values beside those of `START`, for each field of the two.
OTHER = dict(
    branches="flex", literal=True, reverse=False, major_scan=False, initial_decay=0.5, initial_scale=1.0,
    head_norm=True, text_window=2, window=(1, 2, 2), image_window=None, sink_tokens=0, kept_tokens=0, far="delta",
    feature_dim=5,
)  # fmt: skip
START = {
    MMATEConfig: dict(window=(2, 2, 2), image_window=(1, 2, 3)),
    ExactConfig: dict(window=(2, 2, 2), image_window=(1, 2, 3), text_window=3, sink_tokens=1, kept_tokens=1),
}


@functools.cache
def made(config):
    """What a new block of it holds, and what it gives once each parameter has moved in a way of its own."""
    torch.manual_seed(0)
    block = block_class(config)(DIM, HEADS, GROUPS, P, layer_idx=1, config=config).double()
    start = {name: value.clone() for name, value in block.state_dict().items()}
    z, rotary, blocks = prompt()
    with torch.no_grad():
        if isinstance(block, ExactMMATE):
            block.share.bias.zero_()  # it starts where what is far hardly counts
            block.far_limit.fill_(4)
        for name, p in block.named_parameters():
            seed = torch.Generator().manual_seed(sum(name.encode()))
            p.add_(0.3 * torch.randn(p.shape, generator=seed, dtype=p.dtype))
        return start, block(z, layout=layout_of(blocks, z.shape[1]), position_embeddings=rotary)


def alike(a, b):
    (start, out), (other_start, other_out) = made(a), made(b)
    if {k: v.shape for k, v in start.items()} != {k: v.shape for k, v in other_start.items()}:
        return False
    return torch.equal(out, other_out) and all(torch.equal(v, other_start[k]) for k, v in start.items())


def replaced(config, name, value):
    """The configuration with this option; None where it is refused beside another."""
    try:
        return dataclasses.replace(config, **{name: value})
    except ValueError as error:
        if "must be left out with" not in str(error):
            raise
        return None


def pairs():
    for kind in START:
        names = [f.name for f in dataclasses.fields(kind)]
        for beside, name in itertools.product([None, *names], names):
            if beside != name:
                yield pytest.param(kind, beside, name, id=f"{kind.__name__}, {beside}, {name}")


@pytest.mark.parametrize(("kind", "beside", "name"), list(pairs()))
def test_each_option_changes_the_block_beside_each_other_or_is_refused(kind, beside, name):
    values = OTHER | dict(z_gate=kind is MMATEConfig)
    # What "flex" has no place for is no part of it.
    start = {} if beside == "branches" else START[kind]
    one = kind(**start | ({} if beside is None else {beside: values[beside]}))
    two = replaced(one, name, values[name])
    assert two is None or not alike(one, two)
