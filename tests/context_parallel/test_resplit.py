"""Slabs by one split become those by another."""

from __future__ import annotations

import pytest
import torch

from linmu_ops.context_parallel import ContextParallel


def moved(group, t, lengths, others):
    context, other = ContextParallel(group, lengths), ContextParallel(group, others)
    return context.resplit(context.shard(t), other)


@pytest.mark.parametrize(
    "lengths, others",
    [([4, 3], [2, 5]), ([3, 3, 2], [5, 5, 5]), ([2, 0, 2, 4], [1, 7, 0, 3]), ([3, 3], [8, 8]), ([2, 2], [2, 2])],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool])
def test_slabs_are_cut_elsewhere(gang, lengths, others, dtype):
    """The last of the other slabs may have no token."""
    t = (torch.randn(2, sum(lengths), 3) if dtype != torch.bool else torch.rand(2, sum(lengths)) > 0.5).to(dtype)
    found = gang(len(lengths), moved, t, lengths, others)
    start = 0
    for slab, n in zip(found, others, strict=True):
        assert slab.dtype == dtype and torch.equal(slab, t[:, start : start + n])
        start += n
