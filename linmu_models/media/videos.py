"""Videos: the frames that FFmpeg shows at evenly spaced times, upright and in RGB."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from .source import INSTALL, MOST_PIXELS, Clip, Source, UnreadableError, check_pixels, check_positive, fit, opened

# FFmpeg's formats that hold their own frames. Others (playlists, session descriptions, patterns of names) open files
# that the one at hand names. Those of sound alone are here to be told apart from what is broken.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h261,h263,h264,hevc,vvc,evc,obu,ivf,flv,live_flv,asf,ogg,nut,gif,"
    "apng,webp,mxf,gxf,rm,wtv,dv,yuv4mpegpipe,mjpeg,smjpeg,vc1,dirac,dnxhd,cavsvideo,avs2,avs3,smk,bink,swf,roq,flic,"
    "nsv,nuv,vivo,mp3,wav,w64,flac,aac,loas,amr,aiff,au,ac3,eac3,dts,ape,wv,tta,caf,mpc,mpc8,oma"
)
# Containers whose durations are the time of the end, not what lies between beginning and end.
_LENGTH_IS_END = ("matroska", "flv", "asf")
# Containers tell a duration that is a little off; a video that ends earlier than this share of it is cut short.
_SLACK = 0.05
# Seconds without a known key frame after which one is looked for. Each search that is in vain makes them more.
_JUMP = 5.0
# Times are compared at FFmpeg's own precision.
_TICK = 1e-6
_NO_PICTURE = "video is audio, sound without a picture: give another file"


@dataclass(frozen=True)
class VideoFacts:
    """What is known of a video without decoding more than its first frame."""

    seconds: float
    """From the container's start to the end of the picture, which sound may outlast."""
    height: int
    width: int
    """Of a frame when upright, in pixels as they are coded: those that are not square are not stretched."""
    frame_rate: float

    def count(self, frames: int, fps: float) -> int:
        """How many frames are taken: `fps` of a second, at least one and at most `frames`, not more than there are."""
        there = max(1, math.floor(self.seconds * self.frame_rate + 0.5))
        return max(1, min(frames, round(self.seconds * fps), there))


class _Reader:
    """A file without a name: by its name FFmpeg would guess a format, or a protocol."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _decode(packet: Any) -> list[Any]:
    return packet.decode()


class _Film:
    """The picture of a video file: what is known of it, and its frames in the order in which they are shown."""

    _container: Any = None

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._seekable = True
        self._jump = _JUMP
        self._reopen()
        rates = (self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate)
        self._rate = float(next((rate for rate in rates if rate and rate > 0), 25))
        first: tuple[float, Any] | None = next(self._frames(), None)
        if first is None:
            raise UnreadableError("video corrupt")
        self._first, frame = first
        lying = _turn(frame)[0] % 2
        height, width = (frame.width, frame.height) if lying else (frame.height, frame.width)
        start = self._container.start_time
        self._origin = self._first if start is None else min(self._first, start / 1e6)
        end, self.cut = self._end()
        if not end > self._origin:
            raise UnreadableError("video of unknown length")
        self.facts = VideoFacts(end - self._origin, height, width, self._rate)

    def _reopen(self) -> None:
        import av

        self.close()
        self._file.seek(0)
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none", "max_pixels": str(MOST_PIXELS)}
        self._container = av.open(
            _Reader(self._file), "r", options=options, metadata_errors="replace", buffer_size=1 << 16
        )
        pictures = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & (av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails)
        ]
        if not pictures:
            raise UnreadableError(_NO_PICTURE if self._container.streams.audio else "video corrupt")
        known = [stream for stream in pictures if stream.codec_context is not None]
        if not known:
            raise UnreadableError("video is of a codec that FFmpeg cannot decode: save it as H.264")
        self._stream = max(known, key=_importance)
        check_pixels("video", self._stream.codec_context.width, self._stream.codec_context.height)
        self._stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        # FFmpeg's threads wait for each other for ever on some damaged films; data workers decode side by side anyway.
        self._stream.thread_type, self._stream.thread_count = "NONE", 1

    def close(self) -> None:
        """Let go of the decoder; the file is the caller's."""
        if self._container is not None:
            self._container.close()

    def _seconds(self, ticks: int | None) -> float | None:
        return None if ticks is None else float(ticks * self._stream.time_base)

    def _frames(self, after_seek: bool = False) -> Iterator[tuple[float, Any]]:
        """Times and frames from where the container is; after a seek, from the first packet that stands alone."""
        import av

        count, last = 0, None
        for packet in self._container.demux(self._stream):
            if after_seek and not packet.is_keyframe and packet.size:
                continue
            after_seek = False
            try:
                frames = _decode(packet)
            except av.error.InvalidDataError:
                if count:
                    raise
                continue  # A recording may begin between key frames.
            for frame in frames:
                time = self._seconds(frame.pts if frame.pts is not None else frame.dts)
                if time is None:
                    time = count / self._rate if last is None else last + 1 / self._rate
                    self._seekable = False
                count, last = count + 1, time
                yield time, frame

    def _end(self) -> tuple[float, bool]:
        """When the picture ends, and whether the file does before it should.

        Nothing is decoded: the packets from the last key frame on tell where each stream ends.
        """
        ends = self._last_packets()
        stream, container = self._stream, self._container
        picture, everything = ends.get(stream.index), max(ends.values(), default=None)
        told = None
        name = container.format.name
        matroska, by_end = "matroska" in name, any(kind in name for kind in _LENGTH_IS_END)
        if stream.duration:
            told = self._seconds((0 if by_end else stream.start_time or 0) + stream.duration)
        elif tag := stream.metadata.get("DURATION"):  # Matroska's; the time of the end
            told = _clock(tag)
        total = None
        if container.duration:
            total = container.duration / 1e6
            if not by_end:
                total += (container.start_time or 0) / 1e6
        claimed = told or total
        if claimed is None:
            if picture is None:
                raise UnreadableError("video of unknown length")
            return picture, False
        slack = max(1 / self._rate, _SLACK * (claimed - self._origin)) + _TICK
        if matroska and _whole(self._file):
            short = False
        elif told is not None:
            short = picture is None or picture < told - slack
        else:
            short = everything is None or everything < claimed - slack
        if short:
            return claimed, True
        if told is None and picture is not None and max(ends.values()) > picture + slack:
            return picture, False  # The container's length is that of the sound.
        return max(claimed, picture or claimed), False

    def _last_packets(self) -> dict[int, float]:
        """Where each stream ends, in seconds, by index."""
        import av

        ends: dict[int, float] = {}
        entries = self._stream.index_entries
        try:
            self._container.seek(1 << 50, stream=self._stream, backward=True)
            self._note_ends(ends)
            if self._stream.index not in ends and len(entries):  # The last entry may be a mere mark of the end.
                self._container.seek(entries[len(entries) - 1].timestamp - 1, stream=self._stream, backward=True)
                self._note_ends(ends)
        except (av.error.FFmpegError, OSError):
            pass
        if self._stream.index not in ends:
            self._reopen()
            self._seekable = False
            self._note_ends(ends)
        return ends

    def _note_ends(self, ends: dict[int, float]) -> None:
        import av

        try:
            for packet in self._container.demux():
                if not packet.size or packet.stream.type not in ("video", "audio"):
                    continue
                index, clock = packet.stream.index, packet.time_base
                frame = 1 / self._rate if index == self._stream.index else 0.0
                ticks = packet.pts if packet.pts is not None else packet.dts
                if ticks is None:
                    ends[index] = ends.get(index, 0.0) + frame
                else:
                    end = float(ticks * clock) + (float(packet.duration * clock) if packet.duration else frame)
                    ends[index] = max(end, ends.get(index, end))
        except av.error.FFmpegError:
            pass  # What can be read ends here.

    def shown(self, times: Sequence[float]) -> Iterator[Any]:
        """The frame at each time, in seconds from the start, in order: the last one not later, else the first.

        What lies between is decoded only where there is no key frame to go on from: at most the frames from the last
        key frame before each time, and one more.
        """
        now: Any = None
        upcoming: Any = None
        frames: Iterator[Any] = iter(())
        for time in times:
            time = max(time + self._origin, self._first) + _TICK
            if now is None or (upcoming is not None and upcoming[0] <= time and self._key_ahead(upcoming[0], time)):
                position = upcoming
                now, frames = self._go(time)
                if position is not None and now[0] <= position[0]:
                    self._jump = max(self._jump, 4 * (time - now[0]))
                upcoming = next(frames, None)
            while upcoming is not None and upcoming[0] <= time:
                now, upcoming = upcoming, next(frames, None)
            yield now[1]

    def _key_ahead(self, position: float, time: float) -> bool:
        if not self._seekable:
            return False
        entries = self._stream.index_entries
        place = entries.search_timestamp(int(time / self._stream.time_base), backward=True)
        if place >= 0 and float(entries[place].timestamp * self._stream.time_base) > position:
            return True
        return time - position > self._jump

    def _go(self, time: float) -> tuple[tuple[float, Any], Iterator[tuple[float, Any]]]:
        """The last key frame that is not later, and what follows it; without one, the first frame of all."""
        import av

        for back in (0, 1, 4, 16, 64):
            if not self._seekable:
                break
            target = max(time - back, self._first)
            try:
                self._container.seek(int(target / self._stream.time_base), stream=self._stream, backward=True)
                frames = self._frames(after_seek=True)
                for found in frames:
                    if found[0] > time:
                        break
                    # Before a key frame come those that need what was not read.
                    if found[1].key_frame:
                        return found, frames
            except (av.error.FFmpegError, OSError):
                break
            if target == self._first:
                break
        self._seekable = False
        self._reopen()
        frames = self._frames()
        first = next(frames, None)
        if first is None:
            raise UnreadableError("video corrupt")
        return first, frames


def _importance(stream: Any) -> tuple[bool, int]:
    """As FFmpeg chooses one of several pictures: the largest, unless another is the default; one that moves first."""
    import av

    default = bool(stream.disposition & av.stream.Disposition.default)
    return stream.frames != 1, stream.codec_context.width * stream.codec_context.height + 5_000_000 * default


def _clock(text: str) -> float | None:
    """Seconds of hours:minutes:seconds."""
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds) or None
    except ValueError:
        return None


def _whole(file: BinaryIO) -> bool:
    """Whether a Matroska file is as long as it says: where it holds its last frame, its packets do not tell."""
    file.seek(0)
    head = file.read(4096)
    size = file.seek(0, 2)
    place = head.find(b"\x18\x53\x80\x67") + 4
    if place < 4 or place >= len(head) or not head[place]:
        return False
    width = 9 - head[place].bit_length()
    length = int.from_bytes(head[place : place + width], "big") & ((1 << 7 * width) - 1)
    return length < (1 << 7 * width) - 1 and place + width + length <= size


def _turn(frame: Any) -> tuple[int, bool, bool, float]:
    """What FFmpeg does to a frame by its display matrix: quarter turns clockwise (odd ones lie), then mirrored from
    left to right, then from top to bottom; and any other angle, in degrees clockwise."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None or len(bytes(side)) < 36:
        return 0, False, False, 0.0
    m = [int(v) for v in np.frombuffer(bytes(side)[:36], np.int32)]
    across, along = math.hypot(m[0], m[3]), math.hypot(m[1], m[4])
    if not across or not along:
        return 0, False, False, 0.0
    angle = round(math.degrees(math.atan2(m[1] / along, m[0] / across))) % 360
    if angle == 90:
        return 1, m[3] > 0, False, 0.0
    if angle == 180:
        return 0, m[0] < 0, m[4] < 0, 0.0
    if angle == 270:
        return 3, m[3] < 0, False, 0.0
    if angle == 0:
        return 0, False, m[4] < 0, 0.0
    return 0, False, False, float(angle)


def _pixels(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8, upright and of that size."""
    quarters, mirrored, flipped, angle = _turn(frame)
    height, width = size[::-1] if quarters % 2 else size
    if angle:
        frame = _rotated(frame.reformat(format="rgb24"), angle)
    pixels = np.rot90(frame.to_ndarray(format="rgb24", height=height, width=width), -quarters)
    pixels = pixels[:, ::-1] if mirrored else pixels
    return pixels[::-1] if flipped else pixels


def _rotated(frame: Any, angle: float) -> Any:
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 25)
    )
    graph.link_nodes(source, graph.add("rotate", f"{angle}*PI/180"), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


@contextmanager
def _film(source: Source) -> Iterator[_Film]:
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ImportError(f"videos need PyAV: {INSTALL}") from error
    with opened(source, "video") as file:
        film = _Film(file)
        try:
            yield film
        finally:
            film.close()


def video_facts(source: Source) -> VideoFacts:
    """Length, size and rate of a video: by its header, its first frame, and where its last packets end.

    Raises:
        UnreadableError: missing, corrupt, too large, or not a video.
    """
    with _film(source) as film:
        return film.facts


def read_video(source: Source, frames: int, fps: float, max_pixels: int | None = None) -> Clip:
    """Read evenly spaced frames of a video: the middles of n equal parts, n = `VideoFacts.count(frames, fps)`.

    A frame is the one shown at that time: the last that is not later, or the first where none is earlier. It is rotated
    and mirrored as its container says. Otherwise it is as it is coded: it is not deinterlaced, its pixels are not made
    square, its alpha is left out, its brightness is not mapped.

    Of several pictures the default one is read, or the largest; cover pictures are not. The first frame is decoded, and
    for each frame that is read those from its key frame to the next one, once. Where FFmpeg finds no key frames, it
    decodes from the beginning to the last frame read.

    Raises:
        UnreadableError: the video is missing, corrupt, cut short, too large, too elongated, or is none.
        TypeError, ValueError: an argument is of another type, or a number is not over 0.
    """
    check_positive("frames", frames)
    check_positive("fps", fps, whole=False)
    if max_pixels is not None:
        check_positive("max_pixels", max_pixels)
    with _film(source) as film:
        facts = film.facts
        size = fit(facts.height, facts.width, max_pixels)
        if film.cut:
            raise UnreadableError("video truncated")
        count = facts.count(frames, fps)
        step = facts.seconds / count
        out = np.empty((count, *size, 3), np.uint8)
        before = None
        for i, frame in enumerate(film.shown([(i + 0.5) * step for i in range(count)])):
            out[i] = out[i - 1] if frame is before else _pixels(frame, size)
            before = frame
        return Clip(out, count / facts.seconds)
