"""Train the small teacher that ships with the repository, from scratch, on one or two CPU cores.

    python -m tools.make_teacher train     # resumes where it was stopped
    python -m tools.make_teacher export    # weights, tokenizer, held-out table -> distill/teachers/tiny
    python -m tools.make_teacher train --curriculum long --work runs/long      # many keys, chains, long pages; no tutor

The model is an unmodified transformers Qwen2.5-VL. Its two halves are trained apart and fit when put together. Token
embeddings are random and stay fixed: the eyes (vision tower) learn to turn each cell into the embedding of the
character it shows, the mind (decoder) learns the tasks on those embeddings, as if it had perfect eyes. Neither has to
wait for the other to make sense, and the mind's steps cost no vision. A tutor (`Tutor`) shows the mind where to look;
without it, the mind stays at the frequencies of the letters for thousands of steps. The curriculum `long` has no tutor:
where its teacher looks is its own doing. Nobody has run it to its end.
"""

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention, rotate_half

from linmu_distill.checkpoint import load_data
from linmu_distill.data import CLASSES, GROUPS, IGNORE, TASKS, Batch, Processor, Sample, TaskStream, build_tokenizer
from linmu_distill.data.drawing import Sizes
from linmu_distill.data.tasks import PAGE_SIZES
from linmu_distill.data.tokenizer import BOS, EOS, IMAGE, PAD, VIDEO, VISION_END, VISION_START, save_processor
from linmu_distill.evaluation import blind_baseline, evaluate

from .lessons import FACTS, UNKNOWN, answer_pointers, cell_facts, cell_pointers

TEACHER = Path(__file__).parents[1] / "distill" / "teachers" / "tiny"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Phase:
    """One row of the curriculum."""

    part: str
    """`eyes`: vision tower only. `mind`: decoder only, on the embeddings of what is shown."""
    steps: int
    lr: tuple[float, float]
    """Learning rate at the start and at the end, along half a cosine."""
    mixture: dict[str, float]
    pages: Sizes = PAGE_SIZES
    needle_frames: tuple[int, int] = (4, 16)
    needle_batch: int = 8
    keys: int = 4
    lines: int = 48
    """Of a long page."""

    def stream(self, processor: Processor, seed: int) -> TaskStream:
        """The training data of this phase."""
        options: dict[str, dict[str, Any]] = {group: {"sizes": self.pages} for group in ("read", "line", "where")}
        options["needle"] = options["tracking"] = {"frames": self.needle_frames}
        options["needles"] = {"frames": self.needle_frames, "keys": self.keys}
        options["page"] = {"sizes": ((self.lines, 8),)}
        sizes = {"read": 16, "line": 16, "where": 16, "video": 8, "page": 4}
        sizes |= dict.fromkeys(("needle", "needles", "tracking"), self.needle_batch)
        return TaskStream(processor, self.mixture, sizes, 4, seed, options=options)


LOOK = {"read": 4.0, "where": 4.0, "video": 1.0, "needle": 1.0}
EVEN = {"read": 2.0, "line": 2.0, "where": 4.0, "video": 4.0, "needle": 2.0}
FIND = {"read": 1.0, "line": 1.0, "where": 4.0, "video": 4.0, "needle": 3.0}
HARD = {"read": 0.5, "line": 0.5, "where": 4.0, "video": 5.0, "needle": 3.0}
LAST = {"read": 1.0, "line": 0.5, "where": 7.0, "video": 4.0, "needle": 1.0}
LONG = {"read": 1.0, "line": 0.5, "where": 6.0, "video": 4.0, "needle": 3.0}
CURRICULUM = (
    Phase("eyes", 5000, (1.5e-3, 5.0e-5), LOOK, needle_frames=(2, 4), needle_batch=16),
    Phase("mind", 2000, (1.0e-3, 1.0e-3), EVEN, pages=((1, 8), *PAGE_SIZES), needle_frames=(2, 8)),
    Phase("mind", 2800, (6.0e-4, 3.0e-5), FIND, needle_frames=(4, 32), needle_batch=6),
    Phase("mind", 1200, (5.0e-4, 1.0e-5), HARD, needle_frames=(8, 64), needle_batch=3),
    Phase("mind", 560, (4.0e-4, 1.0e-5), LAST, needle_frames=(8, 64), needle_batch=2),
    Phase("mind", 6000, (5.0e-4, 1.0e-5), LONG, needle_frames=(8, 64), needle_batch=3),
)
FAR = LONG | {"needles": 4.0, "tracking": 2.0, "page": 1.0}
LONG_CURRICULUM = (
    CURRICULUM[0],
    Phase("mind", 8000, (1.0e-3, 1.0e-3), EVEN | {"needles": 2.0}, ((1, 8), *PAGE_SIZES), (3, 8), keys=1, lines=8),
    Phase("mind", 8000, (6.0e-4, 1.0e-4), FAR, needle_frames=(4, 16), keys=4, lines=12),
    Phase("mind", 8000, (5.0e-4, 5.0e-5), FAR, needle_frames=(8, 32), needle_batch=4, keys=16, lines=24),
    Phase("mind", 12000, (5.0e-4, 1.0e-5), FAR, needle_frames=(8, 64), needle_batch=3, keys=32, lines=48),
)
# Each curriculum, and whether the tutor shows its mind where to look.
CURRICULA = {"shipped": (CURRICULUM, True), "long": (LONG_CURRICULUM, False)}
PARTS = ("eyes", "mind")
EMBEDDING_STD = 0.02
MIND_NOISE = 0.3
FINAL_NORM = 4.0
BLANK_WEIGHT = 0.2
WARMUP = 50
LOG_EVERY = 25
CHECKPOINT_EVERY = 50


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained teacher."""

    def token(name: str) -> int:
        number = tokenizer.convert_tokens_to_ids(name)
        assert isinstance(number, int)
        return number

    width = 256
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            # Sections of one frequency each, in turns t, h, w, t, ...: every axis gets fast ones, to tell neighbours
            # apart, and slow ones, to compare contents wherever they are. Three long sections give w slow ones only.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1] * 32},
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


def _attention_of(layer: torch.nn.Module) -> Qwen2_5_VLAttention:
    assert isinstance(layer.self_attn, Qwen2_5_VLAttention)
    return layer.self_attn


class Tutor(torch.nn.Module):
    """Losses on what the decoder looks at, and on what it knows halfway up. Not part of the teacher.

    One head of a layer is asked to attend where `answer_pointers` points, one head of the layer below where
    `cell_pointers` points, and the states between them to tell the facts of `cell_facts`: a cell its own, an answer
    token those by which its cell is found.
    """

    def __init__(self, layers: torch.nn.ModuleList, width: int) -> None:
        super().__init__()
        self.facts = torch.nn.Linear(width, sum(FACTS.values()))
        below, at = len(layers) // 2 - 1, len(layers) // 2
        # In a tuple, so that the decoder's parameters are not taken for the tutor's.
        self.attentions = (_attention_of(layers[below]), _attention_of(layers[at]))
        self.inputs: dict[int, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = {}
        for i, attention in enumerate(self.attentions):
            attention.register_forward_pre_hook(
                lambda _module, _args, kwargs, i=i: self._keep(i, kwargs), with_kwargs=True
            )

    def _keep(self, i: int, kwargs: dict[str, Any]) -> None:
        self.inputs[i] = (kwargs["hidden_states"], kwargs["position_embeddings"])

    def _misses(self, i: int, row: int, queries: list[int], targets: torch.Tensor) -> torch.Tensor:
        """KL divergence of head 0 at `queries` of batch row `row` from `targets` `(len(queries), L)`."""
        attention, (hidden, (cos, sin)) = self.attentions[i], self.inputs[i]
        size = attention.head_dim
        q = torch.nn.functional.linear(
            hidden[row, queries], attention.q_proj.weight[:size], attention.q_proj.bias[:size]
        )
        k = torch.nn.functional.linear(hidden[row], attention.k_proj.weight[:size], attention.k_proj.bias[:size])
        q = q * cos[row, queries] + rotate_half(q) * sin[row, queries]
        k = k * cos[row] + rotate_half(k) * sin[row]
        future = torch.arange(len(k)) > torch.tensor(queries)[:, None]
        scores = (q @ k.T * attention.scaling).masked_fill(future, -torch.inf).log_softmax(-1)
        found = targets * (scores - targets.log()).masked_fill(targets == 0, 0.0)
        return -found.sum(-1)

    def forward(self, samples: list[Sample], batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(answer tokens' misses, cells' misses, ignorance of the facts), each a mean, after the model has run."""
        length = batch["input_ids"].shape[1]
        misses: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        knowing, known = [], []
        hidden = self.inputs[1][0]
        for row, sample in enumerate(samples):
            visual = batch["mm_token_type_ids"][row].nonzero()[:, 0]
            answers = (batch["labels"][row] != IGNORE).nonzero()[:, 0]
            facts = torch.from_numpy(cell_facts(sample))
            knowing.append(hidden[row, visual])
            known.append(facts)
            if pairs := cell_pointers(sample):
                targets = torch.zeros(len(pairs), length)
                for i, (_, back) in enumerate(pairs):
                    targets[i, visual[list(back)]] = 1.0 / len(back)
                misses[0].append(self._misses(0, row, visual[[a for a, _ in pairs]].tolist(), targets))
            pointers = answer_pointers(sample)
            targets = torch.zeros(len(pointers), length)
            told = torch.full((len(pointers), len(FACTS)), UNKNOWN)
            for i, pointer in enumerate(pointers):
                targets[i, visual[list(pointer.cells)]] = pointer.share
                targets[i, 0] += 1.0 - pointer.share * len(pointer.cells)
                for j, name in enumerate(FACTS):
                    if name in pointer.facts and pointer.cells:
                        told[i, j] = facts[pointer.cells[0], j]
            queries = (answers[[pointer.token for pointer in pointers]] - 1).tolist()
            misses[1].append(self._misses(1, row, queries, targets))
            knowing.append(hidden[row, queries])
            known.append(told)
        logits, truth = self.facts(torch.cat(knowing)), torch.cat(known)
        ignorance = [
            torch.nn.functional.cross_entropy(part, where, ignore_index=UNKNOWN)
            for part, where in zip(logits.split(list(FACTS.values()), -1), truth.unbind(-1), strict=True)
            if (where != UNKNOWN).any()
        ]
        at_cells = torch.cat(misses[0]).mean() if misses[0] else torch.zeros(())
        return torch.cat(misses[1]).mean(), at_cells, torch.stack(ignorance).mean()


class Trainer:
    """Trains one part of the curriculum; its state is a step number, the model and the optimiser."""

    def __init__(self, work: Path, part: str, seed: int, curriculum: str = "shipped") -> None:
        """Start `part` afresh, or where its checkpoint in `work` stands."""
        self.work, self.part, self.seed = work, part, seed
        phases, tutored = CURRICULA[curriculum]
        self.phases = [phase for phase in phases if phase.part == part]
        self.is_tutored = tutored and part != "eyes"
        self.tokenizer = build_tokenizer()
        torch.manual_seed(seed)
        self.model = build_model(self.tokenizer)
        core = self.model.model
        self.embedding = core.language_model.embed_tokens.weight
        with torch.no_grad():
            self.embedding.normal_(std=EMBEDDING_STD)
            core.language_model.norm.weight.fill_(FINAL_NORM)
        self.tutor = Tutor(core.language_model.layers, self.embedding.shape[1])
        trained = {"eyes": core.visual, "mind": core.language_model.layers}[part]
        self.model.requires_grad_(False)
        trained.requires_grad_(True)
        core.language_model.norm.requires_grad_(part != "eyes")
        self.processor = Processor.from_config(self.model.config, self.tokenizer)
        self.class_tokens = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(CLASSES)))
        self.class_weights = torch.ones(len(CLASSES)).index_fill_(0, torch.tensor(0), BLANK_WEIGHT)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters += self.tutor.parameters() if self.is_tutored else []
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        work.mkdir(parents=True, exist_ok=True)
        if self.checkpoint(part).exists():
            state = load_data(self.checkpoint(part))
            self.model.load_state_dict(state["model"])
            self.tutor.load_state_dict(state["tutor"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.cpu_seconds = state["step"], state["seconds"], state["cpu_seconds"]

    def checkpoint(self, part: str) -> Path:
        """Where a part's checkpoint is."""
        return self.work / f"{part}.pt"

    def save(self) -> None:
        """Write the checkpoint; a reader sees the old one or the new one, never half of it."""
        partial = self.checkpoint(self.part).with_suffix(".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "tutor": self.tutor.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
            },
            partial,
        )
        os.replace(partial, self.checkpoint(self.part))

    def log(self, **record: Any) -> None:
        """Append a record to the training log."""
        clock = {"seconds": round(self.seconds), "cpu_seconds": round(self.cpu_seconds)}
        with (self.work / "log.jsonl").open("a") as file:
            file.write(json.dumps({"part": self.part, "step": self.step, **clock, **record}) + "\n")

    def phase(self) -> tuple[Phase, float] | None:
        """The phase of the current step and how much of it is done (0 to 1); None at the end of the part."""
        start = 0
        for phase in self.phases:
            if self.step < start + phase.steps:
                return phase, (self.step - start) / phase.steps
            start += phase.steps
        return None

    def see(self, batch: Batch, classes: torch.Tensor, video: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the decoder gets for the visual tokens.

        Args:
            classes: what each visual token shows, `(N,)` index into `CLASSES`.

        Returns:
            features `(N, D)`, the loss on them, and how many of the non-blank ones were recognised.
        """
        ideal = self.embedding[self.class_tokens[classes]]
        if self.part == "mind":
            noise = MIND_NOISE * EMBEDDING_STD * torch.randn(ideal.shape)
            return ideal + noise, torch.zeros(()), torch.ones(())
        core = self.model.model
        pixels = batch["pixel_values_videos" if video else "pixel_values"]
        grid = batch["video_grid_thw" if video else "image_grid_thw"]
        features = torch.cat(
            list((core.get_video_features if video else core.get_image_features)(pixels, grid).pooler_output)
        )
        scale = EMBEDDING_STD**2 * features.shape[-1] ** 0.5
        logits = features @ self.embedding[self.class_tokens].T / scale
        loss = torch.nn.functional.cross_entropy(logits, classes, weight=self.class_weights)
        # Classification alone would leave the length of the features, and their other directions, to chance.
        loss = loss + torch.nn.functional.mse_loss(features, ideal.detach()) / EMBEDDING_STD**2
        return features, loss, (logits.argmax(-1) == classes)[classes > 0].float().mean()

    def train_step(self, phase: Phase) -> dict[str, float]:
        """One optimiser step; returns what the log is to say about it."""
        stream = phase.stream(self.processor, self.seed)
        group, samples = stream.group(self.step), stream.samples(self.step)
        batch = self.processor(samples)
        # Padding is on the right: with causal attention, leaving the mask out changes no supervised position.
        del batch["attention_mask"]
        classes = torch.cat([torch.from_numpy(sample.cells).flatten() for sample in samples])
        video = samples[0].is_video
        features, loss, recognised = self.see(batch, classes, video)
        record = {"seeing": loss.item(), "recognised": recognised.item()}
        if self.part != "eyes":
            batch.pop("pixel_values_videos" if video else "pixel_values")
            seen = BaseModelOutputWithPooling(pooler_output=[features])  # type: ignore[arg-type]  # one for each picture
            outputs = {"video" if video else "image": seen}
            output = self.model(**batch, mm_encoder_outputs=outputs)
            labels = batch["labels"][:, 1:]
            right = (output.logits[:, :-1].argmax(-1) == labels) | (labels == IGNORE)
            record |= {group: output.loss.item(), f"{group} right": right.all(1).float().mean().item()}
            loss = output.loss
        if self.is_tutored:
            at_answers, at_cells, ignorance = self.tutor(samples, batch)
            record |= {f"{group} misses": at_answers.item(), "ignorance": ignorance.item()}
            record |= {f"{group} cell misses": at_cells.item()} if at_cells else {}
            loss = loss + at_answers + at_cells + ignorance
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return record

    def run(self) -> None:
        """Train to the end of the part."""
        running: dict[str, list[float]] = {}
        while (at := self.phase()) is not None:
            phase, done = at
            clock, cpu = time.perf_counter(), time.process_time()
            rate = phase.lr[1] + (phase.lr[0] - phase.lr[1]) * 0.5 * (1 + math.cos(math.pi * done))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * min(1.0, (done * phase.steps + 1) / WARMUP)
            for name, value in self.train_step(phase).items():
                running.setdefault(name, []).append(value)
            self.step += 1
            self.seconds += time.perf_counter() - clock
            self.cpu_seconds += time.process_time() - cpu
            if self.step % LOG_EVERY == 0:
                self.log(lr=round(rate, 6), **{k: round(sum(v) / len(v), 4) for k, v in sorted(running.items())})
                running.clear()
            if self.step % CHECKPOINT_EVERY == 0:
                self.save()
        self.save()


@app.command()
def train(
    work: Path = Path("runs/teacher"),
    part: Annotated[list[str] | None, typer.Option()] = None,
    seed: int = 0,
    threads: int = 1,
    curriculum: Annotated[str, typer.Option(help=", ".join(CURRICULA))] = "shipped",
) -> None:
    """Train, or go on training, with checkpoints and log in WORK.

    `eyes` and `mind` may run at the same time.
    """
    torch.set_num_threads(threads)
    for name in part or PARTS:
        Trainer(work, name, seed, curriculum).run()


def assemble(work: Path, seed: int, curriculum: str = "shipped") -> Trainer:
    """The eyes and the mind of WORK in one model, as the trainer of the mind holds it.

    Raises:
        RuntimeError: a part has not been trained to its end.
    """
    trainers = {part: Trainer(work, part, seed, curriculum) for part in PARTS}
    for part, trainer in trainers.items():
        if trainer.phase() is not None:
            wanted = sum(phase.steps for phase in trainer.phases)
            raise RuntimeError(f"{part!r} stands at step {trainer.step} of {wanted}: train it to its end first")
    mind = trainers["mind"]
    mind.model.model.visual.load_state_dict(trainers["eyes"].model.model.visual.state_dict())
    return mind


@app.command()
def export(
    work: Path = Path("runs/teacher"),
    out: Path = TEACHER,
    n: int = 400,
    seed: int = 2024,
    curriculum: Annotated[str, typer.Option(help=", ".join(CURRICULA))] = "shipped",
) -> None:
    """Write the teacher of WORK's checkpoint to OUT and evaluate what was written, N samples of each group."""
    torch.set_num_threads(1)
    trainer = assemble(work, seed, curriculum)
    # Half precision halves the file; the config asks for float32, so that is what a reader computes in.
    trainer.model.half().save_pretrained(out)
    settings = json.loads((out / "config.json").read_text())
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    save_processor(out, trainer.model.config.vision_config)
    shutil.copy(work / "log.jsonl", out / "training_log.jsonl")
    model = AutoModelForImageTextToText.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = []
    for group in GROUPS if curriculum == "shipped" else TASKS:
        blind = blind_baseline(group, n, seed)
        for split in ("val", "val_font"):
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
