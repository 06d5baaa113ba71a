"""What `torch.utils.flop_counter.FlopCounterMode` counts for an op: the textbook count of its own matrix products.

A product of (m, k) and (k, n) counts 2 m k n, as PyTorch's own formulas have it; elementwise work counts nothing. A
chunked or tiled kernel may do more, and is not charged for it:

    ssd_scan              per direction and visit, dt x (outer) B and h C: 4 H P N; the gradient twice that. A mass
                          counts as one channel of x
    ssd_step              the same, one visit
    exact_step            q K^T and weights V over the n places, the map of q to features, and their products with the
                          state: 4 H P n + 2 H P N + 2 H (P + 1) N
    gated_delta_scan      per direction and visit, k S, k (outer) what is written, and q S: 6 H K V; the gradient twice
    gated_delta_step      the same, one visit
    causal_conv1d         2 D K a token; the gradient twice that
    causal_conv1d_step    the same, one token
    window_attention      q k^T and weights v: 4 H P n^2 for each window of n tokens, causal or not; the gradient makes
                          the scores again and has four products more: 10 H P n^2
    near_attention        the same of what each token sees: 4 H P for each pair; the gradient 2.5 times that
    far_attention         the maps of keys and queries to features, and the products with the state, as if every token
                          entered it and every one read it: for each head of a token 2 P N and 2 (P + 1) N, of a key
                          2 P N and for each of its query heads 2 (P + 1) N
    branch_mix_norm       0
    gated_norm            0
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

COUNTER = "torch.utils.flop_counter"

# The arguments of a call by the names of its schema -> operations.
Count = Callable[[Mapping[str, Any]], int]


def _ssd_scan(given: Mapping[str, Any]) -> int:
    P, N = given["x"].shape[-1] + bool(given.get("normalize")), given["B"].shape[-1]
    return 4 * math.prod(given["dt"].shape) * P * N * (2 if given.get("direction") == "both" else 1)


def _exact_step(given: Mapping[str, Any]) -> int:
    batch, heads, size = given["q"].shape
    places, features = given["keys"].shape[2], given["c_map"].shape[2]
    return 2 * batch * heads * (2 * size * places + (2 * size + 1) * features)


def _far_attention(given: Mapping[str, Any]) -> int:
    (batch, length, heads, size), (_, total, groups, _) = given["q"].shape, given["k"].shape
    features, products = given["c_map"].shape[2], (length + total) * heads * (size + 1)
    return 2 * batch * features * (products + (length * heads + total * groups) * size)


def _gated_delta(given: Mapping[str, Any]) -> int:
    K, V = given["k"].shape[-1], given["v"].shape[-1]
    return 6 * math.prod(given["g"].shape) * K * V * (2 if given.get("direction") == "both" else 1)


def _causal_conv1d(given: Mapping[str, Any]) -> int:
    return 2 * math.prod(given["x"].shape) * given["weight"].shape[1]


def _pairs(offsets: Tensor, tokens: int) -> int:
    """Sum of the squares of the windows' sizes; as of equal windows where a tracer hides them."""
    if type(offsets) is Tensor and offsets.device.type != "meta":
        with _disable_current_modes():  # They may be counting bytes, or have no values.
            return int(offsets.diff().long().square().sum())
    windows = max(offsets.shape[0] - 1, 1)
    return tokens * tokens // windows


def _window_attention(given: Mapping[str, Any]) -> int:
    heads, size = given["q"].shape[2:]
    return 4 * heads * size * _pairs(given["offsets"], given["tokens"].shape[0])


def _near_attention(given: Mapping[str, Any]) -> int:
    heads, size = given["q"].shape[2:]
    return 4 * heads // given["k"].shape[2] * size * _seen(given)


def _seen(given: Mapping[str, Any]) -> int:
    """Pairs of a token and what it sees, over the groups; as if it saw all of its list where a tracer hides values."""
    low, high, which, listed = (given[name] for name in ("low", "high", "which", "listed"))
    if type(low) is not Tensor or low.device.type == "meta":
        return int(which.numel() * listed.shape[1])
    with _disable_current_modes():
        own = torch.arange(given["k"].shape[1] - low.shape[1], given["k"].shape[1], device=low.device)
        ranges = int((torch.minimum(high, own + 1) - low).clamp(min=0).sum()) * which.shape[1]
        lists = torch.cat((listed, listed.new_full((1, listed.shape[1]), -1)))[which.long()]
        return ranges + int(((lists >= 0) & (lists <= own[:, None])).sum())


def _nothing(given: Mapping[str, Any]) -> int:
    return 0


COUNTS: dict[str, Count] = {
    "branch_mix_norm": _nothing,
    "branch_mix_norm_bwd": _nothing,
    "causal_conv1d": _causal_conv1d,
    "causal_conv1d_bwd": lambda given: 2 * _causal_conv1d(given),
    "causal_conv1d_step": _causal_conv1d,
    "exact_step": _exact_step,
    "far_attention": _far_attention,
    "gated_delta_scan": _gated_delta,
    "gated_delta_scan_bwd": lambda given: 2 * _gated_delta(given),
    "gated_delta_step": _gated_delta,
    "gated_norm": _nothing,
    "gated_norm_bwd": _nothing,
    "near_attention": _near_attention,
    "near_attention_bwd": lambda given: 5 * _near_attention(given) // 2,
    "ssd_scan": _ssd_scan,
    "ssd_scan_bwd": lambda given: 2 * _ssd_scan(given),
    "ssd_step": _ssd_scan,
    "window_attention": _window_attention,
    "window_attention_bwd": lambda given: 5 * _window_attention(given) // 2,
}


def _formula(packet: Any) -> Callable[..., int]:
    names = [a.name for a in packet.default._schema.arguments]
    count = COUNTS[packet.__name__]

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return count({**dict(zip(names, args, strict=False)), **kwargs})

    return formula


_packets: list[Any] = []


class _WhenImported(importlib.abc.MetaPathFinder):
    """Tells PyTorch's counter of the ops as soon as it is imported: it imports Triton, which we do not."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _tell(_packets)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _tell(packets: Sequence[Any]) -> None:
    for packet in packets:
        sys.modules[COUNTER].register_flop_formula(packet, get_raw=True)(_formula(packet))


def register(namespace: str, entry: str) -> None:
    """Make PyTorch's counter know the op `entry` of a namespace."""
    packet = getattr(getattr(torch.ops, namespace), entry)
    _packets.append(packet)
    if COUNTER in sys.modules:
        _tell([packet])


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
