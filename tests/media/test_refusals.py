"""What is no image and no video is told so in words that say what it is; no file opens another, or the network."""

import os
import socket
import struct

import made_images as made
import numpy as np
import pytest
from PIL import Image

from linmu_models.media import UnreadableError, image_size, read_image, read_video, video_facts

READERS = {
    "image": (read_image, image_size),
    "video": (lambda source: read_video(source, 4, 1.0), video_facts),
}
WAVE = b"RIFF" + struct.pack("<I", 1636) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
WAVE += b"data" + struct.pack("<I", 1600) + bytes(1600)
HTML = b"<!DOCTYPE html>\n<html><body>Not found</body></html>"
SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
PDF = b"%PDF-1.7\n%\xe2\xe3\n1 0 obj"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfilm.ts\n#EXT-X-ENDLIST\n"
FILM = b"\0\0\0\x18ftypmp42" + bytes(100)
TOO_LARGE = "over 178 megapixels: make it smaller"


def refusal(kind, source):
    """The one reason that all readers of a kind give."""
    reasons = set()
    for read in READERS[kind]:
        with pytest.raises(UnreadableError) as error:
            read(source)
        reasons.add(str(error.value))
    (reason,) = reasons
    assert "\n" not in reason and len(reason) < 80
    return reason


@pytest.mark.parametrize(
    "kind, data, reason",
    [
        ("image", b"", "image corrupt"),
        ("image", b"nonsense", "image corrupt"),
        ("image", bytes(5000), "image corrupt"),
        ("image", b"\x89PNG\r\n\x1a\n", "image corrupt"),
        ("image", made.jpeg()[:20], "image corrupt"),
        ("image", SVG, "image is an SVG drawing: save it as PNG"),
        ("image", b"\xef\xbb\xbf" + SVG, "image is an SVG drawing: save it as PNG"),
        ("image", b"<!-- drawn -->\n<SVG></SVG>", "image is an SVG drawing: save it as PNG"),
        ("image", HTML, "image is an HTML page: save what it shows"),
        ("image", b"\n <HTML>", "image is an HTML page: save what it shows"),
        ("image", PDF, "image is a PDF document: save its page as PNG"),
        ("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", "image is a PostScript drawing: save it as PNG"),
        ("image", b"\0\0\0\x18ftypheic" + bytes(99), "image is HEIC, which Pillow does not read: save it as JPEG"),
        ("image", b"\xff\x0a" + bytes(99), "image is JPEG XL, which Pillow does not read: save it as JPEG"),
        ("image", b"PK\x03\x04" + bytes(99), "image is a ZIP archive: unpack it"),
        ("image", FILM, "image is a video: give it as a video"),
        ("image", b"\x1a\x45\xdf\xa3" + bytes(99), "image is a video: give it as a video"),
        ("image", WAVE, "image is audio, sound without a picture: give another file"),
        ("video", b"", "video corrupt"),
        ("video", b"nonsense", "video corrupt"),
        ("video", bytes(5000), "video corrupt"),
        ("video", b"# A title\n\nWords, and more words.\n" * 40, "video corrupt"),
        ("video", FILM, "video corrupt"),
        ("video", HTML, "video is an HTML page: save what it shows"),
        ("video", WAVE, "video is audio, sound without a picture: give another file"),
        ("video", b"ID3\4" + bytes(99), "video is audio, sound without a picture: give another file"),
        ("video", SVG, "video is an SVG drawing: save it as PNG"),
        ("video", PDF, "video is a PDF document: save its page as PNG"),
        ("video", made.jpeg(), "video is an image: give it as an image"),
        ("video", made.saved(made.pattern(), "PNG"), "video is an image: give it as an image"),
        ("video", made.saved(made.pattern(), "TIFF"), "video is an image: give it as an image"),
        ("video", made.saved(made.pattern(), "WEBP"), "video is an image: give it as an image"),
        ("video", PLAYLIST, "video is a playlist: give a file that it names"),
        ("video", b"ffconcat version 1.0\nfile a.mp4\n", "video is a playlist: give a file that it names"),
        ("video", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
         "video is a playlist: give a file that it names"),
    ],
)  # fmt: skip
def test_words_say_what_a_file_is(tmp_path, kind, data, reason):
    assert refusal(kind, data) == reason
    (tmp_path / "film.mp4").write_bytes(data)
    assert refusal(kind, tmp_path / "film.mp4") == reason


@pytest.mark.parametrize("kind", READERS)
def test_words_say_what_a_path_is(tmp_path, kind):
    assert refusal(kind, tmp_path) == f"{kind} is a folder: name a file in it"
    for missing in ("none", "none/none", "a" * 5000, "nul\0in", "\udcff"):
        assert refusal(kind, f"{tmp_path}/{missing}") == f"{kind} missing"
    (tmp_path / "file").write_bytes(b"x")
    assert refusal(kind, tmp_path / "file/below") == f"{kind} missing"
    assert refusal(kind, "") == f"{kind} missing"
    os.mkfifo(tmp_path / "pipe")  # Opening it would wait for ever.
    assert refusal(kind, tmp_path / "pipe") == f"{kind} is not a regular file: copy it to one"
    assert refusal(kind, "/dev/zero") == f"{kind} is not a regular file: copy it to one"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_may_not_be_read(tmp_path, kind):
    (tmp_path / "file").touch(mode=0)
    assert refusal(kind, tmp_path / "file") == f"{kind} may not be read: see its permissions"


def _png_header(width, height):
    head = made.chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + made.chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    "data",
    [
        _png_header(15000, 12000),  # 180 megapixels
        _png_header(2**31 - 1, 2**31 - 1),
        struct.pack("<6sHHBBB", b"GIF89a", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\0;",
        made.tiff(np.zeros((4, 4), np.uint8), 8).replace(
            struct.pack("<HHII", 256, 4, 1, 4), struct.pack("<HHII", 256, 4, 1, 1 << 28)
        ),
        b"P6 20000 20000 255\n",
        struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 0),
    ],
    ids=["PNG", "largest PNG", "GIF", "TIFF", "PPM", "TGA"],
)
def test_an_image_too_large_for_the_memory_is_not_decoded(data):
    assert refusal("image", data) == f"image {TOO_LARGE}"


def test_a_compressed_text_is_not_unpacked_without_bound():
    import zlib

    bomb = made.chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 27)))
    for late in (False, True):
        data = made.with_chunk(made.saved(made.pattern(), "PNG"), bomb, late)
        if late:  # Its size is told by what stands before.
            assert image_size(data) == (made.HEIGHT, made.WIDTH)
            with pytest.raises(UnreadableError, match=r"^image corrupt$"):
                read_image(data)
        else:
            assert refusal("image", data) == "image corrupt"


@pytest.fixture
def alone(monkeypatch):
    """No socket can be opened; what tries fails the test."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "socket", refuse)
    yield
    assert not tried


@pytest.mark.parametrize(
    "name",
    ["2024-05-01T12:30:05", "-", "-film", "concat:a|b", "http:", "file:film", "pipe:0", "data:,x", "film%03d",
     "subfile,,start,1,end,9,,:film", "async:film", "*.film", "film?x=1#y", "fd:", "crypto:film", "é\u202efilm", "a b"],
)  # fmt: skip
def test_a_name_is_a_name(tmp_path, monkeypatch, alone, name):
    """Never a protocol, a pattern or an option, wherever one stands."""
    from made_videos import film

    monkeypatch.chdir(tmp_path)
    for path, data in ((f"{name}.mp4", film()), (f"{name}.png", made.saved(made.pattern(), "PNG"))):
        with open(path, "wb") as out:
            out.write(data)
    assert len(read_video(f"{name}.mp4", 4, 2.0).frames) == 4
    assert read_image(f"{name}.png").frames.shape == (1, made.HEIGHT, made.WIDTH, 3)


@pytest.mark.parametrize(
    "name",
    ["http://127.0.0.1:9/a.mp4", "https://localhost/a.png", "rtsp://127.0.0.1/a", "tcp://x", "concat:a.mp4|b.mp4",
     "pipe:0", "testsrc=size=64x48", "data:video/mp4;base64,AAAA"],
)  # fmt: skip
@pytest.mark.parametrize("kind", READERS)
def test_an_address_is_not_fetched(tmp_path, monkeypatch, alone, name, kind):
    monkeypatch.chdir(tmp_path)
    assert refusal(kind, name) == f"{kind} missing"


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile 'film.mp4'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm.mp4\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=9\nhttp://127.0.0.1:9/film.m3u8\n",
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">\n<BaseURL>film.mp4</BaseURL></MPD>',
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
        "[playlist]\nFile1=film.mp4\n",
        "RTSPtext\r\nrtsp://127.0.0.1/film\r\n",
        ";FFMETADATA1\ntitle=film\n",
        "film.mp4\n",
        "1\n00:00:00,000 --> 00:00:09,000\nfilm.mp4\n",
        "WEBVTT\n\n00:00.000 --> 00:09.000\nfilm.mp4\n",
    ],
)
@pytest.mark.parametrize("ending", ["mp4", "txt", "m3u8", "ffconcat", "sdp", "mpd"])
def test_a_text_opens_no_film(tmp_path, monkeypatch, alone, text, ending):
    """Beside it lies a film that it names; whoever reads it would see that one."""
    from made_videos import film

    monkeypatch.chdir(tmp_path)
    (tmp_path / "film.mp4").write_bytes(film())
    (tmp_path / f"list.{ending}").write_text(text)
    for source in (f"list.{ending}", text.encode()):
        assert refusal("video", source).startswith("video ")


def test_an_mp4_opens_no_file_that_it_refers_to(tmp_path, monkeypatch):
    """QuickTime's references to the data of another file."""
    from made_videos import HEIGHT, WIDTH, film

    data = film()
    place = data.index(b"dref") - 4
    size = struct.unpack(">I", data[place : place + 4])[0]
    name = b"film.mp4\0"
    url = struct.pack(">I4sI", 12 + len(name), b"url ", 0) + name
    new = struct.pack(">I4sII", 16 + len(url), b"dref", 0, 1) + url
    grown = len(new) - size
    data = bytearray(data[:place] + new + data[place + size :])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        at = data.index(box) - 4
        data[at : at + 4] = struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + grown)
    monkeypatch.chdir(tmp_path)
    white = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    (tmp_path / "film.mp4").write_bytes(film(pictures=lambda i: white))
    try:
        frames = read_video(bytes(data), 4, 1.0).frames
    except UnreadableError:
        return
    assert frames.max() < 240  # this file's own frames, none of which is white


@pytest.mark.parametrize("kind, name", [("image", "PIL"), ("video", "av")])
def test_what_is_to_be_installed_is_named(monkeypatch, kind, name):
    import sys

    for module in list(sys.modules):
        if module == name or module.startswith(f"{name}."):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    for read in READERS[kind]:
        with pytest.raises(
            ImportError, match=r'install linmu with its extra models, e\.g\. pip install "linmu\[models\]"'
        ):
            read(b"x")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_picture_at_the_bound_is_told_its_size():
    assert image_size(_png_header(13377, 13377)) == (13377, 13377)  # 178.9 megapixels


def test_memory_that_runs_out_is_a_reason(monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    monkeypatch.setattr(Image, "alpha_composite", full)
    with pytest.raises(UnreadableError, match=r"^image larger than the memory$"):
        read_image(made.saved(Image.new("L", (64, 48)), "PNG"))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that fails when it is read")
@pytest.mark.parametrize("kind", READERS)
def test_a_disk_that_fails_is_a_reason(kind):
    """Its bytes have places that cannot be read, and the first is one of them."""
    assert refusal(kind, "/proc/self/mem") == f"{kind} cannot be read: Input/output error"
