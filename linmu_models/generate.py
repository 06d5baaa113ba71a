"""What `linmu convert` and `linmu generate` do with folders, and options that make decoding fast."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CompileConfig, GenerationMixin, TextStreamer

from linmu_ops.nn import EXACT, ExactConfig, MMATEConfig

from .adapters import nvila as _nvila  # noqa: F401  registers, with all families
from .adapters.generic import LinmuGeneric, register_lazily
from .cache import cache_bytes, output_cache
from .chat import ChatProcessor, to_model
from .config import auto_class, parse_options
from .conversion import check_generic, convert, family_of
from .efficientnet_lite import EfficientNetLiteModel as _EfficientNetLiteModel  # noqa: F401  registers
from .int8 import int8_weights, is_int8
from .loading import check_weights, told, without_report
from .media import Clip, UnreadableError, read_image, read_video
from .modeling import LinmuModel
from .report import TransferReport
from .resume import keep_conversation, reopen_conversation
from .saving import whole_folder
from .snapshot import check_folder
from .words import shown

# Everything a processor or tokenizer is loaded from, beside the weights and the model's own configuration.
PROCESSOR_FILES = (
    "*processor_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "normalizer.json", "tekken.json", "audio_tokenizer*", "chat_template*", "additional_chat_templates/*", "*.model",
    "*.spm", "*.tiktoken", "bpe.codes", "tokenization*.py", "processing*.py", "*_processing*.py",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", "float64")
WEIGHTS = ("float", "int8")

register_lazily()


def convert_folder(
    teacher: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: MMATEConfig | ExactConfig | Mapping[str, Any] = EXACT,
    keep_attention: Iterable[int] = (),
    dtype: str = "auto",
) -> TransferReport:
    """Load a teacher, make it linear, and save it with the teacher's processor.

    Args:
        teacher: folder of a saved model, or its name on the hub.
        out: folder to make.
        config, keep_attention: as in `convert`.
        dtype: "auto" (as saved), or one of `DTYPES`.

    Raises:
        ValueError: the family cannot be converted, or an option is unknown.
        OSError: there is no such model.
    """
    _check_dtype(dtype)
    if not _path("convert: out", out) or (Path(out).exists() and not Path(out).is_dir()):
        raise ValueError(f"convert: out must be a folder, or the name of a new one, got {os.fspath(out)!r}")
    folder = _local(teacher)
    if Path(out).resolve() == folder.resolve():
        raise ValueError(f"convert: out must be another folder than the teacher's, got {out}")
    saved = _config(folder)
    if issubclass(family_of(saved.model_type), LinmuGeneric):
        check_generic(saved)
    options = parse_options(config)  # before the weights are read
    with whole_folder(out) as made:
        student = convert(load_model(folder, dtype), options, keep_attention)
        student.save_pretrained(made)
        copy_processor(folder, made)
    return student.linmu_report


def copy_processor(model: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Copy the files of a model's processor and tokenizer; the model is a folder or a name on the hub.

    They are not loaded, for some processors can only be loaded where torchvision is.
    """
    folder = _local(model, PROCESSOR_FILES)
    for file in {file for pattern in PROCESSOR_FILES for file in folder.glob(pattern) if file.is_file()}:
        copied = Path(out) / file.relative_to(folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copied)


def _local(model: str | os.PathLike[str], patterns: Sequence[str] | None = None) -> Path:
    """The folder of a model, fetched from the hub where it is a name; all files, or those that match `patterns`."""
    check_model_name(model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    with _of_hub(model):
        return Path(snapshot_download(str(model), allow_patterns=None if patterns is None else list(patterns)))


@contextlib.contextmanager
def _of_hub(model: str | os.PathLike[str]) -> Iterator[None]:
    """Name a model that is not here, and that the hub does not give: not there, not reached, not allowed."""
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(model).is_dir():
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{model}: no folder of this name is here, and the hub does not give it: {reason}") from error


def load_model(folder: str | os.PathLike[str], dtype: str = "auto") -> Any:
    """A saved model, linear or not.

    Raises:
        ValueError: a file of it is damaged, or not what it must be; its weights are more than tensors, and no code of
            theirs is run; a linear model's weights are not those of its config.json. OSError: it is not there.
    """
    config = _config(folder)
    with told(os.fspath(folder)), without_report():
        model, found = auto_class(config).from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    check_weights(os.fspath(folder), found, isinstance(model, LinmuModel))
    return model


def _config(folder: str | os.PathLike[str]) -> Any:
    check_model_name(folder)
    with told(os.fspath(folder)), _of_hub(folder):
        return AutoConfig.from_pretrained(folder)


def check_model_name(model: str | os.PathLike[str]) -> None:
    """Raise ValueError where `model` is neither a folder nor the name of a model on the hub, TypeError where it is no
    path at all.

    transformers would look for it on the hub, and say so.
    """
    name = _path("a model", model)
    if os.path.exists(name) and not os.path.isdir(name):
        raise ValueError(f"a model must be a folder, got the file {name!r}")
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) and not name.startswith(".")
    if not name or not (on_hub or Path(name).is_dir()):
        raise ValueError(f"a model must be a folder, or a name on the hub, got {name!r}")


def _path(what: str, value: str | os.PathLike[str]) -> str:
    """A path as text; TypeError where it is none."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(path := os.fspath(value), str):
        raise TypeError(f"{what} must be a path, got {value!r}")
    if "\0" in path:
        raise ValueError(f"{what} must be a path, got {path!r}")
    return path


def load(
    folder: str | os.PathLike[str], device: str | None = None, dtype: str = "auto", weights: str = "float"
) -> tuple[GenerationMixin, ChatProcessor]:
    """Load a saved model, linear or not, onto `device`, and the processor that prepares its inputs.

    Args:
        dtype: "auto" (as saved), or one of `DTYPES`.
        weights: "float" (of that dtype), or "int8": see `int8_weights`. That is for a CPU.

    Raises:
        ValueError, OSError: as `load_model` and `find_device`; the weights cannot be held so.
    """
    _check_dtype(dtype)
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be {' or '.join(WEIGHTS)}, got {weights!r}")
    check_model_name(folder)
    where = find_device(device)
    if weights == "int8" and where.type != "cpu":
        raise ValueError(f"weights must be float on {where.type}, got 'int8', which is for a CPU")
    model = load_model(folder, dtype).to(where).eval()
    processor = ChatProcessor.load(folder)
    return (int8_weights(model) if weights == "int8" else model), processor


def _check_dtype(dtype: str) -> None:
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")


def find_device(device: str | None) -> torch.device:
    """The device of that name. Without a name, a GPU if there is one, else the CPU.

    Raises:
        ValueError: the device is not there.
    """
    try:
        found = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, TypeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device must be one that is there, got {device}") from error
    if found.type == "meta":
        raise ValueError("device must be one that holds values, got meta")
    return found


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `generate_text` returns."""

    text: str
    prompt_tokens: int
    tokens: int
    first_token_seconds: float
    """Time from the tensors of the prompt to the first token: vision tower, prefill, one choice."""
    tokens_per_second: float | None
    """Speed after the first token; None where there is no other."""
    cache_bytes: int
    """Size of what was kept of prompt and answer: states, and keys and values of layers with attention."""


class _Clock(TextStreamer):
    """Hands on words as they come, and notes when the first and the last token did."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream, self.times = stream, [time.perf_counter()]

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.times[1:] = [self.times[1] if len(self.times) > 1 else time.perf_counter(), time.perf_counter()]
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stream is not None and text:
            self.stream(text)


def generate_text(
    model: Any,
    processor: ChatProcessor,
    prompt: str,
    images: Sequence[str | os.PathLike[str] | Clip] = (),
    videos: Sequence[str | os.PathLike[str] | Clip] = (),
    *,
    frames: int = 64,
    fps: float = 2.0,
    stream: Callable[[str], None] | None = None,
    load_state: str | os.PathLike[str] | None = None,
    save_state: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Answer:
    """Answer one prompt about images and videos.

    Args:
        model, processor: from `load`.
        prompt: the user's words. The processor's chat template takes them, where it has one.
        images, videos: paths, or what was read of them. They come before the words.
        frames, fps: a video is seen as `fps` frames a second, and as `frames` frames at most.
        stream: called with each piece of the answer as soon as it is there.
        load_state: a file of `save_state`, whose conversation the prompt goes on with. What it holds is not read again.
        save_state: a file to keep the conversation in, and the state after it. For LinMU models.
        options: of transformers' `generate`. There is one answer, so no beams.

    Raises:
        ValueError: beams are asked for; a picture or video cannot be read, or the model takes none; the file is not of
            this model, or damaged; there are pictures for a conversation that goes on.
        OSError: a file cannot be read or written.
    """
    for name, paths in (("images", images), ("videos", videos)):
        if isinstance(paths, (str, bytes, os.PathLike, Mapping)) or not isinstance(paths, Iterable):
            raise TypeError(f"generate: {name} must be a list of paths, got {paths!r}")
    if not isinstance(prompt, str):
        raise TypeError(f"generate: prompt must be text, got {type(prompt).__name__}")
    if not prompt and not images and not videos:
        raise ValueError("generate: prompt must not be empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"generate: prompt must be UTF-8, got {prompt!r}") from error
    media = []
    given: list[tuple[Any, Callable[[Any], Any]]] = [
        *((p, read_image) for p in images),
        *((p, partial(read_video, frames=frames, fps=fps)) for p in videos),
    ]
    for path, read in given:
        try:
            media.append(path if isinstance(path, Clip) else read(path))
        except UnreadableError as error:
            raise ValueError(f"generate: {shown(os.fspath(path))}: {error}") from error
    turns: list[tuple[str, str]] = []
    for name, path in (("load_state", load_state), ("save_state", save_state)):
        if path is not None and not isinstance(model, LinmuModel):
            raise ValueError(f"generate: {name} must be left out for other models than LinMU's, got {path}")
        if path is not None and is_int8(model):
            raise ValueError(f"generate: {name} must be left out with 8-bit weights, got {path}")
    if save_state is not None:  # an answer may take hours
        check_folder(save_state)
    if load_state is None:
        inputs = to_model(processor.ask(prompt, media), model)
    elif media:
        raise ValueError("generate: images and videos must be left out with load_state, whose conversation has its own")
    else:
        inputs, turns = reopen_conversation(load_state, model, processor, prompt)
    clock, prompt_tokens = _Clock(processor.tokenizer, stream), inputs["input_ids"].shape[1]
    out = model.generate(**inputs, **options, streamer=clock, return_dict_in_generate=True)
    began, first, last = clock.times
    new = out.sequences[0, prompt_tokens:]
    text = processor.tokenizer.decode(new, skip_special_tokens=True)
    if save_state is not None:
        keep_conversation(save_state, model, out, inputs, [*turns, (prompt, text)])
    return Answer(
        text,
        prompt_tokens,
        len(new),
        first - began,
        (len(new) - 1) / (last - first) if len(new) > 1 else None,
        0 if (cache := output_cache(out)) is None else cache_bytes(cache),
    )


def peak_memory() -> int:
    """Bytes: the most that this process has held, on the GPU where there is one, else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows has none
        import psutil

        return psutil.Process().memory_info().peak_wset
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fast_decode(**compile_options: Any) -> dict[str, Any]:
    """Options of `generate` that compile the step of one token, once: `generate(**inputs, **fast_decode())`.

    The state then keeps its place in memory, in transformers' static cache. The step is one graph that updates it
    there. On a GPU it is captured and replayed as a CUDA graph. The graph depends on the batch size and on whether rows
    are padded, but not on the length of prompt or answer. It serves later calls too. The tokens are those of a plain
    `generate`.

    transformers compiles greedy decoding and sampling; beams run as they are. Compiling takes tens of seconds. That
    pays on a GPU. On a CPU it pays only for small models, where the overhead of operators is a large part of the time.

    Args:
        compile_options: of transformers' `CompileConfig`, that is of `torch.compile`. The mode is "reduce-overhead" if
            left out.

    Raises:
        TypeError: there is no such option.
    """
    known = [field.name for field in dataclasses.fields(CompileConfig)]
    if unknown := [name for name in compile_options if name not in known]:
        raise TypeError(f"fast_decode: options must be of {', '.join(known)}, got {unknown[0]}")
    config = CompileConfig(**compile_options)
    compiles: Any = config
    compiles._compile_all_devices = True  # transformers would not compile on a CPU
    return {"cache_implementation": "static", "compile_config": config}
