"""Perplexity, agreement with the teacher and distance to it on data that no stage sees; for any teacher and data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from distill.losses import kept_positions
from distill.teacher import Batch
from distill.train import model_inputs

FILE = "held_out.json"


@torch.no_grad()
def measure(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch], chunk_size: int = 1024
) -> dict[str, Any]:
    """Means over the answer tokens of batches, in nats.

    Returns:
        `tokens`; `nll` and `perplexity`, exp of it; `agreement`: the share of tokens where model and teacher find the
        same token the most likely; `kl`: KL(teacher || model).
    """
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        kept = kept_positions(batch["labels"])
        ours, theirs = (
            kept.select(m.model(**model_inputs(batch), use_cache=False).last_hidden_state) for m in (model, teacher)
        )
        for start in range(0, len(kept), chunk_size):
            part = slice(start, start + chunk_size)
            log_p = functional.log_softmax(model.lm_head(ours[part]).float(), -1)
            log_q = functional.log_softmax(teacher.lm_head(theirs[part]).float(), -1)
            nll = functional.nll_loss(log_p, kept.targets[part], reduction="sum")
            same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            kl = functional.kl_div(log_p, log_q, log_target=True, reduction="sum")
            sums += torch.stack([nll, same, kl]).double().cpu()
        count += len(kept)
    nll, agreement, kl = (sums / max(count, 1)).tolist()
    return {"tokens": count, "nll": nll, "perplexity": math.exp(nll), "agreement": agreement, "kl": kl}


def section(results: dict[str, dict[str, Any]]) -> str:
    """The part of the report about it, in Markdown."""
    from distill.report import table

    rows = [
        [label, f"{row['perplexity']:.2f}", f"{row['nll']:.3f}", f"{row['kl']:.3f}", f"{row['agreement']:.1%}"]
        for label, row in results.items()
    ]
    tokens = next(iter(results.values()))["tokens"]
    return "\n".join(
        [
            "## How well it predicts",
            "",
            f"On {tokens:,} tokens of held-out data: perplexity (the lower, the better), surprise and distance to the "
            "teacher in nats a token, and how often it finds the same next token the most likely as the teacher does.",
            "",
            table(["", "perplexity", "-log p", "KL to teacher", "same next token"], rows),
            "",
            "",
        ]
    )


def add_section(report: Path, results: dict[str, dict[str, Any]]) -> None:
    """Put the section into a written report, before what stands last in it."""
    before, mark, after = report.read_text().partition("## Use it")
    report.write_text(before + section(results) + mark + after)
