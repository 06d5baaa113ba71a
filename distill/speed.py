"""Time to first token, decode speed and cache size against length."""

import time
from typing import Any, cast

import torch
from transformers import GenerationMixin, PreTrainedModel

from linmu_models.cache import cache_bytes, output_cache

from .config import EvaluationConfig
from .sources import fits_tasks

NEW_TOKENS = 16  # after the first, for the speed of decoding


def _inputs(model: PreTrainedModel, tokenizer: Any, length: int) -> dict[str, torch.Tensor]:
    """A video of about `length` visual tokens and a question; for a model that cannot be shown one of the built-in
    tasks' videos, so many tokens of text of no meaning."""
    if not fits_tasks(model, tokenizer):
        return text_prompt(model, tokenizer, length)
    from .data import Processor, generate

    rows, columns = generate("needle", 1, 0, frames=(4, 4))[0].cells.shape[1:]
    frames = max(2, length // (rows * columns))
    batch = Processor.from_config(model.config, tokenizer)(
        generate("needle", 1, 0, "val", frames=(frames, frames)), answers=False
    )
    return {name: value.to(model.device) for name, value in batch.items() if name != "labels"}


def text_prompt(model: PreTrainedModel, tokenizer: Any, length: int) -> dict[str, torch.Tensor]:
    """`length` tokens of text of no meaning."""
    words = torch.tensor(tokenizer.encode("of no meaning ", add_special_tokens=False))
    ids = words.repeat(-(-length // len(words)))[None, :length]
    return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


@torch.no_grad()
def measure_speed(
    models: dict[str, PreTrainedModel], tokenizer: Any, options: EvaluationConfig
) -> list[dict[str, Any]]:
    """One record for each model and length; interleaved, medians of three. The vision tower is not in the times."""
    from .teacher import shared_vision_features

    with shared_vision_features(*models.values()):
        return _measured(models, tokenizer, options)


def _measured(models: dict[str, PreTrainedModel], tokenizer: Any, options: EvaluationConfig) -> list[dict[str, Any]]:
    rows = []
    for length in options.speed_lengths:
        inputs = _inputs(next(iter(models.values())), tokenizer, length)
        common = dict(do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=tokenizer.pad_token_id)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        sizes = {}
        for model in models.values():
            cast(GenerationMixin, model).generate(**inputs, max_new_tokens=2, **common)
        for _ in range(3):
            for name, model in models.items():
                marks: list[float] = []
                for count in (1, 1 + NEW_TOKENS):
                    began = time.perf_counter()
                    out = cast(GenerationMixin, model).generate(
                        **inputs, max_new_tokens=count, min_new_tokens=count, return_dict_in_generate=True, **common
                    )
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    marks.append(time.perf_counter() - began)
                times[name].append((marks[0], marks[1] - marks[0]))
                sizes[name] = cache_bytes(output_cache(out))
        for name, measured in times.items():
            first, rest = (sorted(values)[1] for values in zip(*measured, strict=True))
            rows.append(
                {"model": name, "tokens": inputs["input_ids"].shape[1], "ttft_s": first,
                 "tokens_per_second": NEW_TOKENS / max(rest, 1e-9), "cache_bytes": sizes[name]}
            )  # fmt: skip
    return rows
