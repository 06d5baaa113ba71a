"""`linmu generate` of odd files: an answer, or one line that says why not."""

from __future__ import annotations

import io
import struct
import warnings

import pytest
from PIL import Image

from linmu_models.generate import generate_text, load
from linmu_models.media import Clip, read_image

from .folders import run


def _jpeg(entries: bytes, count: int) -> bytes:
    """A picture whose EXIF has these fields; it may have fewer than it says."""
    out = io.BytesIO()
    Image.new("RGB", (80, 40)).save(out, "JPEG")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, count) + entries
    data = out.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def test_pictures_that_are_read_already_need_no_file(folders):
    model, processor = load(folders / "teacher", "cpu")
    picture, options = folders / "picture.png", {"max_new_tokens": 3, "do_sample": False}
    clip = read_image(picture)
    assert generate_text(model, processor, "why?", [clip], **options).text == (
        generate_text(model, processor, "why?", [picture], **options).text
    )
    film = Clip(clip.frames.repeat(2, axis=0), 1.0)
    assert generate_text(model, processor, "why?", videos=[film], **options).prompt_tokens > 8


ORIENTATION = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
WRONG_TYPE = _jpeg(ORIENTATION + struct.pack("<HHI", 0x11A, 2, 3) + b"72\0\0" + bytes(4), 2)
CUT = _jpeg(ORIENTATION, 9)


@pytest.mark.parametrize("data", [WRONG_TYPE, CUT], ids=["a field of a wrong type", "fields that are not there"])
def test_broken_metadata_is_no_reason(folders, tmp_path, data):
    (tmp_path / "picture.jpg").write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("generate", folders / "teacher", "--prompt", "why?", "--image", tmp_path / "picture.jpg",
            "--max-new-tokens", 1)  # fmt: skip
    assert not [w for w in caught if "PIL" in w.filename]


@pytest.mark.parametrize(
    "kind, name, data, reason",
    [
        ("image", "a.svg", b"<svg/>", "image is an SVG drawing: save it as PNG"),
        ("image", "a:b.jpg", WRONG_TYPE[:-40], "image corrupt"),
        (
            "video",
            "http:a.mp4",
            b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n",
            "video is a playlist: give a file that it names",
        ),
        ("video", "a.mp4", WRONG_TYPE, "video is an image: give it as an image"),
    ],
)
def test_an_unreadable_file_is_one_line(folders, tmp_path, monkeypatch, kind, name, data, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"^generate: ") as error:
        generate_text(None, None, "why?", **{f"{kind}s": [name]})
    assert str(error.value) == f"generate: {name}: {reason}"
    result = run("generate", folders / "teacher", "--prompt", "why?", f"--{kind}", name, status=1)
    assert result.stderr.splitlines()[-1] == f"linmu: generate: {name}: {reason}"
    assert "Traceback" not in result.stderr
