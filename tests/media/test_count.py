"""How many odd images these tests read: counted as files that differ, not as parameters of tests."""

from __future__ import annotations

import io

import made_images as made
import pytest
from PIL import Image

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def images():
    """Name and bytes of each image of the tables."""
    for name, (make, _) in made.CARRIERS.items():
        yield from ((f"{name}, {k}", make(k)) for k in range(1, 9))
    yield from ((name, data) for name, (data, _) in made.DEPTHS.items())
    for name, block in made.BROKEN_EXIF.items():
        yield f"JPEG, {name}", made.segment(made.jpeg(), b"Exif\0\0" + block)
        yield f"PNG, {name}", made.with_chunk(made.saved(made.pattern(), "PNG"), made.chunk(b"eXIf", block))


def test_more_than_150_images_differ():
    files = dict(images())
    assert len(set(files.values())) >= 150
    # Without the eight orientations, which differ in a byte, nor a second file of the same metadata.
    alone = [make(6) for make, _ in made.CARRIERS.values()]
    alone += [data for data, _ in made.DEPTHS.values()]
    assert len(set(alone)) >= 80 and len(made.BROKEN_EXIF) >= 25


def test_formats_and_what_tells_an_orientation():
    formats = set()
    for _, data in images():
        with Image.open(io.BytesIO(data)) as image:
            formats.add(image.format)
    assert len(formats) >= 17, formats
    words = " ".join(made.CARRIERS)
    assert all(word in words for word in ("EXIF", "XMP", "eXIf", "TIFF", "raw profile", "as long", "as float"))
