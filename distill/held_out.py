"""Perplexity, agreement with the teacher and distance to it on data that no stage sees; for any teacher and data."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from .limited import limited
from .losses import kept_positions
from .teacher import Batch, model_inputs

if TYPE_CHECKING:
    from .data.stream import RecordStream

MOST_BATCHES = 64
ENOUGH_TOKENS = 7_000  # of answers


def some(source: "RecordStream") -> list[Batch]:
    """The first batches of data sets: as many as have enough answer tokens, or `MOST_BATCHES`, or all there are."""
    batches: list[Batch] = []
    tokens = 0
    for samples in source.once(MOST_BATCHES):
        batches.append(source.processor(samples))
        tokens += len(kept_positions(batches[-1]["labels"]))
        if tokens >= ENOUGH_TOKENS:
            break
    source.close()
    return batches


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    chunk_size: int = 1024,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Means over the answer tokens of batches, in nats.

    Args:
        tokens: of so many the model's attention keeps keys and values, as `limited` has it; None: of all.

    Returns:
        `tokens`; `nll` and `perplexity`, exp of it; `agreement`: the share of tokens where model and teacher find the
        same token the most likely; `kl`: KL(teacher || model).
    """
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        kept = kept_positions(batch["labels"])
        with limited(model, tokens) if tokens else nullcontext():
            ours = kept.select(model.model(**model_inputs(batch), use_cache=False).last_hidden_state)
        theirs = kept.select(teacher.model(**model_inputs(batch), use_cache=False).last_hidden_state)
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
