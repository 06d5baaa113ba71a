"""Reads published data sets as records. Their images and videos stay undecoded until their turn comes."""

import glob
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from linmu_models.chat import SLOT
from linmu_models.media import Source

_PLACEHOLDER = re.compile(r"<image>|<video>")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_VIDEO_FILES = ("mp4", "mkv", "webm")


class DataError(RuntimeError):
    """There is no data to train on; the text says where none was found."""


class UnusableError(ValueError):
    """A record that cannot be used; the text is a short, countable reason."""


@dataclass(frozen=True)
class Medium:
    """An image or a video, encoded."""

    source: Source
    """Bytes, or a path."""
    is_video: bool


@dataclass(frozen=True)
class Record:
    """A conversation whose media are not decoded."""

    turns: tuple[tuple[str, str], ...]
    """As of `linmu_models.chat.Conversation`."""
    media: tuple[Medium, ...] = ()
    system: str = ""


class Records(Protocol):
    """A data set in shards that can be read in any order."""

    shards: int
    rows_per_shard: int
    """About; of the first shard."""

    def rows(self, shard: int) -> Iterator[Any]:
        """The raw rows of a shard, always the same."""
        ...

    def parse(self, row: Any) -> Record:
        """A row as a record; UnusableError where it is none."""
        ...


def find_files(patterns: Sequence[str]) -> list[str]:
    """Files by glob patterns (`**` for any depth), sorted.

    Raises:
        FileNotFoundError: a pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
        if not matches:
            raise FileNotFoundError(f"no file matches {pattern}")
        found.update(matches)
    return sorted(found)


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Where a file as a whole cannot be read, say which."""
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    try:
        yield
    except (DatasetGenerationError, ArrowException, ValueError, StopIteration) as error:
        raise DataError(f"{file}: {error.__cause__ or error}") from error


def _begins_with_objects(file: str) -> bool:
    """JSON that begins with something else can take the whole process with it (datasets 5.2)."""
    with Path(file).open(encoding="utf-8-sig") as opened:
        begin = opened.read(1 << 16).lstrip()
    return begin.removeprefix("[").lstrip().startswith("{")


def _values(file: str) -> list[Any]:
    """What a list of JSON, or lines of it, hold; a line that is none stays text. ValueError where nothing is an
    object."""
    text = Path(file).read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = [_value(line) for line in text.splitlines() if line.strip()]
        if found and isinstance(found[0], str) and not text.lstrip().startswith(("{", '"')):
            raise ValueError(str(error)) from error  # a list that is cut
    found = found if isinstance(found, list) else [found]
    if not any(isinstance(value, dict) for value in found):
        raise ValueError(f"must be objects, or a list of them, got {text[:20]!r}")
    return found


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _words(text: Any) -> str:
    """Text without stray slots; UnusableError where it is none, or is of code points that no tokenizer takes."""
    if not isinstance(text, str):
        raise UnusableError("record whose text is none")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableError("record whose text is none") from error
    return text.replace(SLOT, "")


def _turns(messages: Any) -> tuple[tuple[tuple[str, str], ...], str]:
    """(question, answer) pairs and the system prompt of a list of messages, in LLaVA's words or OpenAI's."""
    if not isinstance(messages, list) or not messages:
        raise UnusableError("record without a conversation")
    turns, system, question = [], "", None
    for message in messages:
        speaker = (message.get("from") or message.get("role")) if isinstance(message, dict) else None
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise UnusableError("record with an unknown speaker")
        text = _words(message.get("value") or message.get("content") or "")
        if role == "system":
            system = text
        elif role == "user" and question is None:
            question = text
        elif role == "assistant" and question is not None:
            if not text.strip():
                raise UnusableError("empty answer")
            turns.append((question, text.strip()))
            question = None
        else:
            raise UnusableError("record whose speakers do not take turns")
    if question is not None or not turns:
        raise UnusableError("empty answer")
    return tuple(turns), system


def conversation(messages: Any, media: Sequence[Medium]) -> Record:
    """A record of LLaVA's kind. `<image>` and `<video>` in the questions become slots; without any, media come first.

    Raises:
        UnusableError: no conversation, an empty answer, or not as many placeholders as media.
    """
    turns, system = _turns(messages)
    slots = sum(len(_PLACEHOLDER.findall(question)) for question, _ in turns)
    if not slots:
        (question, answer), *rest = turns
        turns = ((SLOT * len(media) + question, answer), *rest)
    elif slots == len(media):
        turns = tuple((_PLACEHOLDER.sub(SLOT, question), answer) for question, answer in turns)
    else:
        raise UnusableError("placeholders and media differ in number")
    if not any(question.replace(SLOT, "").strip() for question, _ in turns) and not media:
        raise UnusableError("empty question")
    return Record(turns, tuple(media), system)


def _media(value: Any, folder: Path | None, is_video: bool) -> Iterator[Medium]:
    """What an `image`, `images` or `video` column holds: a path, bytes, `{bytes, path}`, or a list of these."""
    if value is None:
        return
    for item in value if isinstance(value, (list, tuple)) else [value]:
        source = item
        if isinstance(item, dict):
            source = item.get("bytes") or item.get("path")
        if isinstance(source, str) and folder is not None:
            source = folder / source
        if not source or not isinstance(source, (str, bytes, Path)):
            raise UnusableError("video missing" if is_video else "image missing")
        yield Medium(source, is_video)


def _check_object(row: Any) -> None:
    if not isinstance(row, dict):
        raise UnusableError("record that is no object")


class _Conversations:
    """Rows with `conversations` (or `messages`) and `image`, `images`, `video` or `videos`."""

    folder: Path | None

    def parse(self, row: Any) -> Record:
        _check_object(row)
        media = [
            medium
            for column in ("image", "images", "video", "videos")
            for medium in _media(row.get(column), self.folder, column.startswith("video"))
        ]
        return conversation(row.get("conversations") or row.get("messages"), media)


class ParquetRecords(_Conversations):
    """LLaVA-OneVision's format: parquet with `image` (bytes) and `conversations`. A shard is a row group, streamed."""

    def __init__(self, patterns: Sequence[str], folder: str | None) -> None:
        import pyarrow.parquet
        from datasets import load_dataset

        files = find_files(patterns)
        self.folder = None if folder is None else Path(folder)
        counts = []
        for file in files:
            with _naming(file):
                facts = pyarrow.parquet.read_metadata(file)
                counts += [facts.row_group(i).num_rows for i in range(facts.num_row_groups)]
        if not any(counts):
            raise DataError(f"{', '.join(files)}: no rows")
        stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
        self._stream = stream.decode(False).reshard()
        self.shards = self._stream.num_shards
        self.rows_per_shard = max(1, counts[0])

    def rows(self, shard: int) -> Iterator[Any]:
        # All of it at once: a reader that is left in the middle keeps its threads.
        return iter(list(self._stream.shard(num_shards=self.shards, index=shard)))


class JsonRecords(_Conversations):
    """LLaVA-Video-178K's format: JSON (or JSON lines) with `conversations` and a `video` file. A shard is a row."""

    rows_per_shard = 1
    _USED = frozenset({"conversations", "messages", "image", "images", "video", "videos"})

    def __init__(self, patterns: Sequence[str], folder: str | None) -> None:
        from datasets import concatenate_datasets

        self.folder = Path(folder or ".")
        # File by file: columns that are not used, such as ids, have other types in other files.
        parts: list[Any] = [self._rows_of(file) for file in find_files(patterns)]
        alike = not any(isinstance(part, list) or part.features != parts[0].features for part in parts)
        self._parts = [concatenate_datasets(parts)] if alike else parts
        self._starts = [sum(map(len, self._parts[:i])) for i in range(len(self._parts))]
        self.shards = sum(map(len, self._parts))

    def _rows_of(self, file: str) -> Any:
        """On disk; in memory where the records have no types in common, as a bad one among them has not."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError
        from pyarrow import ArrowException

        with _naming(file):
            # What it cannot load it also logs, as an error.
            logger = logging.getLogger("datasets.packaged_modules.json.json")
            silent, logger.disabled = logger.disabled, True
            try:
                part = load_dataset("json", data_files=[file], split="train") if _begins_with_objects(file) else None
            except (DatasetGenerationError, ArrowException, ValueError, StopIteration):
                part = None
            finally:
                logger.disabled = silent
            if part is None:
                return [
                    {k: v for k, v in row.items() if k in self._USED} if isinstance(row, dict) else row
                    for row in _values(file)
                ]
        return part.remove_columns([name for name in part.column_names if name not in self._USED])

    def rows(self, shard: int) -> Iterator[Any]:
        part = max(i for i, start in enumerate(self._starts) if start <= shard)
        yield self._parts[part][shard - self._starts[part]]


class ActivityNetRecords:
    """ActivityNet-QA's format: `train_q.json` and `train_a.json`, by `question_id`; videos `v_<name>.mp4`, ..."""

    rows_per_shard = 1

    def __init__(self, patterns: Sequence[str], folder: str | None, instruction: str = "") -> None:
        self.folder, self._instruction = Path(folder or "."), instruction
        questions: list[Any] = []
        self._answers: dict[str, Any] = {}
        for file in find_files(patterns):
            with _naming(file):
                rows = _values(file)
            for row in rows:
                if not isinstance(row, dict) or "question" in row:
                    questions.append(row)
                else:
                    self._answers[str(row.get("question_id"))] = row.get("answer")
        self._questions = questions
        self.shards = len(questions)

    def rows(self, shard: int) -> Iterator[Any]:
        yield self._questions[shard]

    def parse(self, row: Any) -> Record:
        _check_object(row)
        answer = self._answers.get(str(row.get("question_id"))) or ""
        answer = _words(str(answer) if isinstance(answer, (int, float)) else answer).strip()
        if not answer:
            raise UnusableError("empty answer")
        question = _words(row.get("question") or "").strip()
        if not question:
            raise UnusableError("empty question")
        name = row.get("video_name") or ""
        if not isinstance(name, str):
            raise UnusableError("video missing")
        paths = [self.folder / f"{start}{name}.{ending}" for start in ("v_", "") for ending in _VIDEO_FILES]
        found = next((path for path in paths if path.exists()), paths[0])
        text = f"{SLOT}\n{question}" + (f"\n{self._instruction}" if self._instruction else "")
        return Record(((text, answer),), (Medium(found, True),))


class TextRecords:
    """UTF-8 files, cut between paragraphs into pieces of at most `max_length` tokens. A shard is a piece."""

    rows_per_shard = 1

    def __init__(self, patterns: Sequence[str], tokenizer: Any, max_length: int) -> None:
        self._pieces: list[str] = []
        for file in find_files(patterns):
            with _naming(file):
                text = Path(file).read_text(encoding="utf-8")
            self._pieces += list(_pieces(text, tokenizer, max_length))
        self.shards = len(self._pieces)

    def rows(self, shard: int) -> Iterator[Any]:
        yield self._pieces[shard]

    def parse(self, row: Any) -> Record:
        return Record((("", row),))


def _pieces(text: str, tokenizer: Any, max_length: int) -> Iterator[str]:
    held, length = "", 0
    for part in _short_paragraphs(text, tokenizer, max_length):
        size = len(tokenizer.encode(part, add_special_tokens=False))
        # Joined text has about as many tokens as its parts; what the joints may add is kept free.
        if held and length + size + 2 > max_length:
            yield held
            held, length = "", 0
        held, length = held + part, length + size + 1
    if held.strip():
        yield held


def _short_paragraphs(text: str, tokenizer: Any, max_length: int) -> Iterable[str]:
    for paragraph in re.findall(r".+?(?:\n\s*\n|\Z)", text, re.DOTALL):
        if not paragraph.strip():
            continue
        if len(tokenizer.encode(paragraph, add_special_tokens=False)) + 2 <= max_length:
            yield paragraph
            continue
        held, length = "", 0
        for word in re.findall(r"\S+\s*", paragraph):
            size = len(tokenizer.encode(word, add_special_tokens=False))
            if held and length + size + 2 > max_length:
                yield held
                held, length = "", 0
            held, length = held + word, length + size
        yield held
