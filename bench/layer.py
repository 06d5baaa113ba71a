"""`bench/gpu_check.sh layer`: a whole decoder layer of 7B shape on this GPU, in less than four minutes.

Two layers of the sizes of Qwen2.5-VL-7B with random weights, in bfloat16: the default block and its MLP, beside
transformers with SDPA, plain and compiled. Correctness comes first: a small student, prompt and steps, against itself
in float64 by the references. Then come the layer and its attention alone, the first token, the decode of a batch; last
what has to be compiled. First token and decode are of two layers and the output layer: no time of a whole model. Steps,
rows and the table at the end are as in `quick`.

With --emulate it runs on a machine without a GPU: a small shape, CUDA's kernels by the emulator of `tests/cuda`, and
nothing compiled.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import linmu_ops
from linmu_models import LinmuInputs
from linmu_models.cache import cache_argument
from linmu_ops import _registry

from . import check, timing
from .check import Row, Session
from .models.inputs import decoder_inputs
from .models.measure import Task, measure
from .models.shapes import SHAPES, Shape, build, video_layout
from .models.variants import PLAIN, STUDENT, Prefill, Variant, variants

LAYERS = 2
BATCH = 16  # rows of a decode
STEPS = 4  # tokens after the prompt, where a student is judged
SHAPE = SHAPES["qwen-7b"].with_layers(LAYERS)
# Heads as large as SHAPE's: the same kernels serve.
SMALL = dataclasses.replace(
    SHAPE,
    text=SHAPE.text
    | dict(hidden_size=256, num_attention_heads=2, num_key_value_heads=1, intermediate_size=512, vocab_size=512),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured, of which shape, for how long each; and of which a student is judged, on a prompt how long."""

    shape: Shape
    lengths: tuple[int, ...]
    seconds: float
    small: Shape
    judged: int


GPU = Sizes(SHAPE, (32768, 65536), 2.0, SMALL, 4096)
EMULATED = Sizes(SMALL, (320,), 0.0, SMALL, 320)
# Wanted on an H100 or H200 at 32k tokens: milliseconds of a layer's attention (projections, no MLP), and of the layer.
WANT_PARTS = {"attention": 8.0, "layer": 23.0}
WANT_FIRST = {65536: 2.5}  # times as fast as a teacher with FlashAttention 2


@contextlib.contextmanager
def as_on_a_gpu(session: Session) -> Iterator[None]:
    """In the emulator too, an op without a CUDA kernel is not served by that of the CPU."""
    if not session.emulated:
        yield
        return
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    without = [op for op in _registry.OPS if not has(f"linmu_emulated::{op}", "CPU")]
    with linmu_ops.use_impl(*(f"{op}:reference" for op in without)):
        yield


@torch.no_grad()
def _hidden(student: Any, tokens: int) -> Tensor:
    """The decoder's output after a prompt and STEPS single tokens, (1, tokens + STEPS, D)."""
    decoder, device = student.get_decoder(), student.device
    cache = DynamicCache(config=student.config.get_text_config(decoder=True))
    layout = video_layout(tokens, 1)
    for block in student.linmu_layers():
        block.self_attn.prepare_layout(layout, device)
    size = decoder.config.hidden_size
    given = torch.randn(1, tokens + STEPS, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    given = given.to(device, student.dtype)
    positions = torch.arange(tokens + STEPS, device=device)[None]
    found = []
    for part in (slice(0, tokens), *(slice(i, i + 1) for i in range(tokens, tokens + STEPS))):
        out = decoder(
            inputs_embeds=given[:, part], position_ids=positions[:, part], use_cache=True,
            linmu=LinmuInputs(layout) if part.start == 0 else LinmuInputs(), **{cache_argument(decoder): cache},
        )  # fmt: skip
        found.append(out.last_hidden_state)
    return torch.cat(found, dim=1).cpu().double()


def correct(session: Session, sizes: Sizes) -> Iterator[Row]:
    """Within twice the error of the same student by plain PyTorch, all tokens together and the steps alone."""
    torch.manual_seed(0)
    student = build(sizes.small, torch.bfloat16, session.device, tower=False)[1]
    with linmu_ops.use_impl("*:reference"):
        exact = _hidden(copy.deepcopy(student).to("cpu", torch.float64), sizes.judged)
        plain = _hidden(student, sizes.judged)
    with as_on_a_gpu(session):
        got = _hidden(student, sizes.judged)
    for name, rows in (("prompt", slice(0, -STEPS)), ("steps", slice(-STEPS, None))):
        want = exact[:, rows]
        mine, others = ((x[:, rows] - want).norm() / want.norm() for x in (got, plain))
        if not mine <= 2 * others:
            raise AssertionError(f"{name}: {mine:.1e} from float64, plain PyTorch {others:.1e}")
        yield dict(result=f"right: {name} {mine:.1e} from float64, plain PyTorch {others:.1e}")


class _Seen:
    """What the first layer and its attention are called with."""

    def __init__(self, variant: Variant, tokens: int) -> None:
        self.given: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
        layer = variant.model.get_decoder().layers[0]
        layout, inputs = decoder_inputs(variant.model, tokens, 1)
        rest = Prefill(variant).prepare(layout)
        handles = [
            m.register_forward_pre_hook(self._keep(name), with_kwargs=True)
            for name, m in (("attention", layer.self_attn), ("layer", layer))
        ]
        try:
            variant.model.get_decoder()(
                inputs_embeds=inputs["embeddings"], position_ids=inputs["positions"], use_cache=False, **rest
            )
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.given[name] = module, args, kwargs

        return keep

    def again(self, name: str) -> None:
        module, args, kwargs = self.given[name]
        module(*args, **kwargs)

    def products(self, name: str, tokens: int) -> int:
        """Floating-point operations of its linear maps."""
        module = self.given[name][0]
        return 2 * tokens * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


@torch.no_grad()
def parts(session: Session, models: tuple[Any, Any], tokens: int, seconds: float) -> Iterator[Row]:
    """A layer, and its attention with all projections, of student and teacher in turn."""
    file = session.out / "roofs.json"
    roofs = json.loads(file.read_text()) if file.exists() else {}
    both = zip((PLAIN, STUDENT), models, strict=True)
    seen = {name: _Seen(Variant(name, model), tokens) for name, model in both}
    for part, want in WANT_PARTS.items():
        calls: dict[str, timing.Function] = {name: functools.partial(s.again, part) for name, s in seen.items()}
        rounds = (1, 1) if session.emulated else (5, 20)
        warmup = 0.0 if session.emulated else 0.1
        times = timing.interleave(calls, session.device, seconds=seconds, warmup=warmup, rounds=rounds)
        ms, peer_ms = times[STUDENT].median * 1e3, times[PLAIN].median * 1e3
        roof = None
        if "gemm_tflops" in roofs:
            roof = 100 * seen[STUDENT].products(part, tokens) / roofs["gemm_tflops"] * 1e-9 / ms
        yield dict(
            what=f"{part}, {tokens} tokens", ms=ms, roof_percent=roof, peer=PLAIN, peer_ms=peer_ms,
            want_ms=None if session.emulated or tokens != GPU.lengths[0] else want, result=_ratio(session, ms, peer_ms),
        )  # fmt: skip


def _ratio(session: Session, ms: float, peer_ms: float) -> str:
    return "no GPU" if session.emulated else f"{peer_ms / ms:.2f} x as fast"


def timed(
    session: Session, task: Task, shape: Shape, found: list[Variant], prefills: dict[str, Prefill], seconds: float
) -> Iterator[Row]:
    """A student beside the fastest of the teachers that were found; a row too for each that has no time."""
    with as_on_a_gpu(session):
        rows = measure(task, shape, found, prefills, seconds=seconds)
    yield from (dict(what=f"{task}: {row['variant']}", result=row["status"]) for row in rows if row["status"] != "ok")
    best = min((r for r in rows if not r["student"] and "seconds" in r), key=lambda r: r["seconds"], default=None)
    for row in rows:
        if not row["student"] or "seconds" not in row:
            continue
        ms, peer_ms = row["seconds"] * 1e3, None if best is None else best["seconds"] * 1e3
        times = WANT_FIRST.get(task.tokens) if task.kind == "prefill" and peer_ms is not None else None
        yield dict(
            ms=ms, peer=None if best is None else best["variant"], peer_ms=peer_ms,
            want_ms=peer_ms / times if peer_ms is not None and times is not None else None,
            result="" if peer_ms is None else _ratio(session, ms, peer_ms), rows=rows,
        )  # fmt: skip


def run_all(session: Session, sizes: Sizes) -> None:
    step = session.step
    step("machine", 5, lambda: check.machine(session))
    step("a small student: correct", 20, lambda: correct(session, sizes))
    models: list[tuple[Any, Any]] = []

    def make() -> Iterator[Row]:
        torch.manual_seed(0)
        models.append(build(sizes.shape, torch.bfloat16, session.device, tower=False))
        yield dict(result=f"{LAYERS} layers of random weights")

    step("weights", 10, make)
    if not models:
        return
    with as_on_a_gpu(session):
        step("one layer", 10, lambda: parts(session, models[0], sizes.lengths[0], sizes.seconds))
    tasks = {f"first token, {n} tokens": Task("prefill", "decoder", n, 1) for n in sizes.lengths}
    tasks[f"decode, batch {BATCH}, {sizes.lengths[0]} tokens"] = Task("decode", "decoder", sizes.lengths[0], BATCH)
    # Of the compiled teachers the one with FlashAttention, which a target names; without a GPU, the only one.
    all_of = [v for v in variants(*models[0], session.device) if "cuDNN" not in v.name and not v.free]
    prefills: dict[str, Prefill] = {}
    for compiled, least in ((False, 10), (True, 30)):
        found = [v for v in all_of if v.compiled is compiled]
        for name, task in tasks.items():
            label = f"{LAYERS} layers, {name}" + ", compiled" * compiled
            step(label, least, functools.partial(timed, session, task, sizes.shape, found, prefills, sizes.seconds))


def run(session: Session) -> None:
    with contextlib.ExitStack() as stack:
        if session.emulated:
            stack.enter_context(mock.patch.object(torch, "compile", lambda f, **_: f))
        run_all(session, EMULATED if session.emulated else GPU)


def main(argv: list[str] | None = None) -> int:
    return check.main("layer", __doc__.splitlines()[0], 220.0, run, argv)


if __name__ == "__main__":
    sys.exit(main())
