"""What Python says that the CUDA kernels need of shared memory is what they take, to the byte."""

from __future__ import annotations

import pytest
import torch

from linmu_ops import _registry
from linmu_ops._testing import run_op
from tests.ops.cases import ssd_scan as scan_cases

pytestmark = pytest.mark.usefixtures("by_emulator")


def scan(size, dtype, options):
    inputs = scan_cases.make_inputs((1, 3, 1, 1, 1, 1, size, size), dtype, "both", options)
    return "ssd_scan", inputs, [inputs["x"]]


def attention(size, dtype, biased):
    q, k, v = (torch.randn(1, 4, 1, size, dtype=dtype) for _ in range(3))
    bias = dict(bias=torch.randn(1, 7)) if biased else {}
    return "window_attention", dict(q=q, k=k, v=v, grid=(4,), window=(4,)) | bias, [q, *bias.values()]


CASES = {
    "scan, float32": lambda: scan(128, torch.float32, ()),
    "scan, bfloat16, own B": lambda: scan(130, torch.bfloat16, ("reverse_B",)),
    "window, float32": lambda: attention(256, torch.float32, False),
    "window, float32, bias": lambda: attention(256, torch.float32, True),
    "window, bfloat16": lambda: attention(128, torch.bfloat16, False),
    "window, float16, bias": lambda: attention(200, torch.float16, True),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_least_shared_memory(name, backward, monkeypatch):
    op, inputs, leaves = CASES[name]()
    for leaf in leaves:
        leaf.requires_grad_(backward)
    asked = _registry.Asked(inputs, 0)
    needed = int(_registry.OPS[op].limits["cuda"](asked).split(" bytes")[0].split()[-1])

    def run():
        out = run_op(op, **inputs)
        if backward:
            out.sum().backward()

    monkeypatch.setenv("LINMU_EMULATED_SHARED", str(needed))
    run()
    monkeypatch.setenv("LINMU_EMULATED_SHARED", str(needed - 1))
    with pytest.raises((RuntimeError, ValueError), match=f"needs {needed} bytes of shared memory per block"):
        run()
