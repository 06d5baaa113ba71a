"""Each op exports, strictly and not; a graph of a dynamic batch or length is right at other sizes."""

from __future__ import annotations

import inspect

import pytest
import torch

from linmu_ops import TokenLayout
from linmu_ops._testing import CASES, run_op, small_inputs

OPS = sorted(CASES)
SIZES = {"window_attention": dict(P=4, R=4, grid=(1, 3, 4), window=(1, 2, 3))}
# What is dynamic, and its sizes in the example and elsewhere.
OTHERS = {"static": {}, "batch": dict(B=(3, 5)), "length": dict(L=(11, 26)), "both": dict(B=(3, 5), L=(11, 26))}


class Call(torch.nn.Module):
    """A call of one op, of its tensors alone; window_attention counts its frames of 12 tokens."""

    def __init__(self, op, inputs):
        super().__init__()
        self.op, self.names = op, [n for n, v in inputs.items() if torch.is_tensor(v)]
        self.rest = {n: v for n, v in inputs.items() if not torch.is_tensor(v)}

    def forward(self, *tensors):
        inputs = dict(zip(self.names, tensors, strict=True))
        counted = {"grid": (inputs["q"].shape[1] // 12, 3, 4)} if "grid" in self.rest else {}
        return run_op(self.op, **{**self.rest, **inputs, **counted})


def inputs_of(op, sizes):
    if op == "window_attention" and "L" in sizes:
        sizes = {k: v for k, v in sizes.items() if k != "L"} | dict(grid=(sizes["L"] // 4, 3, 4))
    return small_inputs(op, **{**SIZES.get(op, {}), **sizes})


def tensors(inputs):
    return [v for v in inputs.values() if torch.is_tensor(v)]


def cases():
    for op in OPS:
        for dynamic, sizes in OTHERS.items():
            if "L" in sizes and not {"L", "grid"} & set(inspect.signature(CASES[op]).parameters):
                continue
            for strict in (False, True):
                quick = dynamic == "static" or (dynamic == "both" and not strict)
                marks = () if quick else pytest.mark.sweep
                yield pytest.param(op, dynamic, strict, marks=marks)


@pytest.mark.parametrize(("op", "dynamic", "strict"), list(cases()))
def test_an_exported_op_is_the_op(op, dynamic, strict):
    example, other = (inputs_of(op, {k: v[i] for k, v in OTHERS[dynamic].items()}) for i in (0, 1))
    call, shapes = Call(op, example), []
    length = 12 * torch.export.Dim("frames", min=2) if op == "window_attention" else torch.export.Dim.DYNAMIC
    for a, b in zip(tensors(example), tensors(other), strict=True):
        differ = [i for i in range(a.dim()) if a.shape[i] != b.shape[i]]
        shapes.append({i: length if i == 1 else torch.export.Dim.DYNAMIC for i in differ})
    assert any(shapes) == (dynamic != "static")
    given = tuple(t.clone() for t in tensors(example))
    program = torch.export.export(call, given, dynamic_shapes=(tuple(shapes),), strict=strict)
    for inputs in (example, other):
        mine, theirs = ([t.clone() for t in tensors(inputs)] for _ in range(2))
        torch.testing.assert_close(program.module()(*mine), call(*theirs), equal_nan=True)
        torch.testing.assert_close(mine, theirs)  # of a step, the state that it writes


class Windows(torch.nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def forward(self, q, k, v):
        from linmu_ops import window_attention

        return window_attention(q, k, v, layout=self.layout, window=(1, 2, 2), shift=(0, 1, 1))


@pytest.mark.parametrize("strict", [False, True])
def test_a_layout_is_exported_as_it_is(strict):
    layout = TokenLayout([(0, 1, 3, 4), (1, 2, 2, 2)], [*range(2, 14), *range(5, 13)], 2, 16)
    q, k, v = torch.randn(3, 2, 16, 4, 8)
    module = Windows(layout)
    if strict:
        with pytest.raises(RuntimeError, match="TokenLayout: inside a compiled graph, call only methods that were"):
            torch.export.export(module, (q, k, v), strict=True)
        module(q, k, v)
    program = torch.export.export(module, (q, k, v), strict=strict)
    torch.testing.assert_close(program.module()(q + 1, k, v), module(q + 1, k, v))
    assert type(module(q, k, v)) is torch.Tensor
