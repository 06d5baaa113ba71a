"""What is asked of every scan: calls without tokens, and arguments as a layer has them."""

from __future__ import annotations

import torch

from linmu_ops._testing import results_of


def check_empty(scan, by_reference, i, wrt):
    """A call without rows, tokens or channels gives what the reference gives, gradients too."""

    def ones(outputs):
        return [torch.ones_like(o) for o in outputs]

    for got, want in zip(results_of(scan, i, wrt, ones), results_of(by_reference, i, wrt, ones), strict=True):
        assert torch.equal(got, want)


def check_strided(check, scan, i, direction, projected, rate, own):
    """Slices of one projection, transposed and expanded tensors are read where they lie, and so is a gradient.

    Args:
        check: of the op's values and gradients.
        i: contiguous arguments, all that the direction takes.
        projected: names of what one projection gives, (B, L, heads, channels); the first is what y is made of.
        rate: name of what is per token and head.
        own: name of a projection that the reverse direction has of its own.
    """
    i = dict(i)
    widths = [i[name].flatten(2).shape[2] for name in projected]
    fused = torch.randn(*i[rate].shape[:2], sum(widths))
    for name, part in zip(projected, fused.split(widths, dim=-1), strict=True):
        i[name] = part.view(i[name].shape)
    i[rate] = i[rate].transpose(0, 1).contiguous().transpose(0, 1)
    i["initial_state"] = i["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    i["seq_idx"] = i["seq_idx"][:1].expand_as(i["seq_idx"])
    if direction != "forward":
        i[own] = i[own].transpose(2, 3).contiguous().transpose(2, 3)
        i["reverse_mask"] = i["reverse_mask"].t().contiguous().t()
    check(i)
    leaf = i[projected[0]].clone().requires_grad_()
    scan(**{**i, projected[0]: leaf})[0].sum().backward()  # an expanded gradient
    assert leaf.grad.isfinite().all()
