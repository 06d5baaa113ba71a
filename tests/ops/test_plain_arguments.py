"""Arguments that are no tensors: what is not of their kind is refused in one line that names them."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import linmu_ops
from linmu_ops import MMATE, ExactMMATE, _registry
from linmu_ops._testing import CASES, grouped, small_inputs

OPS = sorted(CASES)
WRONG = ("a", [1.5], math.nan, None, -1, 2.5, True, torch.ones(1), object())


def fits(value, kind):
    """Whether an argument that is annotated so may be this."""
    return (
        (isinstance(value, torch.Tensor) and "Tensor" in kind)
        or (value is None and "None" in kind)
        or (isinstance(value, bool) and "bool" in kind)
        or (type(value) in (float, int) and math.isfinite(value) and "float" in kind)
    )


@pytest.mark.parametrize("op", OPS)
def test_any_other_kind_is_refused(op):
    inputs, f = grouped(small_inputs(op), op), getattr(linmu_ops, op)
    for name, parameter in inspect.signature(f).parameters.items():
        for value in WRONG:
            if fits(value, str(parameter.annotation)) and (name, value) != ("eps", -1):
                continue
            with pytest.raises((TypeError, ValueError), match=f"^{op}: .*must be") as caught:
                f(**inputs | {name: value})
            assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 200


@pytest.mark.parametrize("op", ["near_attention", "window_attention", "gated_delta_scan", "gated_delta_step"])
def test_a_scale(op):
    f, inputs = getattr(linmu_ops, op), grouped(small_inputs(op), op)
    with pytest.raises(TypeError, match=f"^{op}: scale must be a number, got 'a'$"):
        f(**inputs | dict(scale="a"))
    with pytest.raises(ValueError, match=f"^{op}: scale must be finite, got inf$"):
        f(**inputs | dict(scale=math.inf))


@pytest.mark.parametrize("op", OPS)
def test_what_explain_is_asked(op):
    first = next(iter(inspect.signature(getattr(linmu_ops, op)).parameters))
    for given, named, words in (
        ((3,), {}, "must be a Tensor, got 3"),
        ((None,), {}, "must be a Tensor, got None"),
        ((torch.ones(2), "x"), {}, "must be a Tensor, got 'x'"),
        ((torch.ones(2),) * 99, {}, f"tensors must be at most the .* of {op}, got 99"),
        ((), {first: 3}, f"{first} must be a Tensor, got 3"),
        ((), {"foo": torch.ones(2)}, f"foo must be an argument of {op}"),
        ((), {"device": "foo"}, "device must be a device, .* got 'foo'"),
        ((), {"device": []}, r"device must be a device, .* got \[\]"),
        ((), {"reverse": 3}, f"reverse must be that of {op}, got 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^explain: .*{words}$"):
            linmu_ops.explain(op, *given, **named)
    assert linmu_ops.explain(op, **small_inputs(op)) and linmu_ops.explain(op, device=torch.device("cpu"))


def test_what_is_no_op_is_not_explained(monkeypatch):
    for value in (3, None, [], "scan", torch.ones(1)):
        with pytest.raises(ValueError, match=r"^explain: op must be one of .*, got "):
            linmu_ops.explain(value)
    monkeypatch.setattr(_registry, "why_not", lambda *_: None)
    with pytest.raises(ValueError, match=r"^explain: tensors must be of the shapes that ssd_scan takes$"):
        linmu_ops.explain("ssd_scan", torch.ones(2), B=torch.ones(2), device="cuda")


def test_the_three_shapes_of_a_mix():
    a = torch.ones(2, 3, 4)
    for shape in ((3,), (), (2, 4), (4, 1), (2, 3, 1)):
        words = r"mix must be \(1,\), \(D,\) or \(B, L\) with B=2, L=3, D=4, got shape \("
        with pytest.raises(ValueError, match=f"^branch_mix_norm: {words}"):
            linmu_ops.branch_mix_norm(a, a, torch.ones(shape))


def test_who_forced_an_implementation_is_named():
    for item, words in (
        ("ssd_scan:foo", "implementation must be one of cpu, cuda, triton, reference, got 'foo'"),
        ("foo:cpu", "op must be .* or one of .*, got 'foo'"),
    ):
        with pytest.raises(ValueError, match=f"^use_impl: {words}$"), linmu_ops.use_impl(item):
            pass
    with pytest.raises(TypeError, match=r"^use_impl: an item must be a text"), linmu_ops.use_impl(5):
        pass


@pytest.mark.parametrize("block", [MMATE, ExactMMATE])
def test_a_block_is_named_where_arguments_do_not_fit(block):
    with pytest.raises(TypeError, match=rf"^{block.__name__}\.__init__\(\) got an unexpected keyword argument 'foo'$"):
        block(48, 3, foo=1)
    with pytest.raises(TypeError, match=rf"^{block.__name__}\.__init__\(\) missing 2 required positional arguments"):
        block()
    for name in ("dim", "num_heads", "num_kv_heads", "head_dim", "layer_idx", "scale", "config", "qk_norm", "out_bias"):
        for value in ("a", [1], 1.5, torch.ones(1), object()):
            if (name, value) == ("scale", 1.5):
                continue
            with pytest.raises((TypeError, ValueError), match=f"^{block.__name__}: {name} must be .*, got") as caught:
                block(**dict(dim=48, num_heads=3) | {name: value})
            assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("block", [MMATE, ExactMMATE])
def test_hidden_states_of_another_dtype_or_device(block):
    """Than the weights: in prefill, with a grid, and in a step."""
    made = block(48, 3)
    state, words = made.init_state(1), r"hidden_states must be float32, as the weights are, or under autocast, got"
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for length, call in ((5, {}), (6, dict(grid=(1, 2, 3))), (1, dict(state=state))):
            with pytest.raises(TypeError, match=f"^{block.__name__}: {words} {str(dtype)[6:]}$"):
                made(torch.randn(1, length, 48).to(dtype), **call)
    with pytest.raises(TypeError, match=r"must be bfloat16, as the weights are, .* got float32$"):
        block(48, 3).bfloat16()(torch.randn(1, 5, 48))
    with pytest.raises(ValueError, match=f"^{block.__name__}: hidden_states must be on cpu, .* got meta$"):
        made(torch.randn(1, 5, 48, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        made(torch.randn(1, 5, 48)), made(torch.randn(1, 5, 48).bfloat16())
