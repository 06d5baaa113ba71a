"""`python -m bench.models.chunks`: the memory that a video takes, read whole and in chunks."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.provenance import where
from linmu_distill.live import LiveBytes
from linmu_models.cache import cache_bytes
from linmu_ops._tables import plain

from .shapes import SHAPES, TINY_VISION, build

SIDE = 8  # a frame is SIDE x SIDE tokens
VOCABULARY = 512  # logits are of one token all the same
VISION = TINY_VISION | dict(hidden_size=256, intermediate_size=1024, num_heads=4)


def prompt(model: Any, frames: int) -> dict[str, Any]:
    """A video of so many frames (of two pictures each) between a few tokens of text."""
    config = model.config
    count = frames * SIDE**2
    ids = [
        10,
        config.vision_start_token_id,
        *[config.video_token_id] * count,
        config.vision_end_token_id,
        *range(11, 20),
    ]
    kinds = [2 * (token == config.video_token_id) for token in ids]
    pixels = torch.randn(4 * count, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    return dict(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        mm_token_type_ids=torch.tensor([kinds]), pixel_values_videos=pixels,
        video_grid_thw=torch.tensor([[frames, 2 * SIDE, 2 * SIDE]]),
    )  # fmt: skip


def measure(model: Any, frames: int, chunk: int | None) -> dict[str, Any]:
    """Bytes that live at most while a prompt is read, beside the model and the prompt itself; and what is kept."""
    inputs = prompt(model, frames)
    before = [*model.parameters(), *model.buffers(), *inputs.values()]
    with LiveBytes(before) as live:
        known = live.now
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk, return_dict_in_generate=True
        )
    return dict(
        frames=frames, tokens=inputs["input_ids"].shape[1], chunk=chunk, peak_bytes=live.peak - known,
        state_bytes=cache_bytes(out.past_key_values),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.models.chunks", description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 1024], help="tokens; 0: the whole prompt")
    parser.add_argument("--shape", choices=[n for n in SHAPES if SHAPES[n].family == "qwen2_5_vl"], default="0.5b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="add rows to this file")
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape].with_layers(args.layers)
    vision = VISION | dict(out_hidden_size=shape.text["hidden_size"])
    shape = replace(shape, text=shape.text | dict(vocab_size=VOCABULARY), vision=vision)
    torch.manual_seed(0)
    _, student = build(shape, torch.float32, "cpu")
    student.generation_config.eos_token_id, student.generation_config.pad_token_id = None, 0
    found = []
    for frames in args.frames:
        for chunk in args.chunks:
            row = measure(student, frames, chunk or None)
            found.append(row)
            if args.json:
                line = dict(shape=args.shape, layers=args.layers, dtype="float32", **where("cpu"), **row)
                with args.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    head = ["frames", "tokens", "chunk", "peak, MB", "state, MB"]
    mega = [[f"{row[name] / 1e6:.1f}" for name in ("peak_bytes", "state_bytes")] for row in found]
    rows = [
        [str(row["frames"]), str(row["tokens"]), str(row["chunk"] or "whole"), *sizes]
        for row, sizes in zip(found, mega, strict=True)
    ]
    print("\n".join(plain(head, rows)))


if __name__ == "__main__":
    main()
