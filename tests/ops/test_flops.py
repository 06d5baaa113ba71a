"""PyTorch's counter counts an op's own matrix products, forward and backward, whatever implementation serves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import run_op, small_inputs

# Rows, groups, and of 21 tokens each 5 in its range; 8 read the first of two lists, and 6 the other.
NEAR_PAIRS = 2 * 2 * 21 * 5 + int(
    (small_inputs("near_attention")["listed"] >= 0).view(4, 2, 3).sum((0, 2)) @ torch.tensor([8, 6])
)
# Of the small cases, by hand: forward; the backward's follow.
COUNTS = {
    "branch_mix_norm": (0, 0),
    "causal_conv1d": (2 * (2 * 19 * 24) * 4, 2),
    "causal_conv1d_step": (2 * (2 * 24) * 4, None),
    "exact_step": (4 * (2 * 6) * 8 * (3 + 10 + 4) + 2 * (2 * 6) * (8 + 9) * 12, None),
    "far_attention": (2 * 2 * 12 * ((23 + 29) * 6 * 9 + (23 * 6 + 29 * 3) * 8), None),
    "gated_delta_scan": (2 * 6 * (2 * 37 * 8) * 12 * 8, 2),  # both directions
    "gated_delta_step": (6 * (2 * 8) * 12 * 8, None),
    "gated_norm": (0, 0),
    "near_attention": (4 * 2 * 16 * NEAR_PAIRS, 2.5),
    "ssd_scan": (2 * 4 * (2 * 37 * 8) * 8 * 12, 2),  # both directions
    "ssd_step": (4 * (2 * 8) * 8 * 12, None),
    # Grid (3, 5, 6), windows of (2, 3, 4): 2 + 1 by 3 + 2 by 4 + 2 tokens, in two rows.
    "window_attention": (4 * 4 * 16 * 2 * (2**2 + 1) * (3**2 + 2**2) * (4**2 + 2**2), 2.5),
}


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_count(op, impl):
    forward, times = COUNTS[op]
    inputs = small_inputs(op)
    with linmu_ops.use_impl(f"{op}:{impl}"):
        assert counted(lambda: run_op(op, **inputs)) == forward
        if times is None:
            return
        next(iter(inputs.values())).requires_grad_()
        out = run_op(op, **inputs)
        out = out[0] if isinstance(out, tuple) else out
        assert counted(lambda: out.sum().backward()) == forward * times


def test_a_mass_counts_as_one_channel_of_x():
    for op in ("ssd_scan", "ssd_step"):
        expected = COUNTS[op][0] // 8 * 9
        assert counted(lambda op=op: run_op(op, **small_inputs(op, normalize=True))) == expected


def test_every_op_of_every_namespace_has_a_formula():
    from torch.utils.flop_counter import flop_registry

    for op in _registry.OPS.values():
        for namespace in _registry._libraries:
            for entry, *_ in op.entries:
                assert getattr(getattr(torch.ops, namespace), entry) in flop_registry


def test_counter_imported_later_knows_them_and_earlier_too():
    imports = ["import linmu_ops", "from torch.utils.flop_counter import flop_registry"]
    for lines in (imports, imports[::-1]):
        code = "; ".join(["import torch", *lines, "print(torch.ops.linmu.ssd_scan_bwd in flop_registry)"])
        done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr
