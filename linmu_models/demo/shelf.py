"""What is uploaded to the page: kept in one folder, bounded, and never by the name that it came with."""

from __future__ import annotations

import io
import secrets
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..media import Clip, UnreadableError, fit, image_size, read_image, read_video, video_facts

KEPT = 8  # uploads; the oldest goes when another one comes
AT_ONCE = 4  # uploads that are being received
SHOWN = 12  # frames of a clip in its preview
SECONDS = 600.0
FRAMES = 1024


class UploadError(ValueError):
    """A file that is not taken; the text says why, in one line."""


@dataclass(frozen=True)
class Example:
    """A picture or a clip that comes with the page, and a question about it."""

    title: str
    question: str
    clip: Clip


@dataclass(frozen=True)
class Item:
    """A picture or a clip that can be asked about."""

    id: str
    source: Path | Clip
    kind: str
    """"picture" or "clip"."""
    height: int
    width: int
    seconds: float | None = None
    """None for a picture, and where the frames are read already."""
    frames: int | None = None
    """How many, where they are read already."""
    preview: bytes = b""
    """A PNG."""

    def facts(self) -> dict[str, object]:
        """What the page is told of it."""
        return {
            "id": self.id, "kind": self.kind, "height": self.height, "width": self.width, "seconds": self.seconds,
            "frames": self.frames,
        }  # fmt: skip

    def read(self, frames: int, fps: float, max_pixels: int) -> Clip:
        """Its pixels: of a clip `fps` frames a second, `frames` at most; `max_pixels` in all.

        Raises:
            UnreadableError: it cannot be read.
        """
        if isinstance(self.source, Clip):
            return self.source
        if self.kind == "picture":
            return read_image(self.source, max_pixels)
        facts = video_facts(self.source)
        each = max(max_pixels // facts.count(frames, fps), 1)
        height, width = fit(facts.height, facts.width, each)  # a small frame is enlarged
        return read_video(self.source, min(frames, max(max_pixels // (height * width), 1)), fps, each)


class Shelf:
    """The files of one page.

    Args:
        folder: that they are kept in.
        max_bytes: of one file.
        max_pixels: that are read of a picture, or of all frames of a clip together.
        examples: what is there from the beginning.
    """

    def __init__(self, folder: Path, max_bytes: int, max_pixels: int, examples: Iterable[Example] = ()) -> None:
        self.folder, self.max_bytes, self.max_pixels = folder, max_bytes, max_pixels
        self.receiving = 0
        self._uploads: dict[str, Item] = {}
        self.named = {f"example-{i}": example for i, example in enumerate(examples)}
        self._examples = {name: _of_example(name, example) for name, example in self.named.items()}

    def __getitem__(self, name: str) -> Item:
        found = self._examples.get(name) or self._uploads.get(name)
        if found is None:
            raise UploadError("the file is not there any more: choose it again")
        return found

    async def receive(self, chunks: AsyncIterator[bytes], told: int | None) -> Path:
        """Write a file as it comes. Of one that is too large, no more than `max_bytes` is ever kept.

        Args:
            told: its length, as far as it was told before.

        Raises:
            UploadError: it is too large, or empty, or too many come at once.
        """
        if told is not None and told > self.max_bytes:
            raise self._too_large()
        if self.receiving >= AT_ONCE:
            raise UploadError("other files are still being uploaded: try again in a moment")
        path = self.folder / secrets.token_hex(16)
        size = 0
        self.receiving += 1
        try:
            with path.open("xb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > self.max_bytes:
                        raise self._too_large()
                    file.write(chunk)
            if not size:
                raise UploadError("the file is empty")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            self.receiving -= 1
        return path

    def _too_large(self) -> UploadError:
        return UploadError(f"the file is larger than {self.max_bytes / 2**20:g} MB: choose a smaller one")

    def add(self, path: Path, media_type: str) -> Item:
        """Look at a received file and keep it; one that cannot be read is deleted.

        Raises:
            UnreadableError: it cannot be read. UploadError: it is too long.
        """
        try:
            item = self._looked_at(path, media_type)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._uploads[item.id] = item
        while len(self._uploads) > KEPT:
            (self.folder / self._uploads.pop(next(iter(self._uploads))).id).unlink(missing_ok=True)
        return item

    def _looked_at(self, path: Path, media_type: str) -> Item:
        moving = media_type.startswith("video/") or media_type == "image/gif"
        kinds = ("clip", "picture") if moving else ("picture", "clip")
        reasons = []
        for kind in kinds:
            try:
                return self._as(kind, path)
            except UploadError:
                raise
            except UnreadableError as error:
                reasons.append(error)
        raise reasons[1] if " give it as " in str(reasons[0]) else reasons[0]

    def _as(self, kind: str, path: Path) -> Item:
        if kind == "picture":
            height, width = image_size(path)
            item = Item(path.name, path, kind, height, width)
            return replace(item, preview=preview(item.read(1, 1.0, 640 * 480)))
        facts = video_facts(path)
        if facts.seconds > SECONDS:
            raise UploadError(f"the clip is {facts.seconds:.0f} seconds long, over {SECONDS:.0f}: cut it")
        item = Item(path.name, path, kind, facts.height, facts.width, facts.seconds)
        evenly = SHOWN / facts.seconds
        return replace(item, preview=preview(item.read(SHOWN, evenly, SHOWN * 160 * 120)))


def _of_example(name: str, example: Example) -> Item:
    frames, height, width = example.clip.frames.shape[:3]
    moves = example.clip.fps is not None
    shown = preview(example.clip)
    kind, known = ("clip", frames) if moves else ("picture", None)
    return Item(name, example.clip, kind, height, width, None, known, shown)


def preview(clip: Clip) -> bytes:
    """A PNG of a picture, or of frames of a clip: at most 12, evenly spaced, in rows of 4."""
    from PIL import Image

    count = len(clip.frames)
    shown = min(count, SHOWN)
    frames = [Image.fromarray(clip.frames[(2 * i + 1) * count // (2 * shown)]) for i in range(shown)]
    columns = 1 if count == 1 else min(4, len(frames))
    width = 640 if columns == 1 else 160
    frames = [_scaled(frame, width) for frame in frames]
    (w, h), gap = frames[0].size, 6
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGBA", (columns * (w + gap) - gap, rows * (h + gap) - gap))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (i % columns * (w + gap), i // columns * (h + gap)))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _scaled(frame: Any, width: int) -> Any:
    """At most that wide, and 640 high; a tiny one is enlarged by whole pixels."""
    from PIL import Image

    times = min(width // frame.width, 640 // frame.height)
    if times > 1:
        return frame.resize((frame.width * times, frame.height * times), Image.Resampling.NEAREST)
    frame.thumbnail((width, 640))
    return frame
