"""Sizes and facts of the attention layer whose place a block takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

from torch import nn

from .._dims import check_flags, check_number, check_size, shown


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and facts of an attention layer.

    Attributes:
        dim: model size D.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, a divisor of H.
        head_dim: head size P.
        layer_idx: index of the decoder layer. It sets the major-scan order (mod 4) and the window shift (mod 2).
        qkv_bias, out_bias: whether the projections to q, k, v, and to the output, have biases.
        qk_norm: makes the norm of queries and keys, given the head size; None for no norm.
        scale: the softmax scale.
        interleaved_rotary: channels (0, 1), (2, 3), ... rotate together, instead of (0, R/2), (1, R/2 + 1), ...
        causal_windows: within its window a visual token attends to no later one.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_idx: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: Callable[[int], nn.Module] | None
    scale: float
    interleaved_rotary: bool
    causal_windows: bool

    @classmethod
    def of(
        cls,
        block: str,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        *,
        layer_idx: int,
        qk_norm: Callable[[int], nn.Module] | None,
        scale: float | None,
        **flags: bool,
    ) -> AttentionShape:
        """Fill in what is None, and check the rest.

        Raises:
            ValueError: a size does not divide another; `block` names the block in the message. TypeError: an argument
                is of another type.
        """
        sizes = {"dim": dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, given in sizes.items():
            if given is not None and (not isinstance(given, Integral) or given < 1):
                raise ValueError(f"{block}: {name} must be a positive integer, got {shown(given)}")
        check_size(block, "layer_idx", layer_idx, 0)
        check_flags(block, **flags)
        if qk_norm is not None and not callable(qk_norm):
            raise TypeError(f"{block}: qk_norm must be None, or make a norm of a size, got {shown(qk_norm)}")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % kv_heads:
            raise ValueError(f"{block}: num_kv_heads must divide num_heads={num_heads}, got {kv_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"{block}: num_heads must divide dim={dim} where head_dim is not given, got {num_heads}")
        size = dim // num_heads if head_dim is None else head_dim
        scale = size**-0.5 if scale is None else check_number(block, "scale", scale)
        return cls(dim, num_heads, kv_heads, size, layer_idx, qk_norm=qk_norm, scale=scale, **flags)

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """New linear maps to queries (H P), keys (G P) and values (G P)."""
        query, group = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            nn.Linear(self.dim, query, bias=self.qkv_bias),
            nn.Linear(self.dim, group, bias=self.qkv_bias),
            nn.Linear(self.dim, group, bias=self.qkv_bias),
        )

    def output_projection(self) -> nn.Linear:
        """A new linear map from the heads (H P) to the model size."""
        return nn.Linear(self.num_heads * self.head_dim, self.dim, bias=self.out_bias)

    def norm(self) -> nn.Module:
        """A new norm of queries or keys."""
        return self.qk_norm(self.head_dim) if self.qk_norm else nn.Identity()
