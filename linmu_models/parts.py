"""What an attention module of transformers is made of, under the names that its family gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

NAMES = {
    "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj", "out_proj", "dense"),
    "qkv": ("qkv_proj", "query_key_value"),
    "q_norm": ("q_norm", "q_layernorm", "query_layernorm", "qk_norm"),
    "k_norm": ("k_norm", "k_layernorm", "key_layernorm", "qk_norm"), "v_norm": ("v_norm",),
}  # fmt: skip
SCALES = ("scaling", "scale")


@dataclass(frozen=True)
class AttentionParts:
    """Sizes, linear maps and norms of softmax attention.

    Attributes:
        heads, kv_heads, head_dim: H, G, P.
        scale: of the scores.
        weights: q (H P, D), k and v (G P, D), o (D, H P); gate (H P, D), of the heads' outputs, where there is one.
        biases: of these, where they have one.
        norms: q_norm, k_norm, v_norm, of queries, keys and values per head; None where there is none.
        names: what the module calls each.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    norms: dict[str, nn.Module | None]
    names: dict[str, str] = field(default_factory=dict)

    @property
    def gated(self) -> bool:
        """The heads' outputs are multiplied by the sigmoid of a linear map of the input."""
        return "gate" in self.weights

    def apply(self, part: str, x: Tensor) -> Tensor:
        """One of the linear maps."""
        return nn.functional.linear(x, self.weights[part], self.biases[part])


def read_parts(attention: Any) -> AttentionParts:
    """Find the parts of an attention module.

    A projection to queries that is twice as wide as the output projection's input holds, for each head, its queries and
    then its gate. One projection may hold queries, keys and values, in this order. A `v_proj` that is None means that
    values are the keys before their norm.

    Raises:
        ValueError: it has not the linear maps of attention, or they do not fit.
    """
    kind = type(attention).__name__
    config = getattr(attention, "config", None)
    found = {part: _first(attention, names) for part, names in NAMES.items()}
    names = {part: name for part, (name, _) in found.items() if name}
    size = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    output = found["o"][1]
    whole = found["qkv"][1]
    if getattr(attention, "is_kv_shared_layer", False):
        raise ValueError(f"{kind} must have keys and values of its own, got those of an earlier layer")
    if getattr(attention, "v_proj", attention) is None:
        found["v"], names["v"] = found["k"], names.get("k", "")
    for part in "qkvo":
        projection = output if part == "o" else found[part][1] or whole
        if not isinstance(projection, nn.Linear):
            raise ValueError(f"{kind} must have linear maps q_proj, k_proj, v_proj, o_proj, got no {part}_proj")
    width = output.in_features
    if not isinstance(size, int) or width % size:
        raise ValueError(f"{kind} must have heads that divide o_proj's inputs, {width}, got head_dim={size}")
    weights: dict[str, Tensor] = {"o": output.weight}
    biases: dict[str, Tensor | None] = {"o": output.bias}
    if isinstance(found["q"][1], nn.Linear):
        for part in "qkv":
            weights[part], biases[part] = found[part][1].weight, found[part][1].bias
        if len(weights["q"]) == 2 * width:
            both, bias = weights["q"].unflatten(0, (-1, 2, size)), biases["q"]
            weights["q"], weights["gate"] = (both[:, i].flatten(0, 1) for i in (0, 1))
            biases["q"], biases["gate"] = (
                None if bias is None else bias.unflatten(0, (-1, 2, size))[:, i].flatten() for i in (0, 1)
            )
            names["gate"] = names["q"]
    else:
        group = (whole.out_features - width) // 2
        names |= dict.fromkeys("qkv", names["qkv"])
        for part, rows in zip("qkv", whole.weight.split([width, group, group]), strict=True):
            weights[part] = rows
        split = [None] * 3 if whole.bias is None else whole.bias.split([width, group, group])
        biases |= dict(zip("qkv", split, strict=True))
    if len(weights["q"]) != width or len(weights["k"]) % size or len(weights["k"]) != len(weights["v"]):
        got = ", ".join(str(len(weights[part])) for part in "qkv")
        raise ValueError(f"{kind}.q_proj must have as many outputs as o_proj has inputs, {width}, got {got} of q, k, v")
    scale = next((s for n in SCALES if isinstance(s := getattr(attention, n, None), (int, float))), size**-0.5)
    return AttentionParts(
        width // size, len(weights["k"]) // size, size, float(scale), weights, biases,
        {part: found[part][1] for part in ("q_norm", "k_norm", "v_norm")}, names,
    )  # fmt: skip


def _first(attention: Any, names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of these that the module has, and its name."""
    for name in names:
        part = getattr(attention, name, None)
        if isinstance(part, nn.Module):
            return name, part
    return "", None
