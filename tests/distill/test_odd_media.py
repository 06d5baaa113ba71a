"""A data set of odd files: what can be seen is trained on, what cannot is counted by its reason, and nothing ends a
run."""

import io
import struct
import zlib

import media
import pytest
from PIL import Image

from linmu_distill.data.records import JsonRecords, ParquetRecords
from linmu_distill.data.stream import Decoding, Packing, RecordStream, SetReader
from linmu_models.chat import ChatProcessor


def _jpeg(*fields):
    """A picture with these fields in its EXIF."""
    out = io.BytesIO()
    Image.new("RGB", (80, 40)).save(out, "JPEG")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(fields)) + b"".join(fields) + bytes(4)
    data = out.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _header(width, height):
    """The beginning of a PNG."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + _chunk(b"IDAT", b"")
    )


TURNED = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
LATE = (
    media.png(2)[:-12] + _chunk(b"eXIf", b"II*\0" + struct.pack("<IH", 8, 1) + TURNED + bytes(4)) + media.png(2)[-12:]
)
SEEN = {
    "a field of a wrong type": _jpeg(TURNED, struct.pack("<HHI", 0x11A, 2, 3) + b"72\0\0"),
    "an orientation in words": _jpeg(struct.pack("<HHI", 0x112, 2, 2) + b"6\0\0\0"),
    "an orientation after the pixels": LATE,
    "whole": media.png(1),
}
REFUSED = {
    "svg": (b"<svg/>", "image is an SVG drawing: save it as PNG"),
    "html": (b"<html>Not found</html>", "image is an HTML page: save what it shows"),
    "large": (_header(15000, 12000), "image over 178 megapixels: make it smaller"),
    "cut": (_header(60, 40), "image corrupt"),
    "thin": (_header(6000, 4), "too elongated"),
    "nothing": (b"\0", "image corrupt"),
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return ChatProcessor.load(media.qwen_folder(tmp_path_factory.mktemp("qwen")))


def test_pictures(tmp_path, processor):
    media.onevision(tmp_path / "odd.parquet", SEEN | {name: data for name, (data, _) in REFUSED.items()})
    records = ParquetRecords([str(tmp_path / "odd.parquet")], None)
    data = RecordStream(
        processor, [SetReader("odd", records, processor, Decoding(), Packing(4000, window=99), 0)], [1], 0
    )
    found = [c for samples in data.once(20) for c in samples]
    assert sum(data.counts["odd"][reason] for reason in {reason for _, reason in REFUSED.values()}) >= len(REFUSED)
    sizes = {c.turns[0][0].split("what is ")[1].rstrip("?"): c.media[0].frames.shape[1:3] for c in found}
    assert sizes == {
        "a field of a wrong type": (80, 40),
        "an orientation in words": (40, 80),
        "an orientation after the pixels": (60, 40),
        "whole": (40, 60),
    }
    for conversation in found:  # The length that was planned is the length that came.
        batch = processor([conversation])
        record = next(r for r in map(records.parse, records.rows(0)) if r.turns == conversation.turns)
        assert Decoding().tokens(record, processor) == batch["input_ids"].shape[1]


def test_videos(tmp_path, processor):
    video = media.write_video(tmp_path / "good.mkv")
    files = {
        "2024-05-01T12:30.mkv": (video.read_bytes(), None),
        "half.mkv": (video.read_bytes()[: video.stat().st_size // 2], "video truncated"),
        "page.mp4": (b"<html>Not found</html>", "video is an HTML page: save what it shows"),
        "list.mp4": (b"#EXTM3U\ngood.mkv\n", "video is a playlist: give a file that it names"),
        "picture.mp4": (media.png(1), "video is an image: give it as an image"),
        "sound.mp4": (b"RIFF\0\0\0\0WAVEfmt ", "video is audio, sound without a picture: give another file"),
        "none.mp4": (None, "video missing"),
    }
    for name, (data, _) in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    talks = [{"conversations": media.talk("<video>\nwhat?", "grey"), "video": name} for name in files]
    media.write_json(tmp_path / "v.json", talks)
    records = JsonRecords([str(tmp_path / "v.json")], str(tmp_path))
    odd = SetReader("odd", records, processor, Decoding(4, 2.0), Packing(4000), 0)
    data = RecordStream(processor, [odd], [1], 0)
    found = [c for samples in data.once(5) for c in samples]
    assert [len(c.media[0].frames) for c in found] == [4]
    assert all(data.counts["odd"][reason] >= 1 for _, reason in files.values() if reason)
