"""The page a run ends with: what was done, how it went, what came out. Made from the files of the run's folder."""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from linmu_models.config import auto_class, sees_images
from linmu_ops._tables import markdown

from .clock import PARTS
from .config import Config
from .figures import accuracy_bars, loss_curves, speed_curves
from .files import read_json, read_lines
from .handoff import read_facts, stage_folder
from .limited import EQUAL_MEMORY, SINKS
from .sources import fits_tasks
from .stages import STAGES, Stage
from .student import ALONE

ANSWER_TOKENS = 256  # as many as `linmu generate` gives

LOSS_NAMES = {
    "hidden": "L_hid",
    "token": "L_tok",
    "sequence": "L_seq",
    "supervised": "L_sup",
}

_VISION_LANGUAGE = """\
A vision-language model reads an image or a video as hundreds or thousands of *visual tokens* and answers in text. In
every layer of its decoder each token looks at all tokens before it (*attention*), so work grows with the square of the
input's length, and while it answers it must keep two vectors of every token in every layer.
"""

_LANGUAGE = """\
In every layer of a language model each token looks at all tokens before it (*attention*), so work grows with the square
of the text's length, and while it writes it must keep two vectors of every token in every layer.
"""

_MMATE = """\
Here each of these attention layers was replaced by a block whose work grows with the length itself (an *M-MATE* block,
of [LinMU](https://arxiv.org/abs/2601.01322)), with two branches side by side:

- **Flex-MA**: a scan. It carries a state of fixed size along the tokens, forgetting slowly; over visual tokens it also
  runs backwards, so that they see each other in both directions.
- **Local-Swin**: ordinary attention, but only inside small windows of neighbouring visual tokens.

"""

_STAGES = """\
Everything else (vision tower, feed-forward layers, embeddings) is the original model's, the *teacher's*. The new model,
the *student*, starts from the teacher's own attention weights and is trained to imitate it in three stages.
"""

_EXACT = """\
Here each of these attention layers was replaced by a block whose work grows with the length itself (an `ExactMMATE`, in
the manner of [LinMU](https://arxiv.org/abs/2601.01322)). Every earlier token is in one of three places:

- **near**: in the token's window. Text sees the last {text_window} tokens of any kind, a visual token those around it.
- **kept**: {kept_tokens} tokens of each key/value head, of those that have left the windows.
- **far**: all others. They are in the state of a scan, which has a fixed size and forgets slowly.

Attention to what is near or kept is exact. It and the scan are weighed as one softmax over all tokens would weigh them.
Where nothing is far, the block is the attention that it replaces, before any training; what is learnt is the rest.

"""

_ALONE = (
    " *windows alone* and *near + kept* are that student without its scan, the first one without kept tokens too: what "
    "they answer takes no linear attention."
)

_LOSSES = """\
- **L_hid**: how far each new block's output is from the output of the attention it replaces, as a squared
  distance{relative}.
- **L_tok**: how far the student's probabilities for the next answer token are from the teacher's (Kullback-Leibler
  divergence, nats a token; 0 is perfect imitation).
- **L_seq**: surprise of the student at the teacher's own greedy answers, nats a token.
- **L_sup**: surprise of the student at the true answers, nats a token. (Trained on in stage 3, shown elsewhere where
  it is known.)
"""


_TIME = """\
Where the time of a stage went: waiting for data (*loader*), the teacher's forward passes, the student's forward and
backward passes, the optimiser, saving, and all else."""

_EQUAL = (
    " *{name}* keeps keys and values of {tokens:,} tokens, the first {sinks} and the most recent ones: as many "
    "bytes as the student keeps."
)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The records of a stage, one a step."""
    return read_lines(folder / "metrics.jsonl", ("step", "tokens", "tokens_per_second", "peak_memory_mb"))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _conversion(folder: Path) -> str:
    report = read_json(folder / "transfer.json")
    counts = {how: sum(row["numel"] for row in report["rows"] if row["how"] == how)
              for how in ("shared", "copied", "new")}  # fmt: skip
    total = sum(counts.values())
    blocks = sum(row["numel"] for row in report["rows"] if ".self_attn." in row["tensor"])
    copied = blocks - counts["new"]
    layers, kept = report["linear_layers"], report["kept_layers"]
    lines = [
        f"`{report['teacher']}` became a `{report['model_type']}`: {len(layers)} of {len(layers) + len(kept)} "
        f"attention layers were replaced. The student has {total:,} parameters; {blocks:,} of them are in the new "
        f"blocks, and of these {copied:,} ({copied / max(blocks, 1):.1%}) start as copies of the "
        f"teacher's attention weights (W_q, W_k, W_v and W_o). {counts['new']:,} are new.",
        "",
        markdown(
            ["part of a new block", "starts as", "parameters"],
            [[f"`{name}`", source, f"{count:,}"] for name, source, count in _parts(report)],
        ),
    ]
    return "\n".join(lines)


def _parts(report: dict[str, Any]) -> list[tuple[str, str, int]]:
    parts: dict[tuple[str, str], int] = {}
    for row in report["rows"]:
        _, found, name = row["tensor"].partition(".self_attn.")
        if found:
            source = row["source"].partition(".self_attn.")[2] or row["source"]
            key = (name, f"the attention's `{source}`" if row["source"] else "new")
            parts[key] = parts.get(key, 0) + row["numel"]
    return [(name, source, count) for (name, source), count in parts.items()]


def _stages(folder: Path, config: Config) -> str:
    rows = []
    for stage in STAGES:
        row = config.stage(stage.number)
        if not row.steps:
            continue
        manifest = read_facts(folder, stage.number)
        weights = " + ".join(f"{weight:g} {LOSS_NAMES[name]}" for name, weight in row.losses.items())
        records = read_metrics(stage_folder(folder, stage.number))
        rate = np.median([record["tokens_per_second"] for record in records]) if records else 0
        rows.append(
            [str(stage.number), _trained(row), f"{manifest['trained']:,}", weights, f"{row.learning_rate:g}",
             f"{row.steps:,}", _duration(manifest["seconds"]), f"{rate:,.0f}",
             f"{manifest['padding']:.1%}" if "padding" in manifest else "-",
             f"{max((record['peak_memory_mb'] for record in records), default=0):,.0f} MB"]
        )  # fmt: skip
    head = ["stage", "trained, all else frozen", "parameters", "loss", "learning rate", "steps", "time", "tokens/s",
            "padding", "peak memory"]  # fmt: skip
    return markdown(head, rows)


def _time(folder: Path, config: Config) -> str:
    """Where the time of each stage went; empty where no stage has measured it."""
    rows = []
    for stage in STAGES:
        if config.stage(stage.number).steps and (shares := read_facts(folder, stage.number).get("shares")):
            rows.append([f"stage {stage.number}", *(f"{shares[part]:.1%}" for part in PARTS)])
    return markdown(["", *PARTS], rows) if rows else ""


def _trained(stage: Stage) -> str:
    """What a stage trained, as far as its options can tell."""
    parts = {"scan": "Flex-MA", "windows": "Local-Swin", "lora": "LoRA"}
    told = " + ".join(name for kind, name in parts.items() if kind in stage.trainable)
    frozen = ", ".join(f"`{pattern}`" for pattern in stage.freeze).replace("|", r"\|")  # it stands in a table
    return f"{told}, without {frozen}" if frozen else told


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    low, high = row["interval"]
    return f"{row['accuracy']:.1%} ({low:.0%}-{high:.0%})"


def _accuracy(results: dict[str, dict[str, Any]], groups: list[str]) -> str:
    labels = list(results)
    rows = []
    for group in groups:
        cells = [_cell(results[label].get(group)) for label in labels]
        teacher, last = (results.get(label, {}).get(group) for label in ("teacher", f"stage {len(STAGES)}"))
        share = f"{last['accuracy'] / teacher['accuracy']:.1%}" if teacher and last and teacher["accuracy"] else "-"
        rows.append([f"*{group}*", *cells, f"**{share}**"])
    return markdown(["task", *labels, "student / teacher"], rows)


def _speed(rows: list[dict[str, Any]]) -> str:
    lengths = sorted({row["tokens"] for row in rows})
    by = {(row["model"], row["tokens"]): row for row in rows}
    body = []
    for length in lengths:
        teacher, student = by["teacher", length], by["student", length]
        body.append(
            [f"{length:,}", f"{teacher['ttft_s'] * 1e3:.0f} / {student['ttft_s'] * 1e3:.0f} ms",
             f"{teacher['tokens_per_second']:.0f} / {student['tokens_per_second']:.0f}",
             f"{teacher['cache_bytes'] / 1024:,.0f} / {student['cache_bytes'] / 1024:,.0f} KB"]
        )  # fmt: skip
    head = ["input tokens", "time to first token (teacher / student)", "tokens/s while answering",
            "memory held while answering"]  # fmt: skip
    return markdown(head, body)


def _held_out(results: dict[str, dict[str, Any]]) -> str:
    rows = [
        [label, f"{row['perplexity']:.2f}", f"{row['nll']:.3f}", f"{row['kl']:.3f}", f"{row['agreement']:.1%}"]
        for label, row in results.items()
    ]
    return markdown(["", "perplexity", "-log p", "KL to teacher", "same next token"], rows)


def save_picture(frames: np.ndarray, path: Path, scale: int = 3, most: int = 8) -> None:
    """An image, or up to `most` evenly chosen frames of a video side by side, as PNG."""
    from PIL import Image

    chosen = frames[np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)]
    gap = np.full((*chosen.shape[1:2], 3), 128, dtype=np.uint8)
    strips = [part for frame in chosen for part in (frame, gap)][:-1]
    picture = Image.fromarray(np.concatenate(strips, axis=1))
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def _examples(folder: Path, config: Config, teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: Any) -> str:
    from .data import Processor, generate
    from .evaluation import answer

    processor, lines = Processor.from_config(teacher.config, tokenizer), []
    for i, group in enumerate([g for g in ("where", "line", "video", "read") if g in config.evaluation.groups][:3]):
        (sample,) = generate(group, 1, 5, "val")
        path = folder / "figures" / f"sample_{i + 1}.png"
        save_picture(sample.frames, path)
        question, truth = sample.turns[0]
        said = [answer(m, processor, [sample], config.max_new_tokens)[0] for m in (teacher, student)]

        def show(text: str | None) -> str:
            return "(no end)" if text is None else f"`{text}`".replace("\n", "` / `")

        lines += [
            f"![{group}](figures/{path.name})",
            "",
            markdown(["question", "true answer", "teacher", "student"],
                  [[f"`{question}`", show(truth), show(said[0]), show(said[1])]]),
            "",
        ]  # fmt: skip
    return "\n".join(lines)


def _shell(folder: Path, config: Config, student: PreTrainedModel) -> list[str]:
    """A command that asks the student about a page, and what it answers; nothing where no page was asked about."""
    from PIL import Image

    from linmu_models.chat import ChatProcessor
    from linmu_models.generate import generate_text

    from .data import generate

    group = next((g for g in ("line", "where", "read") if g in config.evaluation.groups), None)
    if group is None:
        return []
    try:
        processor = ChatProcessor.load(folder / "student")
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        return ["", f"From the shell it cannot be asked about pictures, as its teacher came without the files: {why}"]
    (sample,) = generate(group, 1, 5, "val")
    page, question = folder / "figures" / "page.png", sample.turns[0][0]
    Image.fromarray(sample.frames[0]).save(page)
    said = generate_text(student, processor, question, [page], max_new_tokens=ANSWER_TOKENS, do_sample=False).text
    command = f'linmu generate {folder}/student --image {page} --prompt "{question}"'
    return ["", "or from the shell, with its answer:", "", "```sh", f"$ {command}", said, "```"]


def write_report(
    folder: Path, config: Config, teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: Any
) -> Path:
    """Write `report.md` and its figures from the files of a finished run."""
    (folder / "figures").mkdir(exist_ok=True)
    curves = {stage.number: read_metrics(stage_folder(folder, stage.number)) for stage in STAGES}
    curves = {number: records for number, records in curves.items() if records}
    if curves:
        loss_curves(folder / "figures/losses.png", curves, LOSS_NAMES)
    results, speed = read_json(folder / "evaluation.json"), read_json(folder / "speed.json", list)
    groups = [g for g in config.evaluation.groups if g in results.get("teacher", {})]
    parts = [
        f"# {config.name}: {config.teacher} made linear",
        "",
        _VISION_LANGUAGE if sees_images(teacher.config) else _LANGUAGE,
        (_EXACT.format(**config.student) if config.preset == "exact" else _MMATE) + _STAGES,
        "## What was converted",
        "",
        _conversion(folder),
        "",
        "## How it was trained",
        "",
        _stages(folder, config),
        "",
        *([_TIME, "", spent, ""] if (spent := _time(folder, config)) else []),
        _LOSSES.format(
            relative=" relative to that output's own mean square (1 = as wrong as saying nothing)"
            if config.is_calibrated
            else ""
        ),
        *(["![losses](figures/losses.png)", ""] if curves else []),
    ]
    if groups:
        accuracy_bars(folder / "figures/accuracy.png", results, groups)
        alone = _ALONE if any(label in results for label in ALONE) else ""
        kept = {row["tokens"] for row in results.get(EQUAL_MEMORY, {}).values() if "tokens" in row}
        alone += "".join(_EQUAL.format(name=EQUAL_MEMORY, tokens=tokens, sinks=SINKS) for tokens in kept)
        counts = [row["n"] for rows in results.values() for row in rows.values()]
        span = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
        parts += [
            "## How well it answers",
            "",
            "Share of questions of the split `val` answered exactly, to the last character, and its 95 % interval "
            f"(Wilson), {span} questions a cell. *initial* is the student after zero steps of training.{alone}",
            "",
            _accuracy(results, groups),
            "",
            "![accuracy](figures/accuracy.png)",
            "",
        ]
    if speed:
        speed_curves(folder / "figures/speed.png", speed)
        parts += [
            "## How fast it is, and what it must remember",
            "",
            (
                "One question about a video of growing length, without the time of the vision tower (the same for both)"
                if fits_tasks(teacher, tokenizer)
                else "A text of growing length"
            )
            + ", batch 1. The teacher keeps keys and values of every token; the student keeps a state of fixed size.",
            "",
            _speed(speed),
            "",
            "![speed](figures/speed.png)",
            "",
        ]
    if groups:
        parts += ["## Three questions", "", _examples(folder, config, teacher, student, tokenizer)]
    if config.evaluation.held_out is not None and (held_out := read_json(folder / "held_out.json")):
        parts += [
            "## How well it predicts",
            "",
            f"On {next(iter(held_out.values()))['tokens']:,} tokens of held-out data: perplexity (the lower, the "
            "better), surprise and distance to the teacher in nats a token, and how often it finds the same next token "
            "the most likely as the teacher does.",
            "",
            _held_out(held_out),
            "",
        ]
    auto = auto_class(student.config).__name__
    parts += [
        "## Use it",
        "",
        "```python",
        "import linmu_models  # makes the student's class known to transformers",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{folder}/student")',
        "```",
        *(_shell(folder, config, student) if groups else []),
        "",
    ]
    path = folder / "report.md"
    path.write_text("\n".join(parts), "utf-8")
    return path
