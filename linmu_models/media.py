"""Images and videos from files or bytes to pixels; what cannot be read says why."""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Source = bytes | str | os.PathLike[str]

# Image processors fail beyond these: a shorter side is enlarged to so many pixels, a longer one refused at this ratio.
_SHORTEST, _MOST_ELONGATED = 28, 100
# Containers tell a duration that is a little off; a video that ends earlier than this share of it is cut short.
_SLACK = 0.05


class UnreadableError(ValueError):
    """An image or video that cannot be used; the text is a short, countable reason."""


@dataclass(frozen=True)
class Clip:
    """Pixels of one image (`fps` is None) or video."""

    frames: np.ndarray
    """(T, H, W, 3) uint8; T is 1 for an image."""
    fps: float | None = None
    """Frames of `frames` in a second of the video."""

    @property
    def is_video(self) -> bool:
        """Whether this is a video."""
        return self.fps is not None


def fit(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    """The size at which a picture is used: not more than `max_pixels`, not too small, its shape kept.

    Raises:
        UnreadableError: one side is over 100 times the other.
    """
    if max(height, width) > _MOST_ELONGATED * min(height, width):
        raise UnreadableError("too elongated")
    scale = 1.0
    if max_pixels is not None and height * width > max_pixels:
        scale = math.sqrt(max_pixels / (height * width))
    scale = max(scale, _SHORTEST / min(height, width))
    return (height, width) if scale == 1 else (max(1, round(height * scale)), max(1, round(width * scale)))


def _open(source: Source) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError as error:
        raise UnreadableError("image missing") from error
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UnreadableError("image corrupt") from error


def image_size(source: Source) -> tuple[int, int]:
    """(height, width) of an image as `read_image` gives it, from its header.

    Raises:
        UnreadableError: missing or corrupt.
    """
    with _open(source) as image:
        try:
            # Of a PNG, only what stands before the pixels; the rest would need them decoded.
            tags = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableError("image corrupt") from error
        turned = tags.get(0x0112, 1) >= 5  # These orientations lie on their side.
        return (image.width, image.height) if turned else (image.height, image.width)


def read_image(source: Source, max_pixels: int | None = None) -> Clip:
    """An image file, or its bytes, upright and in RGB.

    Raises:
        UnreadableError: missing, corrupt or cut short, or too elongated.
    """
    from PIL import Image, ImageOps

    with _open(source) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("P", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
            if upright.mode == "RGBA":  # What is transparent is seen on white.
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            upright = upright.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableError("image corrupt") from error
    height, width = fit(upright.height, upright.width, max_pixels)
    if (height, width) != (upright.height, upright.width):
        upright = upright.resize((width, height), Image.Resampling.BICUBIC)
    return Clip(np.asarray(upright)[None])


@dataclass(frozen=True)
class VideoFacts:
    """What a container says of its first video stream."""

    seconds: float
    height: int
    width: int
    frame_rate: float

    def count(self, frames: int, fps: float) -> int:
        """How many frames are taken: `fps` of a second, at least one and at most `frames`, not more than there are."""
        there = max(1, math.floor(self.seconds * self.frame_rate + 0.5))
        return max(1, min(frames, round(self.seconds * fps), there))


def _container(source: Source) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install av") from error
    if not isinstance(source, bytes) and not Path(source).exists():
        raise UnreadableError("video missing")
    try:
        return av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UnreadableError("video corrupt") from error


def _facts(container: Any) -> VideoFacts:
    if not container.streams.video:
        raise UnreadableError("video corrupt")
    stream = container.streams.video[0]
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration:
        seconds = container.duration / 1e6
    else:
        raise UnreadableError("video of unknown length")
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    height, width = stream.codec_context.height, stream.codec_context.width
    if not (seconds > 0 and rate > 0 and height and width):
        raise UnreadableError("video of unknown length")
    return VideoFacts(seconds, height, width, rate)


def video_facts(source: Source) -> VideoFacts:
    """Length, size and rate of a video, without decoding it.

    Raises:
        UnreadableError: missing or corrupt.
    """
    with _container(source) as container:
        return _facts(container)


def read_video(source: Source, frames: int, fps: float, max_pixels: int | None = None) -> Clip:
    """Evenly spaced frames of a video: the middle of each of n equal parts, n = `VideoFacts.count(frames, fps)`.

    Raises:
        UnreadableError: missing, corrupt, cut short, or too elongated.
    """
    import av

    with _container(source) as container:
        facts = _facts(container)
        size = fit(facts.height, facts.width, max_pixels)
        count = facts.count(frames, fps)
        step = facts.seconds / count
        wanted = [(i + 0.5) * step for i in range(count)]
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        taken: list[np.ndarray] = []
        last, start, seen = None, None, 0.0
        try:
            for frame in container.decode(stream):
                time = frame.time if frame.time is not None else seen + 1 / facts.frame_rate
                start = time if start is None else start
                seen, last = time - start, frame
                if len(taken) < count and seen + 0.5 / facts.frame_rate >= wanted[len(taken)]:
                    pixels = frame.to_ndarray(format="rgb24", height=size[0], width=size[1])
                    while len(taken) < count and seen + 0.5 / facts.frame_rate >= wanted[len(taken)]:
                        taken.append(pixels)
                if len(taken) == count:
                    break
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise UnreadableError("video corrupt") from error
        if last is None:
            raise UnreadableError("video corrupt")
        if len(taken) < count:
            if seen < wanted[-1] - max(1 / facts.frame_rate, _SLACK * facts.seconds):
                raise UnreadableError("video truncated")
            pixels = last.to_ndarray(format="rgb24", height=size[0], width=size[1])
            taken += [pixels] * (count - len(taken))
    return Clip(np.stack(taken), count / facts.seconds)
