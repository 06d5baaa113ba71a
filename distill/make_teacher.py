"""Train the small teacher that ships with the repository, from scratch, on one CPU core.

    python -m distill.make_teacher train     # resumes where it was stopped
    python -m distill.make_teacher export    # weights, tokenizer, held-out table -> distill/teachers/tiny

The model is an unmodified transformers Qwen2.5-VL. During training only, the vision tower's output is also asked what
each visual token shows; that loss uses the token embeddings as its classifier, so nothing of it remains in the model.
"""

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from distill.data import CLASSES, GROUPS, Processor, TaskStream, build_tokenizer
from distill.data.tasks import PAGE_SIZES, Sizes
from distill.data.tokenizer import BOS, EOS, IMAGE, PAD, VIDEO, VISION_END, VISION_START
from distill.evaluation import blind_baseline, evaluate

HERE = Path(__file__).parent
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Phase:
    """One row of the curriculum."""

    name: str
    steps: int
    lr: tuple[float, float]
    """Learning rate at the start and at the end, along half a cosine."""
    mixture: dict[str, float]
    turns: int = 4
    pages: Sizes = PAGE_SIZES
    needle_frames: tuple[int, int] = (4, 16)
    needle_batch: int = 8
    answer_loss: float = 1.0
    vision_loss: float = 0.2
    """Weight of the per-token classification loss."""
    vision_every: int = 4
    """The vision tower is trained at every so many steps and frozen at the others, which take half the time; 0: never."""

    def options(self) -> dict[str, dict[str, Any]]:
        """For each group, the arguments of its generator."""
        pages = {group: {"sizes": self.pages} for group in ("read", "line", "where")}
        return {**pages, "needle": {"frames": self.needle_frames}}


SMALL = ((1, 3), (1, 4), (2, 3), (2, 4))
MEDIUM = ((1, 8), (2, 4), (2, 6), (2, 8), (3, 6))
LOOK = {"read": 2.0, "where": 3.0, "video": 2.0, "needle": 1.0}
COPY = {"read": 3.0, "line": 2.0, "where": 3.0, "video": 2.0, "needle": 1.0}
EVEN = {"read": 2.0, "line": 2.0, "where": 4.0, "video": 3.0, "needle": 1.0}
FIND = {"read": 2.0, "line": 2.0, "where": 4.0, "video": 3.0, "needle": 3.0}

# The eyes alone first. Then small pages: finding out which cell to copy is what a large page makes hard. Then all tasks
# at full size with short videos, and the long videos last, because they cost most and need least.
CURRICULUM = (
    Phase("look", 1400, (1.5e-3, 1.0e-3), LOOK, answer_loss=0.0, vision_loss=1.0, vision_every=1, needle_frames=(2, 4)),
    Phase("small", 1200, (1.0e-3, 1.0e-3), COPY, pages=SMALL, needle_frames=(2, 4)),
    Phase("medium", 800, (1.0e-3, 1.0e-3), COPY, pages=MEDIUM, needle_frames=(2, 6)),
    Phase("full", 4000, (1.0e-3, 3.0e-4), EVEN),
    Phase("long", 400, (3.0e-4, 1.0e-5), FIND, vision_every=0, needle_frames=(32, 64), needle_batch=2),
)
BATCH_SIZES = {"read": 16, "line": 16, "where": 16, "video": 8}
BLANK_WEIGHT = 0.2
LOG_EVERY = 20
CHECKPOINT_EVERY = 200
PROBE_EVERY = 500


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained teacher."""
    token = tokenizer.convert_tokens_to_ids
    width = 192
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 448,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            # The width axis gets the slowest frequencies; with a large base neighbouring columns would look alike.
            "rope_parameters": {"rope_type": "default", "rope_theta": 4.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": token(BOS),
            "eos_token_id": token(EOS),
            "pad_token_id": token(PAD),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": width,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "tokens_per_second": 1,
            "window_size": 64,
            "fullatt_block_indexes": [2],
        },
        image_token_id=token(IMAGE),
        video_token_id=token(VIDEO),
        vision_start_token_id=token(VISION_START),
        vision_end_token_id=token(VISION_END),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


class Trainer:
    """Runs the curriculum; its state is a step number, the model and the optimiser."""

    def __init__(self, work: Path, seed: int, curriculum: tuple[Phase, ...] = CURRICULUM) -> None:
        """Build the untrained model, or load the checkpoint that `work` holds."""
        self.work, self.seed, self.curriculum = work, seed, curriculum
        self.tokenizer = build_tokenizer()
        torch.manual_seed(seed)
        self.model = build_model(self.tokenizer)
        self.processor = Processor.from_config(self.model.config, self.tokenizer)
        self.class_tokens = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(CLASSES)))
        self.class_weights = torch.ones(len(CLASSES)).index_fill_(0, torch.tensor(0), BLANK_WEIGHT)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self.step, self.seconds = 0, 0.0
        work.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.exists():
            state = torch.load(self._checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    @property
    def _checkpoint(self) -> Path:
        return self.work / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint; a reader sees the old one or the new one, never half of it."""
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
            },
            partial,
        )
        os.replace(partial, self._checkpoint)

    def log(self, **record: Any) -> None:
        """Append a record to the training log."""
        with (self.work / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "seconds": round(self.seconds), **record}) + "\n")

    def phase(self) -> tuple[Phase, float] | None:
        """The phase of the current step and how much of it is done (0 to 1); None at the end of the curriculum."""
        start = 0
        for phase in self.curriculum:
            if self.step < start + phase.steps:
                return phase, (self.step - start) / phase.steps
            start += phase.steps
        return None

    def stream(self, phase: Phase) -> TaskStream:
        """The training data of a phase."""
        sizes = {**BATCH_SIZES, "needle": phase.needle_batch}
        return TaskStream(self.processor, phase.mixture, sizes, phase.turns, self.seed, options=phase.options())

    def losses(self, phase: Phase, step: int) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Group, loss on the answers, loss on the visual tokens, and accuracy of the latter's non-blank ones."""
        stream = self.stream(phase)
        samples = stream.samples(step)
        batch = self.processor(samples)
        # Padding is on the right: with causal attention, leaving the mask out changes no supervised position.
        del batch["attention_mask"]
        core, video = self.model.model, samples[0].is_video
        pixels = batch.pop("pixel_values_videos" if video else "pixel_values")
        grid = batch["video_grid_thw" if video else "image_grid_thw"]
        look = phase.vision_every > 0 and step % phase.vision_every == 0
        with torch.set_grad_enabled(look):
            seen = (core.get_video_features if video else core.get_image_features)(pixels, grid)
        classes = torch.cat([torch.from_numpy(sample.cells).flatten() for sample in samples])
        embedding = core.language_model.embed_tokens.weight[self.class_tokens]
        logits = torch.cat(list(seen.pooler_output)) @ (embedding if look else embedding.detach()).T
        vision = torch.nn.functional.cross_entropy(logits, classes, weight=self.class_weights)
        shown = classes > 0
        recognised = (logits.argmax(-1) == classes)[shown].float().mean()
        answers = torch.zeros(())
        if phase.answer_loss:
            answers = self.model(**batch, mm_encoder_outputs={"video" if video else "image": seen}).loss
        return stream.group(step), answers, vision, recognised

    def probe(self, phase: Phase) -> None:
        """Log exact match on a few held-out samples. Nothing is chosen by it, and the final test uses other samples."""
        probes = [evaluate(self.model, self.tokenizer, g, 64, seed=1, **phase.options().get(g, {})) for g in GROUPS]
        self.log(
            phase=phase.name,
            exact={probe.group: round(probe.accuracy, 3) for probe in probes},
            right_and_asked={f"{p.group} {kind}": counts for p in probes for kind, counts in p.by_question.items()},
        )

    def run(self) -> None:
        """Train to the end of the curriculum."""
        running: dict[str, list[float]] = {}
        while (at := self.phase()) is not None:
            phase, done = at
            began = time.perf_counter()
            rate = phase.lr[1] + (phase.lr[0] - phase.lr[1]) * 0.5 * (1 + math.cos(math.pi * done))
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = rate * min(1.0, (self.step + 1) / 100)
            group, answers, vision, recognised = self.losses(phase, self.step)
            self.optimizer.zero_grad()
            (phase.answer_loss * answers + phase.vision_loss * vision).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            running.setdefault(group, []).append(answers.item())
            running.setdefault("vision", []).append(vision.item())
            running.setdefault("recognised", []).append(recognised.item())
            self.step += 1
            self.seconds += time.perf_counter() - began
            if self.step % LOG_EVERY == 0:
                means = {name: round(sum(values) / len(values), 4) for name, values in sorted(running.items())}
                self.log(phase=phase.name, lr=round(rate, 6), **means)
                running.clear()
            if self.step % PROBE_EVERY == 0 and phase.answer_loss:
                self.probe(phase)
            if self.step % CHECKPOINT_EVERY == 0:
                self.save()
        self.save()


@app.command()
def train(work: Path = Path("runs/teacher"), seed: int = 0, threads: int = 1) -> None:
    """Train, or go on training, with checkpoints and log in WORK."""
    torch.set_num_threads(threads)
    Trainer(work, seed).run()


@app.command()
def export(
    work: Path = Path("runs/teacher"), out: Path = HERE / "teachers" / "tiny", n: int = 400, seed: int = 2024
) -> None:
    """Write the teacher of WORK's checkpoint to OUT and evaluate what was written, N samples of each group."""
    torch.set_num_threads(1)
    trainer = Trainer(work, seed)
    # Half precision halves the file; the config asks for float32, so that is what a reader computes in.
    trainer.model.half().save_pretrained(out)
    settings = json.loads((out / "config.json").read_text())
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    trainer.tokenizer.save_pretrained(out)
    shutil.copy(work / "log.jsonl", out / "training_log.jsonl")
    model = AutoModelForImageTextToText.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = []
    for group in GROUPS:
        blind = blind_baseline(group, n, seed)
        for split in ("test", "test_font"):
            result = evaluate(model, tokenizer, group, n, seed, split=split)
            low, high = result.interval
            kinds = ", ".join(f"{kind} {right}/{asked}" for kind, (right, asked) in sorted(result.by_question.items()))
            cells = (group, split, n, f"**{result.accuracy:.1%}**", f"{low:.1%} - {high:.1%}", kinds, f"{blind:.1%}")
            rows.append("| " + " | ".join(map(str, cells)) + " |")
            typer.echo(rows[-1])
    header = (
        "| group | split | n | exact match | 95 % interval | by question | blind |\n|---|---|---|---|---|---|---|\n"
    )
    (out / "held_out.md").write_text(header + "\n".join(rows) + "\n")


if __name__ == "__main__":
    app()
