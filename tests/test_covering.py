"""A covering selection leaves no two values of two dimensions apart."""

import itertools
from math import prod

import pytest

from tests.covering import covering, kept


@pytest.mark.parametrize("sizes", [(6, 4, 3, 4), (10, 3, 2, 2), (3, 4, 3), (7, 2, 2), (3, 2), (5, 1, 2)], ids=str)
def test_each_pair_is_in_it(sizes):
    chosen = kept(sizes)
    for a, b in itertools.combinations(range(len(sizes)), 2):
        assert {(at[a], at[b]) for at in chosen} == set(itertools.product(range(sizes[a]), range(sizes[b])))
    if len(sizes) > 2 and min(sizes) > 1:
        assert len(chosen) <= prod(sizes) / 2


def test_the_whole_cross_is_in_the_sweep():
    names, params = covering("a, b, c", "xyz", [1, 2, 3], [True, False, None]).args
    assert names == ["a", "b", "c"] and len({p.values for p in params}) == len({p.id for p in params}) == 27
    assert sum(not p.marks for p in params) == 9
