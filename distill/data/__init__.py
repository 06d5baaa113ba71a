"""The built-in tasks, drawn from a seed on real glyphs and handwritten digits, and what makes tensors of them."""

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
