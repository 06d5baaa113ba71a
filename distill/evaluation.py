"""Exact match on held-out samples, by greedy generation. All it needs of a model is `.generate` and its config."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import sqrt
from typing import Any, cast

import torch
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from linmu_models.modeling import LinmuModel

from .data import Processor, Sample, draw, generate

# Largest batch for which the longest inputs still fit a small machine, by visual tokens in all.
_VISUAL_TOKENS_A_BATCH = 8192
# Samples are drawn as they are asked; so many visual tokens of them at once are a gigabyte of pixels.
_DRAWN_AT_ONCE = 2**22
# A student takes a longer prompt in parts, so that its memory is that of a part.
_PROMPT_TOKENS = 4096


def wilson_interval(correct: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    p, spread = correct / n, z * z / n
    centre, half = p + spread / 2, z * sqrt(p * (1 - p) / n + spread / (4 * n))
    # Rounding may put an end that is 0 or 1 on the wrong side of p.
    return min(p, max(0.0, (centre - half) / (1 + spread))), max(p, min(1.0, (centre + half) / (1 + spread)))


@dataclass(frozen=True)
class Result:
    """Exact match on one group: the whole answer and the end-of-sequence token."""

    group: str
    split: str
    n: int
    correct: int
    seconds: float
    hits: tuple[bool, ...] = ()
    """Which samples were answered right, in their order, so that models can be compared sample by sample."""
    by_question: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each kind of question (its first word of three letters), right answers and how many there were."""
    depths: tuple[float | None, ...] = ()
    """Where what was asked lies in each sample, as `Sample.depth`."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `accuracy`."""
        return wilson_interval(self.correct, self.n)

    def by_depth(self, parts: int) -> list[tuple[int, int]]:
        """For each of so many equal parts of the input, how many answers about it were right and how many there
        were."""
        found = [(0, 0)] * parts
        for hit, depth in zip(self.hits, self.depths, strict=True):
            if depth is not None:
                at = min(int(depth * parts), parts - 1)
                found[at] = (found[at][0] + hit, found[at][1] + 1)
        return found

    def __str__(self) -> str:
        low, high = self.interval
        kinds = ", ".join(f"{kind} {right}/{n}" for kind, (right, n) in sorted(self.by_question.items()))
        return f"{self.group:<7}{self.split:<10}{self.accuracy:6.1%}  [{low:.1%}, {high:.1%}]  n={self.n}  ({kinds})"


@torch.no_grad()
def answer(
    model: PreTrainedModel, processor: Processor, samples: list[Sample], max_new_tokens: int, use_cache: bool = True
) -> list[str | None]:
    """Greedy answers to each sample's first question; None where no end-of-sequence token came."""
    batch = processor(samples, answers=False, padding_side="left").copy()
    del batch["labels"]
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    eos = processor.tokenizer.eos_token_id
    long = use_cache and isinstance(model, LinmuModel) and batch["input_ids"].shape[1] > _PROMPT_TOKENS
    out = cast(GenerationMixin, model).generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        prefill_chunk_size=_PROMPT_TOKENS if long else None,
        eos_token_id=eos,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    said = [row[: row.index(eos)] if eos in row else None for row in out[:, batch["input_ids"].shape[1] :].tolist()]
    return [None if row is None else cast(str, processor.tokenizer.decode(row)) for row in said]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: str,
    n: int = 200,
    seed: int = 0,
    *,
    split: str = "val",
    first: int = 0,
    batch_size: int = 64,
    use_cache: bool = True,
    told: Callable[[str], None] | None = None,
    **options: Any,
) -> Result:
    """Evaluate a model on `n` samples of a task group.

    Args:
        model: any model with `.generate` and a config laid out as Qwen2.5-VL's; a converted student as well.
        split: see `linmu_distill.data.generate`.
        first: so many samples before them are passed over: to ask in parts.
        batch_size: the most samples at once; long videos are batched less.
        use_cache: False makes `generate` run the whole sequence for each token, to check a student's cache.
        told: called before each batch with how far this is, in words.
        options: passed to the group's generator.

    Raises:
        TypeError: the model does not generate. ValueError: nothing is asked, or as `draw`.
    """
    if not hasattr(model, "generate"):
        raise TypeError(f"evaluate: model must be a transformers model that generates, got {type(model).__name__}")
    if n < 1:
        raise ValueError(f"evaluate: n must be at least 1, got {n}")
    processor = Processor.from_config(model.config, tokenizer)
    samples = islice(draw(group, seed, split, **options), first, first + n)
    was_training = model.training
    model.eval()
    right, asked, start = Counter[str](), Counter[str](), time.perf_counter()
    hits: list[bool] = []
    depths: list[float | None] = []
    for drawn in _drawn(samples):
        limit = 1 + max(len(tokenizer.encode(sample.turns[0][1], add_special_tokens=False)) for sample in drawn)
        visual = max(sample.cells.size for sample in drawn)
        step = max(1, min(batch_size, _VISUAL_TOKENS_A_BATCH // visual))
        for i in range(0, len(drawn), step):
            if told is not None:
                told(f"{len(hits):,} of {n:,} answered, {right.total():,} right; up to {visual:,} visual tokens each")
            part = drawn[i : i + step]
            for sample, said in zip(part, answer(model, processor, part, limit, use_cache), strict=True):
                question, expected = sample.turns[0]
                words = question.rstrip("?").split()
                kind = next((word for word in words if len(word) > 2), words[0])  # a key is no kind
                asked[kind] += 1
                hits.append(said == expected)
                depths.append(sample.depth)
                right[kind] += hits[-1]
    model.train(was_training)
    by_question = {kind: (right[kind], asked[kind]) for kind in asked}
    return Result(group, split, n, right.total(), time.perf_counter() - start, tuple(hits), by_question, tuple(depths))


def _drawn(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    """All of the samples in their order, about `_DRAWN_AT_ONCE` visual tokens at a time."""
    held: list[Sample] = []
    cells = 0
    for sample in samples:
        held.append(sample)
        cells += sample.cells.size
        if cells >= _DRAWN_AT_ONCE:
            yield held
            held, cells = [], 0
    if held:
        yield held


def blind_baseline(group: str, n: int = 200, seed: int = 0, *, split: str = "val", **options: Any) -> float:
    """Accuracy of the best answer that looks at the question only: for each question, its commonest training answer.

    Args:
        options: passed to the group's generator.
    """
    answers: dict[str, Counter[str]] = {}
    for sample in generate(group, 4000, seed, "train", **options):
        question, expected = sample.turns[0]
        answers.setdefault(question, Counter())[expected] += 1
    guesses = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    asked = [sample.turns[0] for sample in generate(group, n, seed, split, **options)]
    return sum(guesses.get(question) == expected for question, expected in asked) / n
