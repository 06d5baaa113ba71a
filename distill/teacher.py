"""The frozen teacher: its weights, its features of pixels, and its own answers."""

import dataclasses
import functools
import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationMixin, PreTrainedModel

from linmu_models.chat import end_tokens, to_model
from linmu_models.generate import load_model
from linmu_models.loading import told

from .clock import spent
from .files import say
from .losses import IGNORE, Head, Kept
from .parallel import from_first

Batch = dict[str, Tensor]


class Medium(NamedTuple):
    """The names that transformers has for one kind of medium.

    Attributes:
        features: the model's method that runs the vision tower.
        pixels: what it is given.
        grid: the sizes of it, where the model takes them as a grid.
    """

    features: str
    pixels: str
    grid: str


MEDIA = (
    Medium("get_image_features", "pixel_values", "image_grid_thw"),
    Medium("get_video_features", "pixel_values_videos", "video_grid_thw"),
)


class Source(Protocol):
    """Training data: batch `step` is a function of `step` alone, or the source is a `Stream`.

    A sample is a dataclass with `turns`, a tuple of (question, answer); the question of plain text is empty.
    `processor(samples)` makes what the model takes, padded on the right, and `labels`: -100 outside the answers; each
    answer has the token that ends it. Where the source has `packing`, which is true, they are then made one row.
    """

    @property
    def processor(self) -> Callable[[Sequence[Any]], Batch]:
        """Makes a batch of samples."""
        ...

    def samples(self, step: int) -> list[Any]:
        """The samples of batch `step`."""
        ...


@runtime_checkable
class Stream(Protocol):
    """A `Source` whose batches must be asked for in order, and that can go on from where it was."""

    counts: dict[str, Counter[str]]
    """For each data set: records that were `read`, `used`, and left out, by reason."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there."""
        ...


def load_teacher(path: str, dtype: str) -> tuple[PreTrainedModel, Any]:
    """A frozen model in evaluation mode, and its tokenizer; LinMU students are known here too.

    Args:
        dtype: "float32", "bfloat16", "float16", or "auto" for the one its configuration names.
    """
    return load_model(path, dtype).eval().requires_grad_(False), load_tokenizer(path)


def load_tokenizer(path: str) -> Any:
    """A model's tokenizer."""
    with told(path):
        return AutoTokenizer.from_pretrained(path)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, types and bytes of all parameters and buffers that are saved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def shared_vision_features(*models: PreTrainedModel) -> Iterator[None]:
    """While open, models with the same frozen vision tower encode a batch's pixels once between them; afterwards they
    are as they were, and nothing of the last batch is kept."""
    patched: list[tuple[nn.Module, str, Any]] = []
    last: dict[str, tuple[Tensor, str, Any]] = {}

    def share(core: nn.Module, name: str, argument: str) -> None:
        original = getattr(core, name)

        @functools.wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            pixels = args[0] if args else kwargs[argument]
            options = repr({key: value for key, value in kwargs.items() if not isinstance(value, Tensor)})
            if name not in last or last[name][0] is not pixels or last[name][1] != options:
                last.pop(name, None)  # Else two batches' features would live while the tower runs.
                with torch.no_grad():
                    last[name] = (pixels, options, original(*args, **kwargs))
            return last[name][2]

        patched.append((core, name, vars(core).get(name)))
        setattr(core, name, features)

    try:
        for model in models:
            for medium in MEDIA:
                if hasattr(model.model, medium.features):
                    share(model.model, medium.features, medium.pixels)
        yield
    finally:
        for core, name, before in reversed(patched):
            if before is None:
                delattr(core, name)
            else:
                setattr(core, name, before)
        last.clear()


@spent("teacher")
@torch.no_grad()
def predicts_targets(states: Tensor, head: Head, kept: Kept, rows: int, chunk_size: int = 1024) -> Tensor:
    """`(rows,)` bool: samples at which greedy decoding would give the labels, token by token.

    Args:
        states: (n, D): the model's hidden states at the kept positions, seen while the labels were its input.
    """
    right = torch.ones(rows, dtype=torch.bool, device=states.device)
    for start in range(0, len(kept), chunk_size):
        part = slice(start, start + chunk_size)
        wrong = head(states[part]).argmax(-1) != kept.targets[part]
        right[kept.samples[part][wrong]] = False
    return right


def _digest(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _digest(digest, getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} of".encode())
        for item in value:
            _digest(digest, item)
    else:
        digest.update(repr(value).encode())


class AnswerCache:
    """The teacher's answers on disk, by content: teacher, pictures and questions decide, not where a sample stood."""

    def __init__(self, path: Path, teacher: str) -> None:
        """Open, or make, the file; `teacher` is the teacher's fingerprint. All processes call this."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._teacher, self._path = teacher, path
        # Before the others open it, which else would delete what the first has made anew.
        from_first(self._make_whole)
        with self._usable():
            self._db = self._opened(self._path)

    def _make_whole(self) -> None:
        path = self._path
        try:
            with self._usable():
                db = self._opened(path)
                if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                    raise sqlite3.DatabaseError(found)
                db.close()
        except sqlite3.DatabaseError as error:
            say(f"{path} is damaged and made anew ({error})")
            for old in (path, *(path.with_name(path.name + end) for end in ("-journal", "-wal", "-shm"))):
                old.unlink(missing_ok=True)
            with self._usable():
                self._opened(path).close()

    @staticmethod
    def _opened(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=60, isolation_level=None)
        db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answers TEXT NOT NULL)")
        return db

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Within this, a file that is locked, or that may not be written, or a disk that is full, is an OSError."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{self._path} cannot be used: {error}") from error

    def key(self, sample: Any, max_new_tokens: int) -> str:
        """What identifies a sample to a teacher."""
        digest = hashlib.sha256(f"{self._teacher} {max_new_tokens}".encode())
        for field in dataclasses.fields(sample):
            value = getattr(sample, field.name)
            if field.name == "turns":
                value = [question for question, _ in value]
            digest.update(field.name.encode())
            _digest(digest, value)
        return digest.hexdigest()

    def get(self, key: str) -> list[str | None] | None:
        """The answers, one for each turn; None where there is no entry."""
        with self._usable():
            row = self._db.execute("SELECT answers FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answers: list[str | None]) -> None:
        """Add an entry."""
        with self._usable():
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answers)))

    def __len__(self) -> int:
        with self._usable():
            return int(self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])


def model_inputs(batch: Batch) -> Batch:
    """The part of a batch that a model's forward pass takes."""
    return {name: value for name, value in batch.items() if name != "labels"}


def prompts(batch: Batch, pad_token_id: int) -> Batch:
    """Cut each row of a batch before its last answer and pad it on the left, for generation."""
    labels, mask = batch["labels"], batch["attention_mask"]
    lengths = []
    for row in (labels != IGNORE).tolist():
        end = len(row) - 1 - row[::-1].index(True)
        while end > 0 and row[end - 1]:
            end -= 1
        lengths.append(end)
    longest = max(lengths)
    out = model_inputs(batch)
    for name, value in batch.items():
        if name != "labels" and value.shape == labels.shape:
            fill = pad_token_id if name == "input_ids" else 0
            cut = value.new_full((len(lengths), longest), fill)
            for i, length in enumerate(lengths):
                cut[i, longest - length :] = value[i, :length]
            out[name] = cut
    if not bool(mask.any(1).all()):
        raise ValueError("prompts: attention_mask must keep a token in every row")
    return out


@spent("teacher")
@torch.no_grad()
def own_answers(
    model: PreTrainedModel, tokenizer: Any, source: Source, samples: list[Any], max_new_tokens: int
) -> list[list[str | None]]:
    """y~ = Decode(f_T, x) of Eq. 8: greedy answers to every turn, each with the model's earlier answers before it.

    None where no token that ends an answer came within `max_new_tokens`, and for the turns after it.
    """
    answers: list[list[str | None]] = [[] for _ in samples]
    # As a chat template begins an answer, where the source knows of one; else cut before a whole answer.
    ask = getattr(source.processor, "prompts", None)
    unsaid = "" if ask is None else None
    for turn in range(max(len(sample.turns) for sample in samples)):
        asked = [i for i, s in enumerate(samples) if turn < len(s.turns) and None not in answers[i]]
        if not asked:
            break
        so_far = [
            dataclasses.replace(
                samples[i],
                turns=tuple(
                    (question, said)
                    for (question, _), said in zip(samples[i].turns, [*answers[i], unsaid], strict=False)
                ),
            )
            for i in asked
        ]
        batch = prompts(source.processor(so_far), tokenizer.pad_token_id) if ask is None else ask(so_far)
        batch = to_model(batch, model)
        start, ends = batch["input_ids"].shape[1], end_tokens(model.generation_config, tokenizer)
        out = cast(GenerationMixin, model).generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
        )  # fmt: skip
        for i, row in zip(asked, out[:, start:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in ends), None)
            answers[i].append(None if end is None else tokenizer.decode(row[:end], skip_special_tokens=True))
    return [given + [None] * (len(s.turns) - len(given)) for given, s in zip(answers, samples, strict=True)]


@dataclasses.dataclass
class Transcripts:
    """The teacher's transcripts of samples, from the cache or decoded now."""

    model: PreTrainedModel
    tokenizer: Any
    source: Source
    cache: AnswerCache
    max_new_tokens: int
    unfinished: int = 0
    """Samples whose answer did not end in time; they are left out of L_seq."""

    def known(self, samples: list[Any]) -> list[list[str | None] | None]:
        """For each sample the teacher's answers, None in the place of one that did not end in time; None: not decoded
        yet."""
        return [self.cache.get(self.cache.key(sample, self.max_new_tokens)) for sample in samples]

    def lack(self, samples: list[Any]) -> bool:
        """Whether the teacher's answer to one of these, which asks something, is not decoded yet."""
        asking = [sample for sample in samples if any(question for question, _ in sample.turns)]
        return any(answers is None for answers in self.known(asking))

    def __call__(self, samples: list[Any]) -> list[Any]:
        """Samples with the teacher's answers in place of the true ones; None for those with an unfinished answer."""
        known = self.known(samples)
        if missing := [i for i, answers in enumerate(known) if answers is None]:
            wanted = [samples[i] for i in missing]
            decoded = own_answers(self.model, self.tokenizer, self.source, wanted, self.max_new_tokens)
            for i, said in zip(missing, decoded, strict=True):
                known[i] = said
                self.cache.put(self.cache.key(samples[i], self.max_new_tokens), said)
        out: list[Any] = []
        for sample, answers in zip(samples, known, strict=True):
            if answers is None or None in answers:
                self.unfinished += 1
                out.append(None)
                continue
            turns = tuple((question, said) for (question, _), said in zip(sample.turns, answers, strict=True))
            out.append(dataclasses.replace(sample, turns=turns))
        return out
