"""Videos as FFmpeg shows them: the frame of that time, upright, without decoding what is not needed."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from made_videos import HEIGHT, STEP, WIDTH, box, film, grey, with_cover, with_matrix

from linmu_models.media import UnreadableError, read_video, video_facts, videos


def greys(data, frames, fps, **options):
    """The grey of each frame that is read."""
    clip = read_video(data, frames, fps, **options)
    assert clip.frames.dtype == np.uint8
    return clip.frames.mean((1, 2, 3))


def shown(times, wanted):
    """By its number, the frame that is shown at each time: the last not later, else the first."""
    return [max([i for i, time in enumerate(times) if time <= t + 1e-6], default=0) for t in wanted]


def middles(seconds, count):
    """The middle of each of so many equal parts."""
    return [(i + 0.5) * seconds / count for i in range(count)]


QUIET = "log-level=none"
# (options of `film`, the most that its frames may be off)
CONTAINERS = {
    "mp4": (dict(), 3),
    "mp4, B frames": (dict(codec="libx264", b_frames=2), 3),
    "mp4, B frames, one key frame": (dict(codec="libx264", b_frames=2, gop=1000), 3),
    "mp4, open groups": (dict(codec="libx264", b_frames=3, options={"x264-params": "open-gop=1:keyint=6"}), 3),
    "mp4, HEVC": (dict(codec="libx265", options={"x265-params": QUIET}), 3),
    "mp4, HEVC, open groups": (
        dict(codec="libx265", options={"x265-params": f"{QUIET}:open-gop=1:keyint=8:bframes=3"}), 3),
    "mp4, AV1": (dict(codec="libsvtav1", options={"preset": "12"}, size=(64, 64), pictures=lambda i: grey(i, 64)), 4),
    "mp4, intra refresh": (dict(codec="libx264", options={"x264-params": "intra-refresh=1:keyint=10"}), 3),
    "mp4, index first": (dict(container_options={"movflags": "faststart"}), 3),
    "mp4, fragments": (dict(container_options={"movflags": "frag_keyframe+empty_moov"}), 3),
    "mp4, fragments, B frames": (
        dict(codec="libx264", b_frames=2, container_options={"movflags": "frag_keyframe+empty_moov"}), 3),
    "mp4, segments": (dict(codec="libx264", container_options={"movflags": "dash+global_sidx+frag_keyframe"}), 3),
    "mov": (dict(format="mov"), 3),
    "mov, PNG": (dict(format="mov", codec="png", pixels="rgb24"), 0),
    "mov, ProRes": (dict(format="mov", codec="prores_ks", pixels="yuv422p10le"), 3),
    "mov, animation": (dict(format="mov", codec="qtrle", pixels="rgb24"), 0),
    "3gp": (dict(format="3gp"), 3),
    "mkv": (dict(format="matroska"), 3),
    "mkv, B frames": (dict(format="matroska", codec="libx264", b_frames=2), 3),
    "mkv, lossless": (dict(format="matroska", codec="ffv1", pixels="yuv444p"), 2),
    "mkv, live": (dict(format="matroska", container_options={"live": "1"}), 3),
    "webm, VP9": (dict(format="webm", codec="libvpx-vp9", options={"deadline": "realtime"}), 4),
    "avi": (dict(format="avi"), 3),
    "avi, Motion JPEG": (dict(format="avi", codec="mjpeg", pixels="yuvj420p"), 4),
    "flv": (dict(format="flv", codec="flv"), 3),
    "flv, H.264": (dict(format="flv", codec="libx264"), 3),
    "flv, B frames": (dict(format="flv", codec="libx264", b_frames=2), 3),
    "asf": (dict(format="asf", codec="msmpeg4"), 3),
    "nut": (dict(format="nut"), 3),
    "ts": (dict(format="mpegts", codec="mpeg2video", fps=25, frames=50), 4),
    "ts, H.264": (dict(format="mpegts", codec="libx264", b_frames=2), 3),
    "mpeg": (dict(format="mpeg", codec="mpeg2video", fps=25, frames=50, b_frames=2), 4),
    "gif": (dict(format="gif", codec="gif", pixels="gray"), 1),
    "apng": (dict(format="apng", codec="apng", pixels="rgb24"), 0),
    "raw H.264": (dict(format="h264", codec="libx264", b_frames=2), 3),
    "raw MPEG-4": (dict(format="m4v", codec="mpeg4"), 3),
    "ivf": (dict(format="ivf", codec="libvpx-vp9", options={"deadline": "realtime"}), 4),
    "mkv, 10 bits": (
        dict(format="matroska", codec="libx265", pixels="yuv420p10le", options={"x265-params": QUIET}), 3),
    "mkv, 4:4:4": (dict(format="matroska", codec="libx264", pixels="yuv444p"), 3),
    "mkv, full range": (dict(format="matroska", codec="mjpeg", pixels="yuvj420p"), 4),
    "mkv, alpha": (dict(format="matroska", codec="ffv1", pixels="yuva420p"), 2),
    "mkv, interlaced": (dict(format="matroska", codec="mpeg2video", fps=25, options={"flags": "+ildct+ilme"}), 4),
    "mkv, grey": (dict(format="matroska", codec="ffv1", pixels="gray"), 2),
    "mkv, 16 bits": (dict(format="matroska", codec="ffv1", pixels="gray16le"), 2),
    "mkv, three a second": (dict(format="matroska", fps=3, frames=12), 3),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONTAINERS)
def made(request):
    """A film of greys that grow, what its frames may be off, and when each is shown by an unhurried player."""
    options, tolerance = CONTAINERS[request.param]
    data = film(**options)
    with av.open(io.BytesIO(data)) as container:
        frames = [
            (frame.time, frame.to_ndarray(format="rgb24").mean(), frame.key_frame)
            for frame in container.decode(video=0)
        ]
        start = container.start_time
    if any(time is None for time, _, _ in frames):
        rate = float(options.get("fps", 10)) if start is not None else None
        frames = [(None if rate is None else i / rate, grey, key) for i, (_, grey, key) in enumerate(frames)]
    return data, tolerance, frames, start, options


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_the_frame_of_each_time_is_read(made, count):
    data, tolerance, frames, start, options = made
    fps = options.get("fps", 10)
    facts = video_facts(data)
    got = greys(data, count, 999.0)
    if frames[0][0] is None:
        times = [i / facts.frame_rate for i in range(len(frames))]
    else:
        origin = frames[0][0] if start is None else min(start / 1e6, frames[0][0])
        times = [time - origin for time, _, _ in frames]
        # The container's clock may be a frame off, and its rate what it guesses of a raw stream.
        assert abs(facts.seconds - len(frames) / fps) <= 2.1 / fps
    want = [frames[i][1] for i in shown(times, middles(facts.seconds, len(got)))]
    # Beside what a player shows, what was put in: frame i is of grey 5 i.
    assert np.abs(got - want).max() <= 1
    made_of = [STEP * i % 256 for i in shown(times, middles(facts.seconds, len(got)))]
    assert np.median(np.abs(got - made_of)) <= tolerance + 1
    assert len(got) == min(count, round(facts.seconds * facts.frame_rate))


def counted(monkeypatch):
    """How many frames have been decoded, in a list of one."""
    count = [0]
    real = videos._decode

    def decode(packet):
        frames = real(packet)
        count[0] += len(frames)
        return frames

    monkeypatch.setattr(videos, "_decode", decode)
    return count


LONG = dict(frames=1500, fps=10, size=(16, 16), pictures=lambda i: np.full((16, 16, 3), i // 6, np.uint8))
SEEKING = {
    "mp4": dict(gop=10),
    "mp4, B frames": dict(codec="libx264", gop=10, b_frames=2, options={"preset": "ultrafast", "bf": "2"}),
    "mkv": dict(format="matroska", gop=10),
    "webm": dict(format="webm", codec="libvpx-vp9", gop=10, options={"deadline": "realtime", "cpu-used": "8"}),
    "avi": dict(format="avi", gop=10),
    "ts": dict(format="mpegts", codec="libx264", gop=10, options={"preset": "ultrafast"}),
    "flv": dict(format="flv", codec="libx264", gop=10, options={"preset": "ultrafast"}),
    "fragments": dict(gop=10, container_options={"movflags": "frag_keyframe+empty_moov"}),
}


@pytest.mark.parametrize("container", SEEKING)
def test_a_long_video_is_not_decoded_between_what_is_read(monkeypatch, container):
    """150 seconds, a key frame in each: for each frame that is read, those since its key frame, and one more.

    Reordered pictures may take an earlier key frame.
    """
    data = film(**LONG | SEEKING[container])
    count = counted(monkeypatch)
    facts = video_facts(data)
    assert count[0] <= 4 and abs(facts.seconds - 150) <= 0.21
    count[0] = 0
    got = greys(data, 5, 1.0)
    assert np.abs(got - [10 * t // 6 for t in middles(facts.seconds, 5)]).max() <= 5
    assert 5 <= count[0] <= 5 * 24


def test_the_beginning_is_read_without_the_rest(monkeypatch):
    data = film(**LONG | dict(gop=1500))
    count = counted(monkeypatch)
    with videos._film(data) as found:
        count[0] = 0
        list(found.shown([0.05, 0.55]))
    assert count[0] <= 8


def test_one_thread_decodes(monkeypatch):
    """More would wait for each other for ever on some damaged films."""
    threads = []
    real = videos._decode
    monkeypatch.setattr(
        videos, "_decode", lambda packet: threads.append(packet.stream.codec_context.thread_count) or real(packet)
    )
    for options in (dict(), dict(codec="libx264"), dict(format="webm", codec="libvpx-vp9")):
        read_video(film(**options), 4, 1.0)
    assert set(threads) == {1}


def test_one_key_frame_is_decoded_from_once(monkeypatch):
    """A search for key frames where there are none does not begin again for each frame."""
    for format in ("mp4", "matroska", "mpegts"):
        codec = "libx264" if format == "mpegts" else "mpeg4"
        data = film(**LONG | dict(format=format, codec=codec, gop=9999, options={"sc_threshold": "1000000000"}))
        count = counted(monkeypatch)
        got = greys(data, 12, 1.0)
        assert np.abs(got - [10 * t // 6 for t in middles(150, 12)]).max() <= 6
        assert count[0] <= 2 * 1500
        monkeypatch.undo()


HELD = {"matroska": ("ffv1", "yuv444p"), "mp4": ("mpeg4", "yuv420p"), "webm": ("libvpx-vp9", "yuv420p")}


@pytest.mark.parametrize("format", HELD)
@pytest.mark.parametrize(
    "times, last",
    [
        ((0, 10, 20, 30), 0.1),
        ((0, 10, 20, 30), 10),
        ((0, 0.1, 0.2, 30), 1),
        ((0, 29, 29.5, 30), 0.1),
        ((0, 1, 3, 6, 10, 15, 21), 7),
        ((0, 0.033, 0.067, 0.1, 0.5, 0.533, 2), 0.5),
    ],
)
def test_a_frame_is_held_until_the_next(format, times, last):
    codec, pixels = HELD[format]
    data = film(format=format, codec=codec, pixels=pixels, times=times, last=last, pictures=lambda i: grey(8 * i))
    facts = video_facts(data)
    assert times[-1] < facts.seconds <= times[-1] + last + 0.2
    for count in (1, 2, 8, 30):
        got = greys(data, count, 2.0)
        want = [8 * STEP * i % 256 for i in shown(times, middles(facts.seconds, len(got)))]
        assert np.abs(got - want).max() <= 5


@pytest.mark.parametrize("format", ["matroska", "mp4", "mpegts", "flv", "asf"])
def test_a_late_beginning_is_none_where_nothing_comes_before(format):
    times = [5 + i / 10 for i in range(40)]
    data = film(format=format, codec="msmpeg4" if format == "asf" else "libx264", times=times)
    facts = video_facts(data)
    assert abs(facts.seconds - 4) <= 0.21
    got = greys(data, 8, 2.0)
    assert np.abs(got - [STEP * i for i in shown([t - 5 for t in times], middles(facts.seconds, 8))]).max() <= STEP + 3


@pytest.mark.parametrize("format", ["matroska", "mp4"])
def test_before_a_late_first_frame_it_is_shown(format):
    """The sound begins five seconds earlier."""
    times = [5 + i / 10 for i in range(40)]
    data = film(format=format, times=times, sound=9, sound_first=True)
    facts = video_facts(data)
    assert abs(facts.seconds - 9) <= 0.2
    got = greys(data, 18, 2.0)
    assert np.abs(got - [STEP * i for i in shown(times, middles(facts.seconds, len(got)))]).max() <= 3


@pytest.mark.parametrize("format", ["matroska", "webm", "mp4", "mov", "avi", "mpegts", "flv", "nut"])
@pytest.mark.parametrize("sound", [1.0, 4.0, 12.0])
def test_sound_may_be_shorter_or_longer_than_the_picture(format, sound):
    codec = {"webm": "libvpx-vp9", "flv": "libx264", "mpegts": "libx264"}.get(format, "mpeg4")
    data = film(format=format, codec=codec, sound=sound)
    facts = video_facts(data)
    assert abs(facts.seconds - 4) <= 0.25
    got = greys(data, 8, 2.0)
    assert np.abs(got - [10, 35, 60, 85, 110, 135, 160, 185]).max() <= STEP + 5


def test_sound_outlasts_the_picture_where_the_container_does_not_tell():
    """Matroska without a length for each stream, as a browser's recorder writes it."""
    data = film(format="matroska", sound=12).replace(b"DURATION", b"XURATION")
    assert abs(video_facts(data).seconds - 4) <= 0.01
    assert len(read_video(data, 8, 2.0).frames) == 8


# How red above blue is seen, by the rows of the matrix (a, b, c, d): x' = a x + c y, y' = b x + d y.
RED_ABOVE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
RED_ABOVE[: HEIGHT // 2, :, 0] = RED_ABOVE[HEIGHT // 2 :, :, 2] = 255
RED_ABOVE[:, : WIDTH // 4, 1] = 255  # and a green bar at the left
TURNS = {
    "as it is": ((1, 0, 0, 1), lambda p: p),
    "a quarter clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "half": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "a quarter counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
    "twice as large": ((2, 0, 0, 2), lambda p: p),
    "a degree": ((0.99985, 0.01745, -0.01745, 0.99985), lambda p: p),
    "nothing": ((0, 0, 0, 0), lambda p: p),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_video_is_upright(turn, codec):
    matrix, see = TURNS[turn]
    data = with_matrix(film(frames=10, codec=codec, pictures=lambda i: RED_ABOVE), matrix)
    want = see(RED_ABOVE)
    facts = video_facts(data)
    assert (facts.height, facts.width) == want.shape[:2]
    frames = read_video(data, 2, 2.0).frames
    assert frames.shape[1:] == want.shape
    inner = np.abs(frames[0].astype(int) - want).max(-1) <= 60
    assert inner.mean() > 0.85
    small = read_video(data, 2, 2.0, max_pixels=1200).frames
    assert small.shape[1:3] in ((30, 40), (40, 30)) and (small.shape[1] < small.shape[2]) == (
        want.shape[0] < want.shape[1]
    )
    assert abs(small.mean() - want.mean()) < 12


@pytest.mark.parametrize("format", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_turn_that_ffmpeg_wrote_is_undone(format, degrees, mirrored):
    data = film(format=format, frames=5, pictures=lambda i: RED_ABOVE, turn=(degrees, mirrored, False))
    with av.open(io.BytesIO(data)) as container:
        side = next(container.decode(video=0)).side_data.get("DISPLAYMATRIX")
    # Matroska keeps the angle alone.
    m = [1, 0, 0, 0, 1, 0] if side is None else [v / 65536 for v in np.frombuffer(bytes(side), np.int32)[:6]]
    matrix = tuple(round(v) for v in (m[0], m[1], m[3], m[4]))
    (see,) = [see for name, (known, see) in TURNS.items() if known == matrix]
    want = see(RED_ABOVE)
    got = read_video(data, 1, 2.0).frames[0]
    assert got.shape == want.shape and (np.abs(got.astype(int) - want).max(-1) <= 60).mean() > 0.85


def test_other_angles_are_turned_within_the_frame():
    half = np.sqrt(0.5)
    data = with_matrix(film(frames=3, pictures=lambda i: RED_ABOVE), (half, half, -half, half))
    got = read_video(data, 1, 1.0).frames[0].astype(int)
    assert got.shape == (HEIGHT, WIDTH, 3)
    assert got[2, 2].max() < 40 and got[20, 36, 0] > 180 and got[32, 24, 2] > 180  # an empty corner; red to the right


@pytest.mark.parametrize("side", [16, 100, 3000])
def test_a_cover_is_not_the_film(side):
    data = with_cover(film(), side)
    facts = video_facts(data)
    assert (facts.height, facts.width, facts.seconds) == (HEIGHT, WIDTH, 4.0)
    assert np.abs(greys(data, 4, 1.0) - [25, 75, 125, 175]).max() < 4


def test_a_cover_alone_is_sound():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=48000)
        for i in range(50):
            piece = av.AudioFrame(format="fltp", layout="stereo", samples=1024)
            for plane in piece.planes:
                plane.update(bytes(plane.buffer_size))
            piece.rate, piece.pts = 48000, 1024 * i
            container.mux(audio.encode(piece))
        container.mux(audio.encode())
    for data in (out.getvalue(), with_cover(out.getvalue())):
        for read in (video_facts, lambda source: read_video(source, 4, 1.0)):
            with pytest.raises(UnreadableError, match=r"^video is audio, sound without a picture: give another file$"):
                read(data)


def test_of_two_pictures_the_larger_is_read():
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        streams = []
        for height, width in ((32, 32), (HEIGHT, WIDTH)):
            stream = container.add_stream("mpeg4", rate=10)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.disposition = 0
            streams.append(stream)
        for i in range(10):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.full((stream.height, stream.width, 3), 90, np.uint8), "rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    assert (video_facts(out.getvalue()).height, video_facts(out.getvalue()).width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("height, width", [(49, 65), (31, 63), (29, 101), (1, 1), (2, 3), (29, 28)])
def test_sizes_may_be_odd(height, width):
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, width // 2 :] = 200
    data = film(
        format="matroska", codec="ffv1", pixels="yuv444p", size=(height, width), frames=4, pictures=lambda i: picture
    )
    facts = video_facts(data)
    assert (facts.height, facts.width) == (height, width)
    frames = read_video(data, 2, 10.0).frames
    assert min(frames.shape[1:3]) >= 28
    if min(height, width) >= 28:
        assert frames.shape[1:3] == (height, width) and np.abs(frames[0].astype(int) - picture).max() <= 3


def test_pixels_that_are_not_square_are_left_as_coded():
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    data = film(frames=4, prepare=wide)
    assert read_video(data, 1, 1.0).frames.shape == (1, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("matrix, luma", [("bt709", (0.2126, 0.7152, 0.0722)), ("smpte170m", (0.299, 0.587, 0.114))])
@pytest.mark.parametrize("full", [False, True])
def test_colours_are_by_the_matrix_that_is_told(matrix, luma, full):
    """YUV by the standard's own formula, back to the colour that it was."""
    colour = np.array((200, 90, 40)) / 255
    y = np.dot(luma, colour)
    u, v = (colour[2] - y) / (2 - 2 * luma[2]), (colour[0] - y) / (2 - 2 * luma[0])
    values = [255 * y, 128 + 255 * u, 128 + 255 * v] if full else [16 + 219 * y, 128 + 224 * u, 128 + 224 * v]
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv444p"
        stream.codec_context.colorspace = {"bt709": 1, "smpte170m": 6}[matrix]
        stream.codec_context.color_range = 2 if full else 1
        for i in range(3):
            frame = av.VideoFrame(WIDTH, HEIGHT, "yuv444p")
            for plane, value in zip(frame.planes, values, strict=True):
                plane.update(bytes([round(value)]) * plane.buffer_size)
            frame.colorspace, frame.color_range = {"bt709": 1, "smpte170m": 6}[matrix], 2 if full else 1
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    got = read_video(out.getvalue(), 1, 1.0).frames[0, 20, 30]
    assert np.abs(got.astype(int) - (200, 90, 40)).max() <= 3


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    "container",
    ["mp4, index first", "mkv", "mkv, B frames", "webm, VP9", "avi", "flv", "nut", "ts", "mp4, fragments", "gif"],
)
def test_a_video_that_is_cut_is_told_or_shorter(container, share):
    """Where the container tells a length, a cut file is refused; where it tells none, it is a shorter film."""
    options = CONTAINERS[container][0]
    whole = film(**options)
    data = whole[: int(len(whole) * share)]
    try:
        facts = video_facts(data)
        frames = read_video(data, 8, 2.0).frames
    except UnreadableError as error:
        reason = str(error)
    else:
        reason = "read"
        assert facts.seconds < video_facts(whole).seconds + 0.11 and len(frames) >= 1
    told = container not in ("ts", "mp4, fragments", "gif", "flv", "nut") and share < 0.9
    assert reason in ("video truncated", "video corrupt") or (reason == "read" and not told)


@pytest.mark.parametrize("codec, fps", [("libx264", 10), ("mpeg2video", 25)])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_broadcast_may_be_tuned_in_at_any_packet(codec, fps, share):
    """What comes before its first key frame is passed over."""
    whole = film(format="mpegts", codec=codec, fps=fps, frames=50, gop=10, b_frames=2)
    start = int(len(whole) * share) // 188 * 188
    got = greys(whole[start:], 4, 2.0)
    assert len(got) >= 1 and (np.diff(got) > 0).all() and got[0] > 250 * (share - 0.1) and got[-1] < 252


def test_half_of_a_video_is_truncated():
    for container in ("mp4, index first", "mkv", "mkv, B frames", "webm, VP9", "avi"):
        whole = film(**CONTAINERS[container][0] | dict(frames=200))
        with pytest.raises(UnreadableError, match=r"^video truncated$"):
            read_video(whole[: len(whole) // 2], 8, 2.0)


def test_a_frame_too_large_for_the_memory_is_not_decoded():
    data = film(format="avi", codec="rawvideo", pixels="bgr24", frames=2)
    header = data.index(b"strf") + 8
    large = data[: header + 4] + (30000).to_bytes(4, "little") * 2 + data[header + 12 :]
    for read in (video_facts, lambda source: read_video(source, 4, 1.0)):
        with pytest.raises(UnreadableError, match=r"^video (corrupt|over 178 megapixels: make it smaller)$"):
            read(large)


def test_a_codec_that_is_unknown_is_told():
    data = film(format="avi", frames=4)
    for tag in (b"FMP4", b"fmp4"):
        data = data.replace(tag, b"ZZZZ")
    with pytest.raises(
        UnreadableError, match=r"^video (corrupt|is of a codec that FFmpeg cannot decode: save it as H\.264)$"
    ):
        read_video(data, 4, 1.0)


def test_metadata_that_is_no_text_is_passed_over():
    data = film()
    name = box(b"\xa9nam", box(b"data", bytes((0, 0, 0, 1, 0, 0, 0, 0)) + b"\xff\xfe\xff"))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tag = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", name)))
    index = data.index(b"moov")
    size = int.from_bytes(data[index - 4 : index], "big") + len(tag)
    data = data[: index - 4] + size.to_bytes(4, "big") + data[index:] + tag
    assert len(read_video(data, 4, 1.0).frames) == 4


def test_any_damage_is_unreadable_or_seen():
    """Bytes changed, cut and put in, anywhere: frames or an UnreadableError."""
    rng = np.random.default_rng(0)
    read = 0
    for options, _ in CONTAINERS.values():
        if options.get("codec") in ("libsvtav1", "libx265"):
            continue  # slow to make
        data = film(**options | dict(frames=8))
        for _ in range(6):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                damaged[place] = rng.integers(256)
            if rng.integers(3) == 0:
                del damaged[rng.integers(len(damaged)) :]
            try:
                video_facts(bytes(damaged))
                frames = read_video(bytes(damaged), 4, 2.0, max_pixels=5000).frames
            except UnreadableError:
                continue
            read += 1
            assert 1 <= len(frames) <= 4
    assert read > 20


def test_a_path_and_its_bytes_are_the_same(tmp_path):
    data = film()
    (tmp_path / "film").write_bytes(data)
    for source in (tmp_path / "film", str(tmp_path / "film")):
        assert np.array_equal(read_video(source, 8, 2.0).frames, read_video(data, 8, 2.0).frames)


def test_videos_of_more_than_60_kinds():
    """By what they are made of: containers and codecs, display matrices, rates, places of key frames."""
    kinds = [*(repr(o) for o, _ in CONTAINERS.values()), *map(repr, SEEKING.values()), *map(repr, HELD.items()), *TURNS]
    assert len(set(kinds)) >= 60
    assert len({o.get("format", "mp4") for o, _ in CONTAINERS.values()}) >= 15
    assert len({o.get("codec", "mpeg4") for o, _ in CONTAINERS.values()}) >= 15
