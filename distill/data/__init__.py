"""The built-in tasks, drawn from a seed on real glyphs and handwritten digits, and what makes tensors of them."""

from .assets import CLASSES, SPLITS
from .drawing import Sample
from .processor import IGNORE, Batch, Processor, TaskStream
from .tasks import GROUPS, LONG_GROUPS, TASKS, draw, generate, task_options
from .tokenizer import build_tokenizer

__all__ = [
    "CLASSES",
    "GROUPS",
    "IGNORE",
    "LONG_GROUPS",
    "SPLITS",
    "TASKS",
    "Batch",
    "Processor",
    "Sample",
    "TaskStream",
    "build_tokenizer",
    "draw",
    "generate",
    "task_options",
]
