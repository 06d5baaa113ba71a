"""Copies the weights of an attention layer into the parts of a block (LinMU, arXiv:2601.01322, Eq. 4-5)."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ._attention import HEADS, SCALES, first, read

if TYPE_CHECKING:
    from .block import Block

B = TypeVar("B", bound="Block")
# (the block's module, the attention's part); a block has some of these modules
PARTS = (
    ("scan.c_proj", "q"), ("scan.b_proj", "k"), ("scan.x_proj", "v"),
    ("scan.reverse_c_proj", "q"), ("scan.reverse_b_proj", "k"), ("scan.c_norm", "q_norm"), ("scan.b_norm", "k_norm"),
    ("windows.q_proj", "q"), ("windows.k_proj", "k"), ("windows.v_proj", "v"),
    ("windows.q_norm", "q_norm"), ("windows.k_norm", "k_norm"),
    ("o_proj", "o"), ("scan_o_proj", "o"), ("windows_o_proj", "o"),
)  # fmt: skip


class TransferRow(NamedTuple):
    """One parameter of the block: where it came from."""

    name: str  # in the block's state dict
    source: str  # in the attention layer; "" for a new one
    how: str  # "copied" or "new"


@torch.no_grad()
def load_attention_weights(
    block: Block,
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
    op = block._name
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


def from_attention(
    cls: type[B],
    attention: nn.Module,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    layer_idx: int = 0,
    **options: Any,
) -> B:
    """Build a block from an attention module and copy its weights.

    Args:
        cls: `MMATE` or `ExactMMATE`.
        attention: a module with linear projections under the names of transformers, timm, diffusers or
            `torch.nn.MultiheadAttention`, separate or fused. It may have norms of queries and keys per head. A dropout
            is left out, with a warning.
        num_heads: the module's num_heads, num_attention_heads or config.num_attention_heads if None.
        num_kv_heads: from the shape of the key projection if None.
        head_dim: from the shape of the query projection if None.
        layer_idx: of the block.
        options: other arguments of the block (scale, config). scale: the module's own `scaling` or `scale` if not
            given.

    Raises:
        ValueError: the module has no projection of a known name, or no number of heads; or it has a part that changes
            its result and that a block has no place for. The message names the part.
        TypeError: its weights are quantised.
    """
    heads = num_heads or first(attention, HEADS) or first(getattr(attention, "config", None), HEADS)
    config = options.get("config") or cls.default_config
    causal = options.get("causal_windows")
    causal = cls.default_causal_windows if causal is None else causal
    reach = max(config.text_window, math.prod(config.window) if causal else 0)
    weights, biases, names, norms = read(attention, heads, reach)
    q, k, v, o = (weights[part] for part in "qkvo")
    head_dim = head_dim or q.shape[0] // heads
    query_norm = norms["q_norm"]
    scale = first(attention, SCALES)
    if isinstance(scale, (Tensor, nn.Module)):
        raise ValueError(
            f"from_attention: scale must be given for {type(attention).__name__}, whose own is learned, got None"
        )
    options.setdefault("scale", scale if isinstance(scale, float) else None)
    block = cls(
        o.shape[0], heads, num_kv_heads or k.shape[0] // head_dim, head_dim, layer_idx=layer_idx,
        qkv_bias=any(biases[part] is not None for part in "qkv"), out_bias=biases["o"] is not None,
        qk_norm=None if query_norm is None else lambda _: copy.deepcopy(query_norm), **options,
    )  # fmt: skip
    block.to(device=q.device, dtype=q.dtype)
    block.load_attention_weights(
        q_weight=q, k_weight=k, v_weight=v, o_weight=o, **{f"{part}_bias": bias for part, bias in biases.items()},
        q_norm=query_norm, k_norm=norms["k_norm"], names=names,
    )  # fmt: skip
    return block
