"""`python -m bench.models.breakdown`: where a model's time goes, part by part, against the floor of each."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from bench import roofs, timing
from bench.ops import exact_step, far_attention, ssd_scan, ssd_step
from bench.peers import case
from bench.provenance import where
from linmu_ops import TokenLayout
from linmu_ops._tables import plain
from linmu_ops.nn.config import PRESETS

from .inputs import decoder_inputs
from .run import tokens
from .shapes import SHAPES, Shape, build
from .variants import PLAIN, STUDENT, Decode, Prefill, Variant

RANGE = "bench: "
PARTS = ("projections", "MLP", "norms", "output layer")  # modules; each range is one of them
OPS = {
    "linmu::ssd_scan": "scan", "linmu::ssd_step": "scan", "linmu::exact_step": "exact step",
    "linmu::far_attention": "far attention",
    "linmu::window_attention": "window attention",
    "linmu::branch_mix_norm": "mix and norm", "aten::scaled_dot_product_attention": "attention",
}  # fmt: skip
REST = "rest"  # rotary embedding, step sizes, sums of residuals, copies


@dataclass
class Cost:
    """The least that the calls of a part need."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class Watch:
    """Ranges for the profiler around the parts of a model, and what their calls cost at least."""

    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))

    def _linear(self, part: str, module: nn.Linear, x: torch.Tensor) -> None:
        rows, size = x.numel() // module.in_features, x.element_size()
        moved = x.numel() + rows * module.out_features + module.weight.numel()
        self.costs[part].flops += 2 * rows * module.in_features * module.out_features
        self.costs[part].bytes += size * moved

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        opened: list[record_function] = []

        def watch(module: nn.Module, part: str) -> None:
            def before(module: nn.Module, args: tuple[Any, ...]) -> None:
                opened.append(record_function(RANGE + part))
                opened[-1].__enter__()
                if part == "norms":
                    self.costs[part].bytes += 2 * args[0].numel() * args[0].element_size()
                elif isinstance(module, nn.Linear):
                    self._linear(part, module, args[0])

            def after(*_: Any) -> None:
                opened.pop().__exit__(None, None, None)

            handles.extend((module.register_forward_pre_hook(before), module.register_forward_hook(after)))

        watch(model.lm_head, "output layer")
        for layer in model.get_decoder().layers:
            watch(layer.mlp, "MLP")
            for linear in (m for m in layer.mlp.modules() if isinstance(m, nn.Linear)):
                handles.append(linear.register_forward_pre_hook(lambda m, args: self._linear("MLP", m, args[0])))
            for name, module in layer.named_children():
                if "norm" in name:
                    watch(module, "norms")
            for linear in (m for m in layer.self_attn.modules() if isinstance(m, nn.Linear)):
                watch(linear, "projections")
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _op_costs(
    shape: Shape, model: Any, layout: TokenLayout | None, length: int, batch: int, itemsize: int, behind: int
) -> dict[str, Cost]:
    """Of the ops, over all layers. `layout` and `length`: of this call's tokens; `behind`: tokens in the cache."""
    t = shape.text
    heads, groups, layers = t["num_attention_heads"], t["num_key_value_heads"], t["num_hidden_layers"]
    size = t["hidden_size"] // heads
    sizes = dict(B=batch, L=length, H=heads, Gx=groups, Gb=groups, Gc=heads, P=size, N=size)
    pairs = batch * (length * (length + 1) / 2 + length * behind)
    kv = 2 * batch * (length + behind) * groups * size
    costs = {"attention": Cost(4 * heads * size * pairs, itemsize * (kv + 2 * batch * length * heads * size))}
    if layout is None:
        step = case(**sizes)
        costs["scan"] = Cost(ssd_step.flops(step, False), ssd_step.num_bytes(step, itemsize, False))
        for layer in getattr(model, "linmu_layers", lambda: [])()[:1]:
            if (places := getattr(layer.self_attn.windows, "sizes", None)) is not None:
                features = layer.self_attn.scan.state_size[1]
                near = case(
                    B=batch, H=heads, G=groups, P=size, N=features, window=places.window, sinks=places.sinks,
                    kept=places.kept,
                )  # fmt: skip
                costs["exact step"] = Cost(exact_step.flops(near, False), exact_step.num_bytes(near, itemsize, False))
        return {n: Cost(layers * c.flops, layers * c.bytes) for n, c in costs.items()}
    scan = case(direction="both", **sizes)
    costs["scan"] = Cost(ssd_scan.flops(scan, False), ssd_scan.num_bytes(scan, itemsize, False))
    for layer in getattr(model, "linmu_layers", lambda: [])()[:1]:
        if (places := getattr(layer.self_attn.windows, "sizes", None)) is not None:
            near = min(length, places.window + places.sinks + places.kept)
            far = case(B=batch, L=length, H=heads, G=groups, P=size, N=layer.self_attn.scan.state_size[1], near=near)
            costs["far attention"] = Cost(
                far_attention.flops(far, False), far_attention.num_bytes(far, itemsize, False)
            )
    costs["mix and norm"] = Cost(bytes=3 * batch * length * t["hidden_size"] * itemsize)
    total = {n: Cost(layers * c.flops, layers * c.bytes) for n, c in costs.items()}
    window = Cost(bytes=layers * itemsize * len(layout.positions) * size * (2 * heads + 2 * groups))
    for layer in getattr(model, "linmu_layers", lambda: [])():
        counts = layout.window_table(*layer.self_attn.layer_windows).offsets.diff().double()
        window.flops += 4 * heads * size * counts.square().sum().item()
    return total | {"window attention": window}


def _time(event: Any, device: str, own: bool = False) -> float:
    """Microseconds; without what it calls, for `own`."""
    name = f"{'device' if device == 'cuda' else 'cpu'}_time_total"
    return float(getattr(event, f"self_{name}" if own else name))


def _part_of(event: Any) -> str | None:
    if event.name.startswith(RANGE):
        return event.name.removeprefix(RANGE)
    return OPS.get(event.name)


def _sum_up(events: Any, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds by part, and of what is in no part by operator."""
    parts: dict[str, float] = defaultdict(float)
    rest: dict[str, float] = defaultdict(float)
    for event in events:
        above, inside = event.cpu_parent, False
        while above is not None and not inside:
            inside, above = _part_of(above) is not None, above.cpu_parent
        if inside or event.device_type.name != "CPU":  # a range appears on the device too
            continue
        if (part := _part_of(event)) is not None:
            parts[part] += _time(event, device)
        elif event.name.startswith(("aten::", "linmu::")) and _time(event, device, own=True) > 0:
            parts[REST] += _time(event, device, own=True)
            rest[event.name] += _time(event, device, own=True)
    return parts, rest


def breakdown(
    shape: Shape, dtype: torch.dtype, device: str, kind: str, length: int, batch: int, models: tuple[Any, Any]
) -> list[dict[str, Any]]:
    """One row per part of the teacher and of the student, both as users run them; the last row of each is the rest."""
    rows = []
    copy, copied = roofs.copy(1 << 28, device)
    gemm, gemm_flops = roofs.gemm(dtype, device)
    roof = timing.interleave({"copy": copy, "gemm": gemm}, device, seconds=0.5, rounds=(3, 20))
    for variant in (Variant(PLAIN, models[0]), Variant(STUDENT, models[1])):
        layout, steps = None, 1
        if kind == "prefill":
            layout, inputs = decoder_inputs(variant.model, length, batch)
            prefill = Prefill(variant)
            call: Callable[..., torch.Tensor] = prefill.decoder
            given = inputs | prefill.prepare(layout)
        else:
            steps = 4
            call, given = Decode(variant, length, batch, steps), {}
        watch = Watch()
        call(**given)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        with watch(variant.model), profile(activities=activities) as seen:
            call(**given)
            if device == "cuda":
                torch.cuda.synchronize()
        parts, rest = _sum_up(seen.events(), device)
        now, behind = (length, 0) if kind == "prefill" else (1, length)
        costs = watch.costs | _op_costs(shape, variant.model, layout, now, batch, dtype.itemsize, behind)
        for part in ("projections", *dict.fromkeys(OPS.values()), "MLP", "norms", "output layer", REST):
            if part not in parts:
                continue
            # The watch counts every step of a decode, the ops' costs are of one.
            cost, times = costs.get(part, Cost()), 1 if part in PARTS else steps
            floor = times * max(
                cost.flops * roof["gemm"].median / gemm_flops, cost.bytes * roof["copy"].median / copied
            )
            row: dict[str, Any] = dict(
                kind=kind, tokens=length, batch=batch, variant=variant.name, part=part, us=parts[part] / steps,
                percent=100 * parts[part] / sum(parts.values()), floor_us=1e6 * floor / steps,
            )  # fmt: skip
            if part == REST:
                row["operators"] = {n: us / steps for n, us in sorted(rest.items(), key=lambda item: -item[1])[:8]}
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Plain text."""
    lines = [f"{rows[0]['kind']}, {rows[0]['tokens']:,} tokens, batch {rows[0]['batch']}, all layers together"]
    cells = []
    for r in rows:
        over = f"{r['us'] / r['floor_us']:.2f}" if r["floor_us"] else ""
        cells.append(
            [r["variant"], r["part"], f"{r['us'] / 1e3:.3f}", f"{r['percent']:.1f}", f"{r['floor_us'] / 1e3:.3f}", over]
        )
        cells += [["", f"  {name}", f"{us / 1e3:.3f}", "", "", ""] for name, us in r.get("operators", {}).items()]
    lines += plain(["", "part", "ms", "%", "floor ms", "x floor"], cells, left=2)
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models.breakdown", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default 4)")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="exact", help="preset of the student's blocks")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--prefill", nargs="*", type=tokens, default=[4096], metavar="TOKENS")
    parser.add_argument("--decode", nargs="*", type=tokens, default=[4096], metavar="TOKENS")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice if left out")
    parser.add_argument("--json", type=Path, help="append rows (JSON lines) to this file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    timing.keep_memory()
    shape, dtype = SHAPES[args.shape].with_layers(args.layers), getattr(torch, args.dtype)
    choice = dict(shape=args.shape, layers=args.layers, block=args.preset, dtype=args.dtype)
    place = where(args.device) | choice
    models = build(shape, dtype, args.device, tower=False, block=args.preset)
    for kind in ("prefill", "decode"):
        for length in getattr(args, kind):
            rows = breakdown(shape, dtype, args.device, kind, length, args.batch, models)
            print(table(rows), flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.writelines(json.dumps(row | place) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
