"""Corrupt arguments handed straight to the dispatcher ops and to the planner: they raise, and touch nothing outside.

`make asan` runs this with both libraries under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linmu_ops import _native, _registry
from linmu_ops._testing import run_op, run_small, small_inputs

REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
COMPILED = sorted(op for op in _registry.OPS if _registry.why_not(op, "cpu", "cpu") is None)
# Values that index memory. Segment indices (seq_idx) are only compared, so that any value is legal there.
POSITIONS = ("token_order", "tokens", "offsets", "coords", "low", "high", "last")
# Sizes that no other argument has: any is legal.
OWN_SIZES = {
    "causal_conv1d_step": ("state longer in 1", "weight shorter in 1"),
    "near_attention": ("q empty in 2", *(f"listed {w} in {i}" for w in ("shorter", "longer", "empty") for i in (0, 1))),
}
EXTREMES = (-1, -(2**31), 2**31 - 1, 10_000)


class Record(TorchDispatchMode):
    """Keeps every call of a linmu op, with its arguments as they were."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "linmu":
            self.calls.append((func, [a.clone() if isinstance(a, torch.Tensor) else a for a in args]))
        return func(*args, **(kwargs or {}))


def calls(op):
    """The dispatcher calls (forward, and backward where there is one) of the small case."""
    with Record() as record:
        run_small(op, "cpu")
    expected = {op, _registry.OPS[op].backward} - {None}
    assert {func.name().split("::")[1] for func, _ in record.calls} == expected
    return record.calls


def signature(op):
    return str(getattr(torch.ops.linmu, op).default._schema)


def spoil(name, value):
    """(what is wrong, corrupt value, must it be refused) for one argument."""
    if isinstance(value, torch.Tensor):
        yield "rank", value[None], True
        yield "dtype", value.to(torch.int16), True
        yield "dtype", value.double() if value.dtype != torch.float64 else value.float(), True
        for dim in range(value.dim()):
            if value.shape[dim]:
                yield f"shorter in {dim}", value.narrow(dim, 0, value.shape[dim] - 1), True
                yield f"longer in {dim}", torch.cat([value, value.narrow(dim, 0, 1)], dim), True
                yield f"empty in {dim}", value.narrow(dim, 0, 0), True
        if value.dtype == torch.int32:
            for extreme in EXTREMES:
                for where in (0, value.numel() // 2, value.numel() - 1):
                    bad = value.clone()
                    bad.view(-1)[where] = extreme
                    yield f"{extreme} at {where}", bad, name in POSITIONS
                yield f"all {extreme}", torch.full_like(value, extreme), name in POSITIONS
            yield "all 0", torch.zeros_like(value), name in ("token_order", "tokens", "offsets")
            yield "backwards", value.flip(-1), name == "offsets"
    elif isinstance(value, (list, tuple)):
        for bad in ([], [0] * len(value), [-1] * len(value), [2**40] * len(value), [*value, 1]):
            yield f"{bad}", bad, False
    elif isinstance(value, str):
        yield "another word", "nonsense", True
    elif isinstance(value, int) and not isinstance(value, bool):
        for bad in (-1, -(2**63), 2**40, 2**63 - 1):
            yield f"{bad}", bad, False


@pytest.mark.parametrize("op", COMPILED)
def test_ops_refuse_corrupt_arguments(op):
    accepted = []
    for func, arguments in calls(op):
        for i, argument in enumerate(func._schema.arguments):
            for what, bad, must_refuse in spoil(argument.name, arguments[i]):
                values = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
                values[i] = bad
                try:
                    func(*values)
                except REFUSALS:
                    continue
                if must_refuse and f"{argument.name} {what}" not in OWN_SIZES.get(op, ()):
                    accepted.append(f"{func.name()}: {argument.name} {what}")
    assert not accepted


@pytest.mark.parametrize("op", [op for op in COMPILED if "token_order" in signature(op)])
def test_positions_are_checked_alone(op):
    """Where no other option is given."""
    for func, arguments in calls(op):
        for where, argument in enumerate(func._schema.arguments):
            if argument.name == "token_order":
                index = where
        plain = [
            "forward" if a.name == "direction" else value if i == index or "Optional" not in str(a.type) else None
            for i, (a, value) in enumerate(zip(func._schema.arguments, arguments, strict=True))
        ]
        func(*plain)
        for extreme in EXTREMES:
            plain[index] = arguments[index].clone()
            plain[index][-1, -1] = extreme
            with pytest.raises(REFUSALS, match="token_order"):
                func(*plain)


# Empty; one element; around chunks, tiles and vectors.
SIZES = {
    "branch_mix_norm": [dict(L=0), dict(D=1), dict(D=67), dict(L=3, D=1025)],
    "causal_conv1d": [dict(L=0), dict(L=1, D=1, K=2), dict(L=2, D=67), dict(L=300, D=17, K=3)],
    "causal_conv1d_step": [dict(B=0), dict(D=1, K=2), dict(D=67, K=8)],
    "ssd_scan": [dict(L=0), dict(L=1, P=1, N=1), dict(L=65, P=17, N=33), dict(L=129, P=5, N=3), dict(L=300, P=64),
                 dict(L=65, P=17, N=33, normalize=True), dict(L=129, P=16, N=3, normalize=True)],
    "ssd_step": [dict(B=0), dict(P=1, N=1), dict(P=17, N=33), dict(P=128, N=128), dict(P=17, N=33, normalize=True)],
    "exact_step": [
        dict(B=0), dict(H=1, G=1, P=2, N=1, R=2, s=1, window=1, kept=1), dict(H=5, G=1, P=17, N=33, R=16, kept=0),
        dict(H=7, G=1, P=64, N=64, R=64, window=70, kept=33), dict(H=8, G=2, P=33, N=5, R=2, s=20, window=3),
    ],
    "far_attention": [
        dict(B=0), dict(L=1, before=0, P=1, N=1), dict(L=70, P=17, N=33), dict(L=300, before=200, P=64, N=64),
    ],
    "gated_delta_scan": [
        dict(L=0), dict(L=1, K=1, V=1), dict(L=65, K=17, V=33), dict(L=129, K=3, V=5), dict(L=300, V=64),
    ],
    "gated_norm": [dict(L=0), dict(D=2), dict(D=134), dict(L=3, D=2050)],
    "gated_delta_step": [dict(B=0), dict(K=1, V=1), dict(K=17, V=33), dict(K=128, V=128)],
    "near_attention": [dict(B=0), dict(L=1, before=0, P=1), dict(L=70, P=17), dict(L=300, before=200, P=64)],
    "window_attention": [
        dict(B=0), dict(P=2, R=2, grid=(1, 1, 1)), dict(P=18, R=6, grid=(1, 33, 5), window=(1, 16, 16)),
        dict(P=64, R=64, grid=(5, 7, 9), window=(4, 4, 4)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("op", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_small_cases_stay_inside(op, dtype):
    for sizes in ({}, *SIZES[op]):
        values = run_small(op, "cpu", dtype=dtype, **sizes).values()
        assert all(v.isfinite().all() for v in values), sizes


@pytest.mark.parametrize("op, tensors", [("ssd_scan", "x dt B C"), ("gated_delta_scan", "q k v g")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_walks_around_what_is_not_finite_stay_inside(op, tensors, dtype):
    """One chunk of odd sizes has it, beside segments that do not."""
    seen = False
    for name in tensors.split():
        sizes = dict(P=17, N=33) if op == "ssd_scan" else dict(K=17, V=33)
        values = small_inputs(op, "cpu", dtype, L=65, **sizes)
        values[name][:, 9] = torch.nan
        values["seq_idx"] = (torch.arange(65) // 7).int().expand(values["dt" if op == "ssd_scan" else "g"].shape[0], -1)
        leaf = values[tensors.split()[0]].requires_grad_()
        with _registry.use_impl(f"{op}:cpu"):
            out = run_op(op, **values)
        out = out[0] if isinstance(out, tuple) else out
        seen = seen or not out.isfinite().all()
        assert torch.autograd.grad(out.sum(), leaf)[0].shape == leaf.shape
    assert seen


@pytest.mark.parametrize("name", ["_C", "liblinmu_cpu.so"])
def test_planner_refuses_corrupt_tables(name):
    if name not in _native.planners():
        pytest.skip(f"no compiled planner: {_native.planner_errors()[name]}")
    planner = _native.planners()[name]
    random = np.random.default_rng(0)
    blocks, positions = np.array([[0, 2, 3, 4], [1, 1, 3, 3]]), np.r_[np.arange(24) + 2, np.arange(9)]
    extremes = [-(2**63), -(2**31), -1, 0, 1, 3, 30, 2**31, 2**32 + 1, 2**62, 2**63 - 1]
    refused = 0
    for _ in range(3000):
        b, p, rows, length = blocks.copy(), positions.copy(), 2, 30
        for _ in range(random.integers(1, 4)):
            value = random.choice(extremes)
            match random.integers(5):
                case 0 | 1:
                    b[random.integers(2), random.integers(4)] = value
                case 2 | 3:
                    p[random.integers(len(p))] = value
                case _:
                    rows, length = random.choice([0, 1, 2, 3]), random.choice([0, 1, 29, 30, 31])
        try:
            plan = planner.Plan(b, p, rows, length)
        except ValueError:
            refused += 1
            continue
        plan.segments()
        for mode in range(-1, 5):
            try:
                plan.scan_order(mode)
            except ValueError:
                assert mode in (-1, 4)
        window, shift, image, image_shift = ([int(v) for v in random.choice(extremes, 3)] for _ in range(4))
        try:
            plan.window_table(window, shift, image, image_shift, bool(random.integers(2)))
        except ValueError:
            refused += 1
    assert refused > 1000


@pytest.mark.skipif("ASAN_OPTIONS" not in os.environ, reason="runs under `make asan`")
def test_the_libraries_are_sanitized():
    for pattern in ("liblinmu_cpu.so", "_C.*.so"):
        (library,) = _native.HERE.glob(pattern)
        assert b"__asan_init" in library.read_bytes() and b"__ubsan_handle" in library.read_bytes()
    assert COMPILED


@pytest.mark.skipif("ASAN_OPTIONS" not in os.environ, reason="runs under `make asan`")
def test_a_write_outside_is_seen():
    code = (
        f"import ctypes, torch; library = ctypes.CDLL({str(_native.HERE / 'liblinmu_cpu.so')!r});"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p;"
        "library.linmu_register(b'wrong', ctypes.c_void_p(libc.malloc(8)), 4096)"  # its message has more than 8 bytes
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
