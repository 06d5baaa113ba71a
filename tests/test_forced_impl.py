"""`use_impl` holds where it was asked for: in one thread, task or generator, and no longer than its block."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
import torch

import linmu_ops
from linmu_ops import _registry
from linmu_ops._testing import run_op, small_inputs


def chosen(op="ssd_step"):
    return next(r.impl for r in linmu_ops.explain(op) if r.chosen)


@pytest.fixture(autouse=True)
def usual():
    before = chosen()
    yield before
    assert chosen() == before and not _registry._uses.get()


def test_another_thread_is_not_forced(usual):
    found = []
    with linmu_ops.use_impl("*:reference"):
        thread = threading.Thread(target=lambda: found.append(chosen()))
        thread.start()
        thread.join()
        assert chosen() == "reference"
    assert found == [usual]


def test_overlapping_threads(usual):
    """One begins within the other's block and ends after it."""
    steps = [threading.Event() for _ in range(3)]
    found = {}

    def first():
        with linmu_ops.use_impl("ssd_step:reference"):
            steps[0].set()
            steps[1].wait(10)
            found["first"] = chosen()
        found["first, after"] = chosen()
        steps[2].set()

    def second():
        steps[0].wait(10)
        with linmu_ops.use_impl("ssd_step:triton"):
            steps[1].set()
            steps[2].wait(10)
            found["second"] = chosen()
        found["second, after"] = chosen()

    threads = [threading.Thread(target=f) for f in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {"first": "reference", "first, after": usual, "second": "triton", "second, after": usual}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_generators_that_end_in_any_order(usual, order):
    def hold(impl):
        with linmu_ops.use_impl(f"ssd_step:{impl}"):
            yield

    generators = [hold("reference"), hold("triton")]
    for g in generators:
        next(g)
    assert chosen() == "triton"
    generators[order[0]].close()
    assert chosen() == ("triton" if order[0] == 0 else "reference")
    generators[order[1]].close()
    assert chosen() == usual


def test_generator_closed_in_another_context(usual):
    def hold():
        with linmu_ops.use_impl("ssd_step:reference"):
            yield

    generator = hold()
    next(generator)
    assert chosen() == "reference"
    contextvars.Context().run(generator.close)
    assert chosen() == usual
    _registry._uses.set(())  # what is over stays listed where it began, without effect


def test_overlapping_tasks(usual):
    async def hold(impl, enter, leave):
        await asyncio.sleep(enter)
        with linmu_ops.use_impl(f"ssd_step:{impl}"):
            await asyncio.sleep(leave)
            return chosen()

    async def both():
        return await asyncio.gather(hold("reference", 0, 0.02), hold("triton", 0.01, 0.03)), chosen()

    assert asyncio.run(both()) == (["reference", "triton"], usual)


def test_a_task_keeps_what_held_where_it_was_made(usual):
    async def later():
        await asyncio.sleep(0)
        return chosen()

    async def run():
        with linmu_ops.use_impl("ssd_step:reference"):
            task = asyncio.create_task(later())
        return await task, chosen()

    assert asyncio.run(run()) == ("reference", usual)


def test_a_compiled_call_follows(usual):
    """Recompiles where another implementation is forced, in this thread alone."""
    inputs = small_inputs("causal_conv1d")
    graphs = []

    def backend(graph, example):
        graphs.append(str(graph.graph))
        return graph

    run = torch.compile(lambda: linmu_ops.causal_conv1d(**inputs), backend=backend, fullgraph=True)
    run()
    with linmu_ops.use_impl("causal_conv1d:reference"):
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert ["linmu_reference" in g for g in graphs] == [False, True]
    torch._dynamo.reset()


def test_device_errors_are_not_told_as_values(monkeypatch):
    """Whatever its words, an error that is not about an argument keeps its type."""
    words = "causal_conv1d: CUDA: an illegal memory access was encountered"

    def fail(*args):
        raise RuntimeError(words)

    with torch.library._scoped_library("linmu_reference", "IMPL") as lib:
        lib.impl("causal_conv1d", fail, "CPU")
        with linmu_ops.use_impl("causal_conv1d:reference"), pytest.raises(RuntimeError, match=words):
            linmu_ops.causal_conv1d(**small_inputs("causal_conv1d"))


@pytest.mark.parametrize("impl", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("op", ["causal_conv1d", "ssd_scan"])
def test_values_of_an_argument_are(op, impl):
    inputs = small_inputs(op)
    inputs["token_order"].zero_()
    words = f"^{op}: token_order must hold every position 0..L-1 once per row$"
    with linmu_ops.use_impl(f"{op}:{impl}"), pytest.raises(ValueError, match=words):
        run_op(op, **inputs)
