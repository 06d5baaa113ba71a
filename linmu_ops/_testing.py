"""What tests and benches share: the tolerance rule and the comparison that a NaN cannot pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def to_double(value: Any) -> Any:
    """A float tensor as float64 (requires_grad kept), anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def assert_within_twice(got: Tensor, exact: Tensor, baseline: Tensor, name: str = "value") -> None:
    """Fail unless |got - exact| <= 2 max|baseline - exact| + a few roundings of the output's own dtype.

    `exact` is the float64 reference, `baseline` the same-dtype PyTorch expression: the tolerance is what PyTorch
    itself gets wrong, so it needs no folklore per shape.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == baseline.dtype, f"{name}: dtype {got.dtype}, expected {baseline.dtype}"
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs()
    scale = exact.abs().max().item()
    bound = 2 * (baseline.double() - exact).abs().max().item() + 4 * torch.finfo(got.dtype).eps * scale + 1e-30
    worst = int(error.flatten().argmax())
    # `not (<=)`, because a NaN must fail.
    if not bool((error <= bound).all()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{name}: error {error.flatten()[worst]:.3e} at {index} exceeds {bound:.3e} "
            f"(scale {scale:.3e}, {int(error.isnan().sum())} NaN)"
        )


def check_against_reference(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    wrt: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Judge `op(**inputs)` and its gradients with respect to `wrt` by the float64 `reference(**inputs)`.

    Both return a Tensor or a tuple of Tensors. `reference` also runs in the inputs' own dtype, as the baseline of
    the tolerance rule.
    """

    def run(f: Callable[..., Any], values: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        leaves = {
            k: v.detach().clone().requires_grad_(k in wrt) if isinstance(v, Tensor) else v for k, v in values.items()
        }
        out = f(**leaves)
        outputs = list(out) if isinstance(out, (tuple, list)) else [out]
        if not wrt:
            return outputs, []
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for o in outputs]
        kept = [(o, w.to(o.dtype)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in kept], [leaves[k] for k in wrt], [w for _, w in kept])
        return outputs, list(grads)

    got, got_grads = run(op, inputs)
    base, base_grads = run(reference, inputs)
    exact, exact_grads = run(reference, {k: to_double(v) for k, v in inputs.items()})
    for i, (g, e, b) in enumerate(zip(got, exact, base, strict=True)):
        assert_within_twice(g, e, b, f"output {i}")
    for k, g, e, b in zip(wrt, got_grads, exact_grads, base_grads, strict=True):
        assert_within_twice(g, e, b, f"gradient of {k}")


def rerun_with_isa(isa: str, file: str, select: str) -> None:
    """Run the tests of `file` named `select` in a process whose kernels are of instruction set `isa`, or skip."""
    import pytest

    from . import _registry

    binary = _registry.binaries()["cpu"]
    levels = ("generic", "avx2", "avx512", "avx512bf16")
    if not binary.loaded:
        pytest.skip(f"{binary.file}: {binary.error}")
    if levels.index(isa) >= levels.index(binary.info["isa"]):
        pytest.skip(f"this processor's best is {binary.info['isa']}, which the other tests use")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", select]
    run = subprocess.run(command, env={**os.environ, "LINMU_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
