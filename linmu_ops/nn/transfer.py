"""Copies the weights of an attention layer into the parts of a block (LinMU, arXiv:2601.01322, Eq. 4-5)."""

from __future__ import annotations

import copy
import functools
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._attention import HEADS, SCALES, UNSCALED, first, read

# (the block's module, the attention's part); a block has some of these modules
PARTS = (
    ("scan.c_proj", "q"), ("scan.b_proj", "k"), ("scan.x_proj", "v"),
    ("scan.reverse_c_proj", "q"), ("scan.reverse_b_proj", "k"), ("scan.c_norm", "q_norm"), ("scan.b_norm", "k_norm"),
    ("windows.q_proj", "q"), ("windows.k_proj", "k"), ("windows.v_proj", "v"),
    ("windows.q_norm", "q_norm"), ("windows.k_norm", "k_norm"),
    ("o_proj", "o"), ("scan_o_proj", "o"), ("windows_o_proj", "o"),
)  # fmt: skip


def copied(norm: nn.Module, size: int) -> nn.Module:
    """What makes the norm of a block that has an attention layer's. By name, so that the block can be pickled."""
    return copy.deepcopy(norm)


class TransferRow(NamedTuple):
    """One parameter of the block: where it came from."""

    name: str  # in the block's state dict
    source: str  # in the attention layer; "" for a new one
    how: str  # "copied" or "new"


@torch.no_grad()
def load_attention_weights(
    block: nn.Module,
    *,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    q_norm: nn.Module | None = None,
    k_norm: nn.Module | None = None,
    names: dict[str, str] | None = None,
) -> list[TransferRow]:
    """Copy an attention layer's weights into a block.

    In `block.scan` C takes the query's weights, B the key's, X the value's. `block.windows` takes all three as they
    are. The block's output projections take the attention's.

    Args:
        block: `MMATE` or `ExactMMATE`.
        q_weight, k_weight, v_weight, o_weight: (H P, D), (G P, D), (G P, D), (D, H P).
        q_bias, k_bias, v_bias, o_bias: their biases. One that is None becomes 0 where the block has a bias.
        q_norm, k_norm: norms of queries and keys per head, of the class that the block's `qk_norm` makes.
        names: what the report calls q, k, v, o, q_norm, k_norm; "q_proj" and so on by default.

    Returns:
        One row per parameter of the block. Those called "new" keep the values they had.

    Raises:
        ValueError: a shape differs, or the block has no place for a bias or norm that is given.
    """
    names = {**{k: f"{k}_proj" for k in "qkvo"}, "q_norm": "q_norm", "k_norm": "k_norm", **(names or {})}
    given: dict[str, dict[str, Tensor]] = {}
    for part, weight, bias in (
        ("q", q_weight, q_bias), ("k", k_weight, k_bias), ("v", v_weight, v_bias), ("o", o_weight, o_bias),
    ):  # fmt: skip
        given[part] = {"weight": weight, **({} if bias is None else {"bias": bias})}
    for part, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        given[part] = {} if norm is None else dict(norm.state_dict())
    sources: dict[str, str] = {}
    op = type(block).__name__
    modules = dict(block.named_modules())
    for module_name, part in PARTS:
        module = modules.get(module_name)
        if module is None:
            continue
        have = dict(module.state_dict(keep_vars=True))
        for key, value in given[part].items():
            name = f"{module_name}.{key}"
            if key not in have:
                raise ValueError(f"{op}: {name} must exist to hold {names[part]}.{key}, got a block built without it")
            if have[key].shape != value.shape:
                raise ValueError(
                    f"{op}: {names[part]}.{key} must be {tuple(have[key].shape)} for {name}, got {tuple(value.shape)}"
                )
            have[key].copy_(value)
            sources[name] = f"{names[part]}.{key}"
        if part in "qkvo" and "bias" in have and "bias" not in given[part]:
            have["bias"].zero_()
    return [
        TransferRow(name, sources.get(name, ""), "copied" if name in sources else "new")
        for name, _ in block.named_parameters()
    ]


def read_attention(
    attention: nn.Module, reach: int, num_heads: int | None, num_kv_heads: int | None, head_dim: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a block with an attention layer's sizes, and those of its `load_attention_weights`.

    The last three are read where they are None. reach: how many tokens the block's windows hold, if they are causal.
    """
    heads = num_heads or first(attention, HEADS) or first(getattr(attention, "config", None), HEADS)
    weights, biases, names, norms = read(attention, heads, reach)
    query_norm = norms["q_norm"]
    scale = 1.0 if type(attention).__name__ in UNSCALED else first(attention, SCALES)
    if isinstance(scale, (Tensor, nn.Module)):
        raise ValueError(
            f"from_attention: scale must be given for {type(attention).__name__}, whose own is learned, got None"
        )
    size = head_dim or weights["q"].shape[0] // heads
    sizes = {
        "dim": weights["o"].shape[0],
        "num_heads": heads,
        "num_kv_heads": num_kv_heads or weights["k"].shape[0] // size,
        "head_dim": size,
        "qkv_bias": any(biases[part] is not None for part in "qkv"),
        "out_bias": biases["o"] is not None,
        "qk_norm": None if query_norm is None else functools.partial(copied, query_norm),
        "scale": float(scale) if isinstance(scale, Real) and not isinstance(scale, bool) else None,
    }
    values: dict[str, Any] = {f"{part}_weight": weight for part, weight in weights.items()}
    values |= {f"{part}_bias": bias for part, bias in biases.items()}
    return sizes, {**values, **norms, "names": names}
