"""A cross of dimensions of which `make test` runs as many combinations as hold each pair of values together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def kept(sizes: Sequence[int]) -> set[tuple[int, ...]]:
    """Combinations of places, few, such that any two places of two dimensions are together in one of them."""
    every = list(itertools.product(*map(range, sizes)))
    pairs = list(itertools.combinations(range(len(sizes)), 2))
    for step in range(max(sizes), 1, -1):
        chosen = {at for at in every if sum(at) % step == 0}
        if all(len({(at[a], at[b]) for at in chosen}) == sizes[a] * sizes[b] for a, b in pairs):
            return chosen
    return set(every)


def covering(names: str, *dimensions: Sequence[Any], ids: Sequence[Any] | None = None) -> pytest.MarkDecorator:
    """A mark like `parametrize` of the whole cross; combinations that `make test` does not need are of the sweep.

    `ids` has something that gives a name, as `ids` of `parametrize`, for each dimension; by default all have `str`.
    """
    chosen = kept([len(d) for d in dimensions])
    named = [list(map(f, d)) for f, d in zip(ids or [str] * len(dimensions), dimensions, strict=True)]
    params = [
        pytest.param(
            *(d[i] for d, i in zip(dimensions, at, strict=True)),
            marks=() if at in chosen else pytest.mark.sweep,
            id="-".join(n[i] for n, i in zip(named, at, strict=True)),
        )
        for at in itertools.product(*(range(len(d)) for d in dimensions))
    ]
    return pytest.mark.parametrize(names.split(", "), params)
