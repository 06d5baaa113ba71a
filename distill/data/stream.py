"""Makes training batches of records: shuffled, packed by length, resumable to the bit. Broken records are counted.

A data set is read in windows. A window is a few shards, in an order that depends on the seed and the epoch alone.
Window w goes to process w mod P, so no two processes see the same record in an epoch. A window's records are sorted by
length and cut into batches that fill `max_tokens`, padded or in one row. These then come in random order. So a position
in a data set is two numbers, a window and a batch in it. Reading on from there gives what an unbroken run would have
read.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from linmu_models.chat import ChatProcessor, Conversation
from linmu_models.media import Clip, UnreadableError, fit, image_size, read_image, read_video, video_facts

from .records import DataError, Record, Records, UnusableError


@dataclass(frozen=True)
class Decoding:
    """How media become pixels."""

    frames: int = 64
    """Most frames of a video."""
    fps: float = 1.0
    """Frames that are taken of a second of video."""
    image_pixels: int | None = None
    frame_pixels: int | None = None
    """Larger images and frames are made smaller, to so many pixels."""

    def tokens(self, record: Record, processor: ChatProcessor) -> int:
        """The length of a record's sequence, by the headers of its media.

        Raises:
            UnreadableError, UnusableError: a medium is missing or corrupt, or the model cannot take it.
        """
        if record.media and not processor.takes_media:
            raise UnusableError("media for a text-only model")
        clips, total = [], 0
        for medium in record.media:
            if medium.is_video:
                facts = video_facts(medium.source)
                count: int | None = facts.count(self.frames, self.fps)
                size = fit(facts.height, facts.width, self.frame_pixels)
            else:
                count, size = None, fit(*image_size(medium.source), self.image_pixels)
            total += processor.media_tokens(count, *size) - 1
            # Only its kind and number of frames matter to the text around it.
            clips.append(Clip(np.empty((count or 1, 0, 0, 3), np.uint8), None if count is None else self.fps))
            if count and not processor.takes_videos:
                total -= count - 1
        return total + processor.text_tokens(Conversation(record.turns, tuple(clips), record.system))

    def __call__(self, record: Record) -> Conversation:
        """Decode a record's media; UnreadableError where that cannot be done."""
        clips = [
            read_video(medium.source, self.frames, self.fps, self.frame_pixels)
            if medium.is_video
            else read_image(medium.source, self.image_pixels)
            for medium in record.media
        ]
        return Conversation(record.turns, tuple(clips), record.system)


@dataclass(frozen=True)
class Packing:
    """How records become batches."""

    max_tokens: int = 8192
    """Of a batch, padding included; a longer record is left out."""
    max_samples: int = 64
    window: int = 512
    """Records that are read and sorted together."""
    one_row: bool = False
    """A batch is meant for one row without padding, rather than for rows of about one length."""


class SetReader:
    """One data set's batches for one process, from a position on."""

    def __init__(self, name: str, records: Records, processor: ChatProcessor, decoding: Decoding, packing: Packing,
                 seed: int, rank: int = 0, processes: int = 1) -> None:  # fmt: skip
        self.name, self._records, self._processor = name, records, processor
        self._decoding, self._packing, self._seed = decoding, packing, seed
        self._rank, self._processes = rank, processes
        size = max(1, min(round(packing.window / records.rows_per_shard), records.shards // processes))
        self._windows = -(-records.shards // size)

    def _shards(self, window: int) -> np.ndarray:
        epoch, number = divmod(window, self._windows)
        order = np.random.default_rng([crc32(self.name.encode()), self._seed, epoch]).permutation(self._records.shards)
        return np.array_split(order, self._windows)[number]

    def of_process(self, rank: int, processes: int) -> "SetReader":
        """The same data set, as another process reads it."""
        return SetReader(
            self.name, self._records, self._processor, self._decoding, self._packing, self._seed, rank, processes
        )

    def repeats(self, position: tuple[int, int]) -> bool:
        """Whether what was read up to a position has records that had been read before."""
        window, done = position
        return done > 0 and window * self._processes + self._rank >= self._windows

    def plan(self, window: int) -> tuple[list[list[Record]], Counter[str]]:
        """The batches of a window, undecoded, and how many records were read and left out, by reason."""
        counts: Counter[str] = Counter()
        usable: list[tuple[int, Record]] = []
        for shard in self._shards(window):
            for row in self._records.rows(int(shard)):
                counts["read"] += 1
                try:
                    record = self._records.parse(row)
                    texts = [record.system, *(text for turn in record.turns for text in turn)]
                    if any(self._processor.reserved.search(text) for text in texts):
                        raise UnusableError("special token in the text")
                    length = self._decoding.tokens(record, self._processor)
                    if length > self._packing.max_tokens:
                        raise UnusableError("longer than max_tokens")
                    if length < 2:
                        raise UnusableError("a single token, which nothing predicts")
                except (UnusableError, UnreadableError) as error:
                    counts[str(error)] += 1
                    continue
                usable.append((length, record))
        rng = np.random.default_rng([crc32(self.name.encode()), self._seed, window, 1])
        usable = [usable[i] for i in rng.permutation(len(usable))]
        usable.sort(key=lambda item: item[0])
        batches = self._one_row(usable) if self._packing.one_row else self._alike(usable)
        return [batches[i] for i in rng.permutation(len(batches))], counts

    def _alike(self, records: list[tuple[int, Record]]) -> list[list[Record]]:
        batches: list[list[Record]] = []
        for length, record in records:
            last = batches[-1] if batches else []
            if last and (len(last) + 1) * length <= self._packing.max_tokens and len(last) < self._packing.max_samples:
                last.append(record)
            else:
                batches.append([record])
        return batches

    def _one_row(self, records: list[tuple[int, Record]]) -> list[list[Record]]:
        """The longest first, each where there is room first."""
        batches: list[list[Record]] = []
        room: list[int] = []
        for length, record in reversed(records):
            for i, batch in enumerate(batches):
                if length <= room[i] and len(batch) < self._packing.max_samples:
                    break
            else:
                i = len(batches)
                batches.append([])
                room.append(self._packing.max_tokens)
            batches[i].append(record)
            room[i] -= length
        return batches

    def read(self, position: tuple[int, int], pool: ThreadPoolExecutor, ahead: int) -> Iterator["Prepared"]:
        """Batches from a position on, decoded by `pool`, `ahead` of them at a time. Never ends.

        Raises:
            DataError: no record of the set can be used, or it has fewer pieces than there are processes.
        """
        if self._records.shards < self._processes:
            pieces, processes = self._records.shards, self._processes
            raise DataError(f"data.sets.{self.name} has {pieces} pieces, fewer than the {processes} processes")
        useful, lost = position[0], Counter[str]()
        waiting: deque[tuple[list[Future[Conversation]], Counter[str], tuple[int, int]]] = deque()
        upcoming = self._upcoming(position, pool)
        while True:
            while len(waiting) <= ahead:
                batch, counts, after = next(upcoming)
                waiting.append(([pool.submit(self._decoding, record) for record in batch], counts, after))
            futures, counts, after = waiting.popleft()
            samples = []
            for future in futures:
                try:
                    samples.append(future.result())
                except UnreadableError as error:
                    counts[str(error)] += 1
            if samples:
                useful, lost = after[0], Counter()
            else:
                lost += counts
            if (after[0] - useful) * self._processes > self._windows:
                raise DataError(self._useless(lost))
            yield Prepared(samples, counts, after)

    def _useless(self, counts: Counter[str]) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        return f"data.sets.{self.name}: no record can be used ({reasons})"

    def _upcoming(
        self, position: tuple[int, int], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[list[Record], Counter[str], tuple[int, int]]]:
        window, done = position
        fruitless = 0
        plan = pool.submit(self.plan, window * self._processes + self._rank)
        while True:
            batches, counts = plan.result()
            plan = pool.submit(self.plan, (window + 1) * self._processes + self._rank)
            fruitless = 0 if batches else fruitless + 1
            if fruitless * self._processes >= self._windows:
                raise DataError(self._useless(counts))
            for i in range(done, len(batches)):
                # What planning left out is counted once, with the window's first batch.
                yield batches[i], counts if not i else Counter(), (window, i + 1)
            if not batches:
                yield [], counts, (window, 0)
            window, done = window + 1, 0


@dataclass
class Prepared:
    """A decoded batch, what was left out on the way to it, and the position after it."""

    samples: list[Conversation]
    counts: Counter[str]
    position: tuple[int, int]


class RecordStream:
    """Training batches from several data sets, to be read in order; `state_dict` says where it is.

    Batch i is of the set that the seed and i choose; each set has a position of its own.
    """

    def __init__(self, processor: ChatProcessor, readers: Sequence[SetReader], weights: Sequence[float], seed: int,
                 workers: int = 2, packing: bool = False) -> None:  # fmt: skip
        """`packing`: the samples of a batch are to be made one row, of which the readers know."""
        self.processor, self.packing = processor, packing
        self._readers = {reader.name: reader for reader in readers}
        self._weights = np.array(weights, dtype=np.float64) / sum(weights)
        self._seed, self._workers = seed, workers
        self._positions: dict[str, tuple[int, int]] = dict.fromkeys(self._readers, (0, 0))
        self._open: dict[str, Iterator[Prepared]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in self._readers}

    def samples(self, index: int) -> list[Conversation]:
        """The next batch of the set that `index` chooses."""
        names = list(self._readers)
        name = names[np.random.default_rng([self._seed, index]).choice(len(names), p=self._weights)]
        if self._pool is None:
            # One more than decode: a plan in the making must not keep pictures waiting.
            self._pool = ThreadPoolExecutor(self._workers + 1, thread_name_prefix="linmu-data")
        if name not in self._open:
            self._open[name] = self._readers[name].read(self._positions[name], self._pool, 2 * self._workers)
        while True:
            prepared = next(self._open[name])
            self._positions[name] = prepared.position
            self.counts[name].update(prepared.counts)
            if prepared.samples:
                self.counts[name]["used"] += len(prepared.samples)
                return prepared.samples

    def of_process(self, rank: int, processes: int) -> "RecordStream":
        """The same data sets from their start, as another process reads them."""
        readers = [reader.of_process(rank, processes) for reader in self._readers.values()]
        weights = self._weights.tolist()
        return RecordStream(self.processor, readers, weights, self._seed, self._workers, self.packing)

    def once(self, most: int) -> Iterator[list[Conversation]]:
        """The first batches, `most` of them, or fewer: until a set has been read through."""
        for index in range(most):
            samples = self.samples(index)
            if any(reader.repeats(self._positions[name]) for name, reader in self._readers.items()):
                break
            yield samples
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Where each set is, and what has been counted."""
        return {
            "positions": {name: list(position) for name, position in self._positions.items()},
            "counts": {name: dict(counts) for name, counts in self.counts.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was taken."""
        self.close()
        self._positions = {name: tuple(position) for name, position in state["positions"].items()}
        self.counts = {name: Counter(counts) for name, counts in state["counts"].items()}

    def close(self) -> None:
        """Stop reading ahead."""
        self._open.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
