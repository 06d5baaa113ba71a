"""Small blocks with every option, and the inputs that they are tried on."""

from __future__ import annotations

import definition
import torch
from torch import nn

from linmu_ops import MMATE, ExactConfig, ExactMMATE, MMATEConfig, TokenLayout

DIM, HEADS, GROUPS, P = 12, 4, 2, 4
# Windows that the visual blocks exceed, so that shifts and partial windows occur.
SMALL = dict(window=(2, 2, 2), image_window=(1, 2, 3))
OPTIONS = {
    "default": MMATEConfig(**SMALL),
    "causal": MMATEConfig(**SMALL, reverse=False),
    "in_place": MMATEConfig(**SMALL, major_scan=False),
    "long_memory": MMATEConfig(**SMALL, initial_decay=(0.9, 0.999)),
    "same_window": MMATEConfig(window=(2, 2, 2), image_window=None),
    "text_window": MMATEConfig(**SMALL, text_window=3),
    "literal": MMATEConfig(**SMALL, literal=True, initial_decay=None, initial_scale=None),
    "no_swin": MMATEConfig(branches="flex", z_gate=True),
    "no_flex": MMATEConfig(branches="swin", **SMALL),
    "all": MMATEConfig(**SMALL, literal=True, z_gate=True, head_norm=True, text_window=5),
    "exact": ExactConfig(**SMALL, text_window=3, sink_tokens=2, kept_tokens=2),
    "exact_plain": ExactConfig(**SMALL, text_window=4, sink_tokens=0, kept_tokens=0, z_gate=False),
    "exact_wide": ExactConfig(
        **SMALL, text_window=2, sink_tokens=5, kept_tokens=5, feature_dim=11, initial_decay=(0.9, 0.999)
    ),
    "exact_delta": ExactConfig(**SMALL, text_window=3, sink_tokens=2, kept_tokens=2, far="delta", feature_dim=5),
}


class Norm(nn.Module):
    """RMSNorm, as a teacher has one of queries and keys."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


def block_class(config):
    return ExactMMATE if isinstance(config, ExactConfig) else MMATE


def build(config, layer_idx=1, dtype=torch.float64, perturb=0.3, **facts):
    """A block with every parameter moved off its neutral start."""
    facts = dict(qkv_bias=True, out_bias=True, qk_norm=Norm) | facts
    block = block_class(config)(DIM, HEADS, GROUPS, P, layer_idx=layer_idx, config=config, **facts)
    with torch.no_grad():
        if isinstance(block, ExactMMATE):
            block.share.bias.zero_()  # it starts where what is far hardly counts
            block.far_limit.fill_(4)
        for p in block.parameters():
            p.add_(perturb * torch.randn_like(p))
    return block.to(dtype)


def prompt(batch=2, seed=0, dtype=torch.float64):
    """Hidden states, rotary and blocks: text, video, text, image, text; the second row one image with gaps."""
    g = torch.Generator().manual_seed(seed)
    L = 24
    z = torch.randn(batch, L, DIM, generator=g, dtype=torch.float64).to(dtype)
    angle = torch.randn(batch, L, 1, generator=g, dtype=torch.float64)
    cos, sin = angle.cos().expand(-1, -1, 2).to(dtype), angle.sin().expand(-1, -1, 2).to(dtype)
    blocks = [
        [((3, 1, 3), list(range(2, 11))), ((1, 2, 3), list(range(13, 19)))],
        [((1, 3, 2), [4, 5, 7, 8, 10, 11])],
    ]
    return z, (cos, sin), blocks[:batch]


def layout_of(blocks, length):
    table = [(row, *size) for row, many in enumerate(blocks) for size, _ in many]
    return TokenLayout(table, [p for many in blocks for _, positions in many for p in positions], len(blocks), length)


def rows(block, z, rotary, blocks):
    """What the definition gives for each row."""
    return torch.stack(
        [definition.block(block, z[i], blocks[i], tuple(t[i] for t in rotary)) for i in range(len(blocks))]
    )


def pieces(t, cuts):
    return [t[:, a:b] for a, b in zip([0, *cuts], [*cuts, t.shape[1]], strict=True)]
