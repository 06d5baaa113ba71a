"""Seeded task groups on real glyphs and handwritten digits, and their way into tensors."""

from distill.data.assets import CLASSES, SPLITS
from distill.data.processor import IGNORE, Batch, Processor, TaskStream
from distill.data.tasks import GROUPS, Sample, generate
from distill.data.tokenizer import build_tokenizer

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
