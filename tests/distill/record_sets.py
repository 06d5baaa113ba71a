"""Data sets with flaws beside a tiny Qwen2.5-VL, and runs on them."""

import os
import signal

import media
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from linmu_distill import run
from linmu_distill.config import parse_config
from linmu_distill.data.records import JsonRecords, ParquetRecords
from linmu_distill.data.stream import Decoding, Packing, RecordStream, SetReader
from linmu_distill.train import StageTrainer


def write(folder):
    """A tiny Qwen2.5-VL, and data sets with flaws."""
    media.qwen_folder(folder / "teacher")
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder / "teacher"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "teacher")
    good = {f"{i:02d}" * (1 + i % 5): media.png(i, 30 + i, 60) for i in range(20)}
    media.onevision(folder / "whole.parquet", good)
    bad = {"cut": media.png(1)[:500], "noise": b"noise", "<|end|>": media.png(2), "long" * 100: media.png(3)}
    media.onevision(folder / "flawed.parquet", {**good, **bad})
    video = media.write_video(folder / "good.mkv", frames=20)
    (folder / "short.mkv").write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    names = ["good.mkv", "short.mkv", "none.mkv", "good.mkv"]
    talks = [media.talk("<image>\nwhat?", "grey") for _ in names[:3]] + [media.talk("<image>\nwhat?", "")]
    media.write_json(
        folder / "videos.json", [{"conversations": t, "video": n} for t, n in zip(talks, names, strict=True)]
    )
    return folder


def reader(folder, processor, file="whole", rank=0, processes=1, seed=0, window=5, **packing):
    records = ParquetRecords([str(folder / f"{file}.parquet")], None)
    packing = Packing(**{"max_tokens": 400, "window": window, **packing})
    return SetReader("pictures", records, processor, Decoding(), packing, seed, rank, processes)


def stream(folder, processor, file="flawed"):
    videos = JsonRecords([str(folder / "videos.json")], str(folder))
    readers = [
        reader(folder, processor, file),
        SetReader("videos", videos, processor, Decoding(4, 2.0), Packing(400), 0),
    ]
    return RecordStream(processor, readers, [3, 1], seed=5)


def answers(batch):
    return [sample.turns[0][1] for sample in batch]


def config(folder, output, **changes):
    sets = {
        "pictures": {"format": "onevision", "files": [str(folder / "flawed.parquet")], "weight": 3},
        "videos": {"format": "llava_video", "files": [str(folder / "videos.json")], "folder": str(folder)},
    }
    values = {
        "output": str(output / "r"), "preset": "paper", "teacher": str(folder / "teacher"), "max_new_tokens": 3,
        "data": {"sets": sets, "max_tokens": 200, "frames": 4},
        "evaluation": {"samples": 0, "speed_lengths": []},
        "checkpoint_every": 2,
        **{f"stage{i}": {"steps": 6 if i != 2 else 1} for i in (1, 2, 3)},
    }  # fmt: skip
    return parse_config({**values, **changes})


def packed_config(folder, output, packing=True, **changes):
    """Pictures and text, in rows of several samples."""
    (output / "t.txt").write_text("\n\n".join(f"Number {i} is {i * i}." for i in range(60)))
    plain = config(folder, output)
    data = {**plain.data.model_dump(), "packing": packing}
    data["sets"] = {
        "pictures": {"format": "onevision", "files": [str(folder / "flawed.parquet")]},
        "text": {"format": "text", "files": [str(output / "t.txt")]},
    }
    narrow = dict(preset="exact", student={"text_window": 4, "window": [1, 1, 1]}, stage2={"steps": 0})
    return config(folder, output, data=data, **{**narrow, **changes})


def stop_at(monkeypatch, number, step):
    """Ctrl-C after a step of a stage."""

    def trainer(config, stage, *rest, **named):
        on_step = lambda now: stage.number == number and now == step and os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        return StageTrainer(config, stage, *rest, **named, on_step=on_step)

    monkeypatch.setattr(run, "StageTrainer", trainer)


def train(options):
    """All stages, without a report."""
    whole = run.Run(options)
    whole.prepare()
    for number in (1, 2, 3):
        if not whole.is_finished(number):
            whole.train(number)
