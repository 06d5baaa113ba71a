"""What images and videos have in common: where they come from, how large they may be, and what is said of a bad one."""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, BinaryIO

import numpy as np

Source = bytes | str | os.PathLike[str]

# Image processors fail beyond these: a shorter side is enlarged to so many pixels, a longer one refused at this ratio.
_SHORTEST, _MOST_ELONGATED = 28, 100
MOST_PIXELS = 178_956_970
"""Of an image or a frame: where Pillow sees a decompression bomb. Decoding one of this size takes about 3 GB."""
INSTALL = 'install linmu with its extra models, e.g. pip install "linmu[models]"'


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


def check_pixels(kind: str, width: int, height: int) -> None:
    """Refuse what would not fit in memory, before it is decoded."""
    if width < 1 or height < 1:
        raise UnreadableError(f"{kind} corrupt")
    if width * height > MOST_PIXELS:
        raise too_large(kind)


def too_large(kind: str) -> UnreadableError:
    """The error for what has more than `MOST_PIXELS`."""
    return UnreadableError(f"{kind} over 178 megapixels: make it smaller")


def check_positive(name: str, value: Any, *, whole: bool = True) -> None:
    """Raise TypeError where this is no (whole) number, ValueError where it is not over 0."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise TypeError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")
    number: Any = value
    if not number > 0 or number == math.inf:
        raise ValueError(f"{name} must be over 0{'' if whole else ' and finite'}, got {value!r}")


@contextmanager
def opened(source: Source, kind: str) -> Iterator[BinaryIO]:
    """The bytes of a source, to be read at any place; `kind` is "image" or "video".

    Whatever a decoder raises inside, on a file that is broken or made to break it, becomes an UnreadableError: there is
    no end to the types of such errors, and none may end a run.

    Raises:
        UnreadableError: missing, not a file, or whatever went wrong inside.
        TypeError: the source is neither bytes nor a path.
    """
    if not isinstance(source, (bytes, str, os.PathLike)):
        raise TypeError(f"{kind} must be bytes or a path, got {type(source).__name__}")
    try:
        if isinstance(source, bytes):
            file: BinaryIO = io.BytesIO(source)
        else:
            path = os.fspath(source)
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise UnreadableError(f"{kind} is a folder: name a file in it")
            if not stat.S_ISREG(mode):
                raise UnreadableError(f"{kind} is not a regular file: copy it to one")
            file = open(path, "rb")  # noqa: SIM115
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnreadableError(f"{kind} missing") from error
    except PermissionError as error:
        raise UnreadableError(f"{kind} may not be read: see its permissions") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(f"{kind} missing") from error  # a name that cannot be one
    with file:
        try:
            yield file
        except UnreadableError:
            raise
        except MemoryError as error:
            raise UnreadableError(f"{kind} larger than the memory") from error
        except Exception as error:
            try:
                file.seek(0)
                head = file.read(4096)
            except OSError as broken:  # a disk or a network that fails
                raise UnreadableError(f"{kind} cannot be read: {broken.strerror}") from broken
            raise UnreadableError(f"{kind} {_verdict(head, kind)}") from error


# How files begin, and what they are. Where two match, the first is right.
_SIGNS: tuple[tuple[bytes, int, str], ...] = (
    (b"%PDF", 0, "PDF"), (b"%!PS", 0, "PostScript"), (b"\xc5\xd0\xd3\xc6", 0, "PostScript"),
    (b"ftypheic", 4, "HEIC"), (b"ftypheix", 4, "HEIC"), (b"ftypmif1", 4, "HEIC"), (b"ftypmsf1", 4, "HEIC"),
    (b"\xff\x0a", 0, "JPEG XL"), (b"JXL ", 4, "JPEG XL"), (b"ftypavif", 4, "image"), (b"ftypM4A", 4, "sound"),
    (b"ftyp", 4, "video"), (b"moov", 4, "video"), (b"\x1a\x45\xdf\xa3", 0, "video"), (b"AVI ", 8, "video"),
    (b"\x00\x00\x01\xba", 0, "video"), (b"\x00\x00\x01\xb3", 0, "video"), (b"FLV\x01", 0, "video"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, "video"),
    (b"WAVE", 8, "sound"), (b"ID3", 0, "sound"), (b"fLaC", 0, "sound"), (b"OggS", 0, "sound"),
    (b"\xff\xfb", 0, "sound"), (b"\xff\xf1", 0, "sound"), (b"#!AMR", 0, "sound"), (b"AIFF", 8, "sound"),
    (b"\x89PNG", 0, "image"), (b"\xff\xd8\xff", 0, "image"), (b"GIF8", 0, "image"), (b"WEBP", 8, "image"),
    (b"BM", 0, "image"), (b"II*\0", 0, "image"), (b"MM\0*", 0, "image"),
    (b"#EXTM3U", 0, "playlist"), (b"ffconcat", 0, "playlist"), (b"[playlist]", 0, "playlist"),
    (b"v=0\r", 0, "playlist"), (b"v=0\n", 0, "playlist"), (b"PK\x03\x04", 0, "ZIP"),
)  # fmt: skip
_WORDS = {
    "SVG": "is an SVG drawing: save it as PNG",
    "PDF": "is a PDF document: save its page as PNG",
    "PostScript": "is a PostScript drawing: save it as PNG",
    "HEIC": "is HEIC, which Pillow does not read: save it as JPEG",
    "JPEG XL": "is JPEG XL, which Pillow does not read: save it as JPEG",
    "HTML": "is an HTML page: save what it shows",
    "ZIP": "is a ZIP archive: unpack it",
    "playlist": "is a playlist: give a file that it names",
    "video": "is a video: give it as a video",
    "image": "is an image: give it as an image",
    "sound": "is audio, sound without a picture: give another file",
}


def _verdict(head: bytes, kind: str) -> str:
    """What is wrong with a file that could not be read, by how it begins."""
    for sign, place, name in _SIGNS:
        if head[place : place + len(sign)] == sign:
            return "corrupt" if name == kind else _WORDS[name]
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        if b"<svg" in text:
            return _WORDS["SVG"]
        if b"<mpd" in text or b"<smil" in text:
            return _WORDS["playlist"]
        if b"<html" in text or text.startswith(b"<!doctype html"):
            return _WORDS["HTML"]
    return "corrupt"
