"""Images as Pillow shows them: upright, in 8 bits, whatever their bits, wherever their orientation stands."""

import io
import struct

import made_images as made
import numpy as np
import pytest
from PIL import Image, ImageOps

from linmu_models.media import UnreadableError, fit, image_size, read_image

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def seen(data):
    """A file's pixels, which are of the size that its header told."""
    frames = read_image(data).frames
    assert frames.dtype == np.uint8 and frames.shape[0] == 1 and frames.shape[3] == 3
    assert image_size(data) == frames.shape[1:3]
    return frames[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("carrier", made.CARRIERS)
def test_an_image_is_upright(carrier, orientation):
    make, tolerance = made.CARRIERS[carrier]
    got, want = seen(make(orientation)), made.upright(made.pattern(), orientation)
    assert got.shape == want.shape
    # Away from the edges of the quarters, where a codec blurs.
    for y in (5, -6):
        for x in (5, -6):
            assert np.abs(got[y, x].astype(int) - want[y, x]).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order, type", [("<", "u2"), (">", "u2"), ("<", "i2"), ("<", "u4"), ("<", "f4")])
def test_wide_greys_are_upright(order, type, orientation):
    rows = np.arange(made.HEIGHT)[:, None] * 4 + np.arange(made.WIDTH)  # up to 219
    scale = {"u2": 257, "i2": 128, "u4": 1, "f4": 1}[type]
    field = made.entry(made.ORIENTATION, "short", orientation, order)
    samples = (rows * scale).astype(order + type)
    kind = {"u": 1, "i": 2, "f": 3}[type[0]]
    got = seen(made.tiff(samples, 8 * int(type[1]), order, sample_format=kind, extra=[field]))
    want = made.upright(np.repeat(rows[..., None], 3, 2), orientation)
    assert got.shape == want.shape and np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize("name", made.DEPTHS)
def test_an_image_has_its_brightness(name):
    data, want = made.DEPTHS[name]
    got = seen(data)
    assert np.abs(got.astype(int) - np.array(want)).max() <= 2


@pytest.mark.parametrize("carrier", ["JPEG", "PNG", "late PNG", "WebP", "TIFF"])
@pytest.mark.parametrize("name", made.BROKEN_EXIF)
def test_broken_metadata_keeps_no_picture_back(name, carrier):
    block, pattern = made.BROKEN_EXIF[name], made.pattern()
    if carrier == "JPEG":
        data = made.segment(made.jpeg(), b"Exif\0\0" + block)
    elif carrier == "WebP":
        data = made.saved(pattern, "WEBP", lossless=True, exif=block or b"\0")
    elif carrier == "TIFF":
        # The fields stand in the picture's own directory, as far as they are fields.
        fields = [block[10 + 12 * i : 22 + 12 * i] for i in range(2)]
        extra = [field for field in fields if len(field) == 12 and struct.unpack("<H", field[:2])[0] > 262]
        data = made.tiff(np.full((made.HEIGHT, made.WIDTH), 64, np.uint8), 8, extra=extra)
    else:
        data = made.with_chunk(made.saved(pattern, "PNG"), made.chunk(b"eXIf", block), carrier == "late PNG")
    try:
        got = seen(data)
    except UnreadableError:
        assert carrier == "TIFF"  # Here the fields are the file.
    else:
        assert got.shape[:2] in ((made.HEIGHT, made.WIDTH), (made.WIDTH, made.HEIGHT))


@pytest.mark.parametrize("name", made.BROKEN_EXIF)
def test_orientations_are_those_of_pillow(name):
    """Where Pillow itself gets through: it takes any kind of number, and no text."""
    data = made.segment(made.jpeg(), b"Exif\0\0" + made.BROKEN_EXIF[name])
    try:
        want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    except Exception:
        pytest.skip("Pillow does not get through")
    assert np.array_equal(seen(data), want)


def test_an_orientation_is_read_beside_broken_fields():
    for name in ("a rational as text", "a short as text", "text as a number", "a sub-directory that is text"):
        data = made.segment(made.jpeg(), b"Exif\0\0" + made.BROKEN_EXIF[name])
        assert seen(data).shape[:2] == (made.WIDTH, made.HEIGHT)


@pytest.mark.parametrize(
    "options",
    [
        {"icc_profile": b"not a profile"},
        {"icc_profile": b""},
        {"comment": b"\xff\xfe\x00"},
    ],
)
def test_broken_profiles_and_comments_are_passed_over(options):
    assert seen(made.jpeg(**options)).shape[:2] == (made.HEIGHT, made.WIDTH)


@pytest.mark.parametrize("packet", [b"", b"\xff\xfe", b'tiff:Orientation="', b'tiff:Orientation="9"', b"<x" * 9999])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP", "TIFF"])
def test_broken_xmp_is_passed_over(format, packet):
    if format == "PNG":
        data = made.with_chunk(made.saved(made.pattern(), "PNG"), made.itxt(packet))
    elif format == "TIFF":
        data = made.saved(made.pattern(), "TIFF", tiffinfo={700: packet or b"\0"})
    else:
        data = made.saved(made.pattern(), format, xmp=packet or b"\0")
    assert seen(data).shape[:2] == (made.HEIGHT, made.WIDTH)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_an_animation_the_first_picture_is_seen(format):
    pictures = [Image.new("RGB", (64, 48), (60 * i, 0, 0)) for i in (1, 2, 3)]
    got = seen(made.saved(pictures[0], format, save_all=True, append_images=pictures[1:], duration=100))
    assert got.shape == (48, 64, 3) and np.abs(got[..., 0].astype(int) - 60).max() <= 4


def test_small_images_are_enlarged_and_their_size_is_told():
    for size in ((1, 1), (10, 20), (27, 2700), (3, 299)):
        data = made.saved(Image.new("RGB", size), "PNG")
        assert seen(data).shape[:2] == fit(*size[::-1], None)
    data = made.saved(Image.new("RGB", (1, 101)), "PNG")
    for read in (read_image, image_size):
        with pytest.raises(UnreadableError, match=r"^too elongated$"):
            read(data)


def test_any_damage_is_unreadable_or_seen():
    """Bytes changed, cut and put in, anywhere: a picture or an UnreadableError, and one size."""
    files = [make(6) for make, _ in made.CARRIERS.values()] + [data for data, _ in made.DEPTHS.values()]
    rng = np.random.default_rng(0)
    read = 0
    for data in files:
        for _ in range(6):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 400), 3):
                damaged[place] = rng.integers(256)
            if rng.integers(2):
                del damaged[rng.integers(len(damaged)) :]
            try:
                size = image_size(bytes(damaged))
                if size[0] * size[1] > 10**7:
                    continue  # right, but slow
                frames = read_image(bytes(damaged)).frames
            except UnreadableError:
                continue
            read += 1
            assert frames.shape[1:3] == size
    assert read > 50
