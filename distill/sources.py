"""From the `[data]` table to training data."""

from typing import Any

from transformers import PreTrainedModel

from distill.config import DataConfig
from distill.teacher import Source


def build_source(data: DataConfig, teacher: PreTrainedModel, tokenizer: Any, seed: int) -> Source:
    """The training data of a stage, for a teacher whose config is laid out as Qwen2.5-VL's is."""
    from distill.data import Processor, TaskStream

    processor = Processor.from_config(teacher.config, tokenizer)
    return TaskStream(processor, data.mixture, data.batch_size, data.turns, seed, options=data.options)
