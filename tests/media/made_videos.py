"""Video files with what phones, cameras and hostile hands put into them, made in memory."""

import io
import struct
import tempfile
from fractions import Fraction

import av
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64
STEP = 5


def grey(i, height=HEIGHT):
    """Frame i is of one grey, that a codec keeps to within two."""
    return np.full((height, WIDTH, 3), (STEP * i) % 256, np.uint8)


def film(
    format="mp4", codec="mpeg4", frames=40, fps=10, times=None, last=None, gop=5, b_frames=0, pixels="yuv420p",
    sound=0.0, sound_first=False, pictures=grey, size=(HEIGHT, WIDTH), options=None, container_options=None, turn=None,
    prepare=None,
):  # fmt: skip
    """The bytes of a film.

    Args:
        times: when the frames are shown, in seconds; evenly, if left out.
        last: how long the last frame is shown.
        gop: frames between key frames.
        sound: its seconds.
        pictures: frame i.
        turn: (degrees counter-clockwise, mirrored, flipped), or nine numbers of a display matrix.
        prepare: called with the stream.
    """
    # FFmpeg reads again what it wrote to put the index first, which takes a file.
    twice = any(word in str(container_options) for word in ("faststart", "sidx"))
    out = io.BytesIO() if not twice else tempfile.NamedTemporaryFile(suffix=f".{format}")  # noqa: SIM115
    clock = Fraction(1, 1000) if times is not None else Fraction(1, fps)
    with av.open(getattr(out, "name", out), "w", format=format, container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size, stream.codec_context.max_b_frames = pixels, gop, b_frames
        stream.codec_context.time_base, stream.bit_rate = clock, 4_000_000
        stream.time_base = clock
        if turn is not None:
            (stream.set_display_matrix if len(turn) == 9 else lambda t: stream.set_display_rotation(*t))(turn)
        if prepare is not None:
            prepare(stream)
        audio = container.add_stream("libopus" if format == "webm" else "aac", rate=48000) if sound else None

        def play():
            layout = "s16" if format == "webm" else "fltp"
            for i in range(int(sound * 48000 / 960)):
                piece = av.AudioFrame(format=layout, layout="stereo", samples=960)
                for plane in piece.planes:
                    plane.update(bytes(plane.buffer_size))
                piece.rate, piece.pts = 48000, 960 * i
                container.mux(audio.encode(piece))
            container.mux(audio.encode())

        if audio and sound_first:
            play()
        count = len(times) if times is not None else frames
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(pictures(i), format="rgb24")
            frame.time_base = clock
            frame.pts = i if times is None else round(1000 * times[i])
            if i == count - 1 and last is not None:
                frame.duration = round(last / clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio and not sound_first:
            play()
    with out:
        out.seek(0)
        return out.read()


def box(kind, data):
    """A box of an MP4."""
    return struct.pack(">I", len(data) + 8) + kind + data


def with_cover(mp4, side=100):
    """An MP4 with a cover picture before its film; its index is last, so no place of a frame changes."""
    picture = io.BytesIO()
    Image.new("RGB", (side, side), "lime").save(picture, "JPEG")
    cover = box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 13, 0) + picture.getvalue())))
    new = box(b"udta", box(b"meta", bytes(4) + box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9)) + cover))
    index, header = mp4.index(b"moov"), mp4.index(b"mvhd") - 4
    end = header + struct.unpack(">I", mp4[header : header + 4])[0]
    size = struct.unpack(">I", mp4[index - 4 : index])[0] + len(new)
    return mp4[: index - 4] + struct.pack(">I", size) + mp4[index:end] + new + mp4[end:]


def with_matrix(mp4, matrix):
    """An MP4 whose display matrix is another: (a, b, c, d) as floats."""
    place = mp4.index(b"tkhd") + 44
    a, b, c, d = (round(65536 * v) for v in matrix)
    return mp4[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + mp4[place + 36 :]
