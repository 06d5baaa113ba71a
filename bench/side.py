"""One of the two processes of `python -m bench --base`: `side.py ROOT HERE THREADS`.

It imports `linmu_ops` from ROOT, and `bench` from HERE. A line of JSON on stdin is a question, one on stdout an answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

CALM = 5e-3  # seconds; the other process's threads still spin for a while after its sample


def main(root: str, here: str, threads: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path[0] = root  # instead of this file's folder
    import torch

    import linmu_ops

    assert Path(linmu_ops.__file__).parents[1] == Path(root)
    sys.path[0] = here
    from bench import timing

    torch.set_num_threads(int(threads))
    timing.keep_memory()
    sample = None
    for line in sys.stdin:
        question = json.loads(line)
        if "sample" in question:
            assert sample is not None
            time.sleep(CALM)
            answer: dict[str, Any] = dict(seconds=sample())
        else:
            try:
                sample, answer = _prepare(**question)
            except Exception as error:
                # An op of another commit may fail in any way, or not be there; the row says how.
                answer = dict(error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        print(json.dumps(answer), file=answers, flush=True)


def _prepare(op: str, case: str, dtype: str, backward: bool, device: str) -> tuple[Any, dict[str, Any]]:
    """What takes one sample, in seconds per call; and a norm of each result, with seconds per call."""
    import importlib

    import torch

    from bench import measure, timing

    bench = importlib.import_module(f"bench.ops.{op}").BENCH
    torch.manual_seed(0)
    inputs = bench.make(bench.cases[case], getattr(torch, dtype), device)
    (build,) = list(measure.implementations(bench, bench.cases[case], device, ["ours"]).values())[:1]
    variant = measure.Variant(bench, build(), inputs, backward)
    norms = [float(t.double().norm()) for t in variant.results().values()]

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    calls, each = timing.warm_up(variant, device, 0.1)
    calls = max(calls, round(timing.SHORTEST / each), 1)

    def sample() -> float:
        variant()  # brings its own data back into the cache after the other process
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            variant()
        wait()
        return (time.perf_counter() - start) / calls

    return sample, dict(norms=norms, seconds=calls * each)


if __name__ == "__main__":
    main(*sys.argv[1:])
