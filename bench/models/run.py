"""`python -m bench.models.run --shape 0.5b`: a student beside its teacher, prefill, decode and memory."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import page, timing
from bench.provenance import where
from linmu_distill.checkpoint import write_atomically
from linmu_distill.files import read_lines
from linmu_ops.nn.config import PRESETS

from . import report
from .measure import Row, Task, measure
from .shapes import SHAPES, build, parameters
from .variants import Prefill, variants

# Identity of a measurement: rows that agree in these are the same one.
KEY = ("shape", "layers", "block", "dtype", "kind", "part", "tokens", "batch", "device", "threads", "commit")


def tokens(text: str) -> int:
    """ "64k" or "65536"."""
    return int(text[:-1]) * 1024 if text.lower().endswith("k") else int(text)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.models.run", description=__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="0.5b", help="sizes of the model (default 0.5b)")
    add("--layers", type=int, help="decoder layers; the shape's own if left out")
    add("--preset", choices=tuple(PRESETS), default="exact", help="preset of the student's blocks (default exact)")
    add("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    add("--prefill", nargs="*", type=tokens, metavar="TOKENS", help="prompt lengths, e.g. 1k 16k (default 1k to 256k)")
    add("--decode", nargs="*", type=tokens, metavar="TOKENS", help="tokens behind a decoded one (default 1k to 256k)")
    add("--whole", nargs="*", type=tokens, default=[], metavar="TOKENS", help="prompts through the vision tower too")
    add("--batch", nargs="+", type=int, default=[1, 4, 16], help="rows of a decode (default 1 4 16)")
    add("--prefill-batch", nargs="+", type=int, default=[1], help="rows of a prefill (default 1)")
    add("--plain", action="store_true", help="leave out what has to be compiled")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads; PyTorch's choice if left out")
    add("--seconds", type=float, default=10.0, help="of samples for each variant (default 10)")
    add("--save", type=Path, help="file of rows; bench/results/<device>/models/<shape>.jsonl if left out")
    add("--resume", action="store_true", help="keep the rows of this commit that the file has, and go on")
    add("--report", action="store_true", help="then write bench/reports/<device>.md from the results")
    args = parser.parse_args(argv)
    lengths = [1024 << i for i in range(9)]
    args.prefill = lengths if args.prefill is None else args.prefill
    args.decode = lengths if args.decode is None else args.decode
    return args


def tasks(args: argparse.Namespace) -> list[Task]:
    """Short ones first, so that what is compiled is compiled on them."""
    found = [Task("prefill", "decoder", n, b) for n in sorted(args.prefill) for b in args.prefill_batch]
    found += [Task("prefill", "whole", n, b) for n in sorted(args.whole) for b in args.prefill_batch]
    return found + [Task("decode", "decoder", n, b) for n in sorted(args.decode) for b in args.batch]


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    timing.keep_memory()
    target = args.save or report.results_file(args.device, args.shape, args.layers, args.preset)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        target.unlink(missing_ok=True)
    for dtype in args.dtype:
        _measure_all(args, dtype, target)
    if args.report:
        print(page.write(args.device))
    return 0


def _measure_all(args: argparse.Namespace, dtype: str, target: Path) -> None:
    shape = SHAPES[args.shape].with_layers(args.layers)
    place = where(args.device)
    layers = shape.text["num_hidden_layers"]
    common: Row = dict(shape=args.shape, layers=layers, block=args.preset, dtype=dtype) | place
    if target.exists():  # Nothing is to be appended to a line that was cut.
        write_atomically(target, "".join(json.dumps(row) + "\n" for row in read_lines(target)))
    done = {_key(row): row for row in report.read_rows(target)}
    models: tuple[Any, Any] | None = None
    prefills: dict[str, Prefill] = {}
    with target.open("a") as file:

        def save(rows: list[Row]) -> None:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()

        for task in tasks(args):
            mine = common | dict(kind=task.kind, part=task.part, tokens=task.tokens, batch=task.batch)
            if (row := done.get(_key(mine))) is not None:
                if row["status"] == report.STARTED:
                    save([mine | dict(variant="", status="failed: the process was killed here (out of memory?)")])
                continue
            if models is None:
                _say("weights")
                models = build(shape, getattr(torch, dtype), args.device, bool(args.whole), args.preset)
                common |= dict(parameters=parameters(models[0]), student_parameters=parameters(models[1]))
            save([mine | dict(variant="", status=report.STARTED)])
            found = [v for v in variants(*models, args.device) if not (args.plain and v.compiled)]
            rows = measure(task, shape, found, prefills, seconds=args.seconds, say=_say)
            if task.kind == "decode":
                torch._dynamo.reset()  # graphs of one cache only
            rows = [common | row for row in rows]
            save(rows)
            _say("")
            print(report.table(rows), flush=True)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def _say(text: str) -> None:
    """What is going on, in one line that is written over."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)
    elif text:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
