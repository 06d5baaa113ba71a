"""From the `[data]` table to training data."""

import os
from typing import TYPE_CHECKING, Any, overload

from transformers import PreTrainedModel

from .config import RecordData, SetConfig, TaskData
from .teacher import Source

if TYPE_CHECKING:
    from .data.records import Records
    from .data.stream import RecordStream

_TURNS = 4  # questions about one picture or video, at most
NEEDLE_BATCH = 128  # frames of a batch of needles, about
WINDOW = 512  # records that are read, sorted by length and made batches of together
_SHORT = "Answer with a word or a short phrase."  # as ActivityNet-QA's own answers are
UNFIT = "they need a vision-language model laid out as Qwen2.5-VL, whose tokens divide frames of 64 x 128 pixels"


def fits_tasks(model: PreTrainedModel, tokenizer: Any) -> bool:
    """Whether the built-in tasks can be shown to a model."""
    from .data import Processor, generate

    try:
        Processor.from_config(model.config, tokenizer)(generate("needle", 1, 0, frames=(2, 2)))
    except (AttributeError, TypeError, ValueError):
        return False
    return True


@overload
def build_source(
    data: RecordData, path: str, teacher: PreTrainedModel, tokenizer: Any, seed: int, rank: int = 0, processes: int = 1
) -> "RecordStream": ...


@overload
def build_source(
    data: TaskData | RecordData, path: str, teacher: PreTrainedModel, tokenizer: Any, seed: int, rank: int = 0,
    processes: int = 1,
) -> Source: ...  # fmt: skip


def build_source(
    data: TaskData | RecordData, path: str, teacher: PreTrainedModel, tokenizer: Any, seed: int,
    rank: int = 0, processes: int = 1,
) -> Source:  # fmt: skip
    """The training data of a stage.

    Args:
        path: the teacher's folder, for its processor. Built-in tasks need a config laid out as Qwen2.5-VL's instead.
        rank, processes: data sets are split between the processes; built-in tasks are not, as a batch is a function
            of its number.

    Raises:
        FileNotFoundError, DataError: a data set is not there, or has fewer records than there are processes.
    """
    if isinstance(data, RecordData):
        return _stream(data, path, seed, rank, processes)
    from .data import Processor, TaskStream

    processor = Processor.from_config(teacher.config, tokenizer)
    long_video = {"frames": data.needle_frames, "batch_frames": NEEDLE_BATCH}
    options = {group: long_video for group in ("needle", "needles", "tracking")}
    return TaskStream(processor, data.mixture, data.batch_size, _TURNS, seed, options=options)


def _stream(data: RecordData, path: str, seed: int, rank: int, processes: int) -> "RecordStream":
    from linmu_models.chat import ChatProcessor

    from .data.records import DataError
    from .data.stream import Decoding, Packing, RecordStream, SetReader

    processor = ChatProcessor.load(path)
    if not processor.speaks and any(chosen.format != "text" for chosen in data.sets.values()):
        raise DataError(f"{path} has no chat template for conversations: put a chat_template.jinja there")
    decoding = Decoding(data.frames, data.fps, data.image_pixels, data.frame_pixels)
    packing = Packing(data.max_tokens, window=WINDOW, one_row=data.packing)
    readers = []
    for name, chosen in data.sets.items():
        records = _records(chosen, data, processor.tokenizer)
        readers.append(SetReader(name, records, processor, decoding, packing, seed, rank, processes))
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return RecordStream(processor, readers, data.weights(), seed, max(2, min(8, cores)), data.packing)


def _records(chosen: SetConfig, data: RecordData, tokenizer: Any) -> "Records":
    from .data import records

    match chosen.format:
        case "onevision":
            return records.ParquetRecords(chosen.files, chosen.folder)
        case "llava_video":
            return records.JsonRecords(chosen.files, chosen.folder)
        case "activitynet_qa":
            return records.ActivityNetRecords(chosen.files, chosen.folder, _SHORT)
        case "text":
            return records.TextRecords(chosen.files, tokenizer, data.max_tokens)
