"""`python -m bench.models.reopen`: a prompt that was read once, copied, put back, kept in a file and reopened."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linmu_models.conversion import convert
from linmu_models.generate import load_model
from linmu_models.snapshot import CacheSnapshot
from linmu_models.states import LinmuDynamicCache, load_cache

from ..provenance import where
from .shapes import SHAPES, build

_CHUNK = 4096  # tokens of a prompt that are read at a time


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models.reopen", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--teacher", help="a folder to convert, in the place of a shape with random weights")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default 2); 0: all")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 16_000, 100_000])
    parser.add_argument("--repeats", type=int, default=20, help="of all but the reading (default 20)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="append rows (JSON lines) to this file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.teacher:
        student = convert(load_model(args.teacher, args.dtype)).eval()
    else:
        shape = SHAPES[args.shape].with_layers(args.layers or None)
        _, student = build(shape, getattr(torch, args.dtype), "cpu", tower=False)
    named = dict(shape=args.teacher or args.shape, layers=len(student.linmu_layers()), block="exact", dtype=args.dtype)
    for tokens in args.tokens:
        row = named | where("cpu") | dict(kind="reopen", tokens=tokens) | measure(student, tokens, args.repeats)
        print({name: row[name] for name in ("tokens", *_TIMES, "state_bytes", "file_bytes", "attention_bytes")})
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0


_TIMES = ("read_seconds", "snapshot_seconds", "restore_seconds", "save_seconds", "load_seconds")


@torch.no_grad()
def measure(student: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians in seconds, and bytes; `attention_bytes` are keys and values of as many tokens in the teacher."""
    cache, decoder = LinmuDynamicCache(config=student.config), student.get_decoder()
    text = student.config.get_text_config(decoder=True)
    begin = time.perf_counter()
    for first in range(0, tokens, _CHUNK):
        ids = torch.arange(first, min(first + _CHUNK, tokens))[None] % min(500, text.vocab_size)
        decoder(input_ids=ids, cache=cache)
    read = time.perf_counter() - begin
    taken = cache.snapshot()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        times = {
            "snapshot_seconds": median(cache.snapshot, repeats),
            "restore_seconds": median(lambda: cache.restore(taken), repeats),
            "save_seconds": median(lambda: cache.save(path, student), repeats),
            "load_seconds": median(lambda: load_cache(path, student), repeats),
        }
        same = CacheSnapshot.load(path, student)
        pairs = zip(taken.layers, same.layers, strict=True)
        if not all(torch.equal(one.tensors[name], t) for one, other in pairs for name, t in other.tensors.items()):
            raise RuntimeError("bench: what was reopened must be what was saved")
        size = path.stat().st_size
    wide = text.hidden_size // text.num_attention_heads
    keys = 2 * text.num_hidden_layers * text.num_key_value_heads * wide * student.dtype.itemsize
    return dict(
        read_seconds=read, **times, state_bytes=taken.bytes, file_bytes=size, attention_bytes=keys * tokens,
        repeats=repeats,
    )  # fmt: skip


def median(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    raise SystemExit(main())
