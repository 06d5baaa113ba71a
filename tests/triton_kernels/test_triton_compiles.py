"""A first call of a Triton kernel compiles few of them, and calls of other lengths none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU")
# Kernels of a call with its gradients. Each takes a second or so to compile, and only what a model has once may make
# more of them: no tuning, no length.
FIRST = {
    "ssd_scan": 10,  # in both directions: states and their adjoints, the walks over chunks, output, gradients
    "gated_delta_scan": 3,
    "window_attention": 4,
    "causal_conv1d": 3,
    "branch_mix_norm": 2,
    "gated_norm": 2,
    "causal_conv1d_step": 1,
    "ssd_step": 1,
    "gated_delta_step": 1,
}


def test_few_kernels_at_first_and_none_for_another_length():
    command = [sys.executable, "-W", "ignore", "-m", "tests.triton_kernels.compiles"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert {op: found["first"] for op, found in counts.items()} == FIRST
    assert not any(found["others"] for found in counts.values())
