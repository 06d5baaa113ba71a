"""Seeded task groups on real glyphs and handwritten digits, and their way into tensors."""

from .assets import CLASSES, SPLITS
from .processor import IGNORE, Batch, Processor, TaskStream
from .tasks import GROUPS, Sample, generate
from .tokenizer import build_tokenizer

__all__ = [
    "CLASSES",
    "GROUPS",
    "IGNORE",
    "SPLITS",
    "Batch",
    "Processor",
    "Sample",
    "TaskStream",
    "build_tokenizer",
    "generate",
]
