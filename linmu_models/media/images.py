"""Images: what Pillow reads, upright and in 8 bits of RGB."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import numpy as np

from .source import INSTALL, Clip, Source, check_pixels, check_positive, fit, opened, too_large

# Pillow's formats that are pixels, decoded in this process, the common ones first. EPS would start Ghostscript.
_FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "ICNS", "CUR", "DIB", "PSD",
    "TGA", "PCX", "DCX", "SGI", "SUN", "XBM", "XPM", "DDS", "QOI", "MSP", "IM", "FLI", "PCD", "SPIDER", "FITS", "BLP",
    "FTEX", "PIXAR",
)  # fmt: skip
_ORIENTATION = 0x0112
_SAMPLE_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
# A float image is of 0 to 1, with some room for highlights; where it goes beyond, of as many bits as hold it.
_BRIGHTEST = 8.0


def _need_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(f"images need Pillow: {INSTALL}") from error


def _open(file: BinaryIO) -> Any:
    from PIL import Image

    Image.init()
    try:
        image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise too_large("image") from error
    check_pixels("image", *image.size)
    return image


def _orientation(image: Any) -> int:
    """1 to 8, as EXIF numbers them; metadata that is broken says nothing.

    To be asked before the pixels are decoded: both what reads a size and what reads an image then get the same answer.
    """
    from PIL import Image

    try:
        if image.format == "PNG" and "exif" not in image.info:
            _read_late_chunks(image)
        # The plain method: that of a PNG would decode it.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
        return next((number for number in range(2, 9) if value == number), 1)
    except Exception:  # whatever hostile metadata makes Pillow raise
        return 1


def _read_late_chunks(image: Any) -> None:
    """The metadata that a PNG has after its pixels, without decoding them."""
    from PIL import PngImagePlugin

    place = image.fp.tell()
    image.fp.seek(8)
    stream = PngImagePlugin.PngStream(image.fp)
    try:
        while True:
            name, start, length = stream.read()
            if name == b"IEND":
                break
            if name in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                stream.call(name, start, length)
            image.fp.seek(start + length + 4)
    except (struct.error, SyntaxError, ValueError, EOFError, OSError):
        pass  # cut short: decoding will tell
    finally:
        image.fp.seek(place)
    for key, value in stream.im_info.items():
        image.info.setdefault(key, value)


def image_size(source: Source) -> tuple[int, int]:
    """(height, width) of an image as `read_image` gives it, from its header.

    Raises:
        UnreadableError: as `read_image`, if the header shows it.
    """
    _need_pillow()
    with opened(source, "image") as file, _open(file) as image:
        if image.format in ("ICO", "ICNS"):
            image.load()  # Their headers need not be true.
        width, height = image.size
        if image.format == "TIFF":  # Here Pillow has swapped the sides, for some kinds of orientation.
            width, height = image.tag_v2[256], image.tag_v2[257]
        if _orientation(image) >= 5:  # These lie on their side.
            width, height = height, width
        return fit(height, width, None)


def read_image(source: Source, max_pixels: int | None = None) -> Clip:
    """Read an image, from a file or its bytes, upright and in RGB. Of an animation the first picture is read.

    The orientation is that of EXIF, else of XMP. Samples of more than 8 bits are scaled, not cut off:

    - 16 bits by their range;
    - 32 bits have no usual range: by that of 8, 16 or 32 bits, the first that holds them all;
    - floats by the range 0 to 1, unless they go far beyond.

    What is transparent is seen on white. Colour profiles are not applied. A picture with a side under 28 pixels is
    enlarged until it has 28. The bound on the size is 178 megapixels, about 3 GB.

    Of a damaged TIFF libtiff prints lines to stderr. Pillow has no switch for that, and libtiff's is one for the whole
    process, whose other threads may want them: they stay.

    Raises:
        UnreadableError: the image is missing, corrupt or cut short, too large, or too elongated.
        TypeError, ValueError: an argument is of another type, or `max_pixels` is not over 0.
    """
    _need_pillow()
    if max_pixels is not None:
        check_positive("max_pixels", max_pixels)
    from PIL import Image

    with opened(source, "image") as file:
        with _open(file) as image:
            orientation = _orientation(image)
            _scale_transparent(image)
            image.load()
            upright = _rgb(image)
            if image.format == "TIFF":
                orientation = 1  # Pillow has turned it.
        if orientation != 1:
            upright = upright.transpose(_turns()[orientation])
        height, width = fit(upright.height, upright.width, max_pixels)
        if (height, width) != (upright.height, upright.width):
            upright = upright.resize((width, height), Image.Resampling.BICUBIC)
        return Clip(np.asarray(upright)[None])


def _scale_transparent(image: Any) -> None:
    """The colour that a PNG calls transparent, of samples as in the file, to the 8 bits that Pillow compares it in.

    Of 16 bits the upper 8 are compared.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or not image.tile or key is None or isinstance(key, bytes):
        return
    raw = image.tile[0][3]
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = key * (255 // (2 ** int(raw[-1]) - 1))
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _turns() -> dict[int, Any]:
    from PIL.Image import Transpose as T

    return dict(
        zip(
            range(2, 9),
            (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90),
            strict=True,
        )
    )


def _rgb(image: Any) -> Any:
    """An image that is decoded, in RGB."""
    from PIL import Image

    if image.mode[0] in "IF":  # I, I;16, I;16B, F
        return Image.fromarray(_scaled(image)).convert("RGB")
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    if image.mode in ("P", "LA", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Any) -> np.ndarray:
    """(H, W) uint8 of grey samples that are wider."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    sample = tags.get(_SAMPLE_FORMAT, 1)
    signed = (sample[0] if isinstance(sample, tuple) else sample) == 2
    if image.mode == "F":
        white = _white_of_floats(values)
    else:
        bits = 16 if image.mode != "I" or image.format == "PPM" else 32
        depth = tags.get(_SAMPLE_BITS, bits)
        bits = depth[0] if isinstance(depth, tuple) else depth
        if bits == 32:
            if not signed:
                values = values.view(np.uint32)  # Pillow holds them as signed.
            brightest = int(values.max(initial=0))
            white = next((w for w in (255, 65535) if brightest <= w), 2**31 - 1 if signed else 2**32 - 1)
        else:
            white = 2 ** (bits - signed) - 1
    grey = np.nan_to_num(values.astype(np.float32 if white < 2**24 else np.float64), nan=0, posinf=white, neginf=0)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = white - grey  # Zero is white, which Pillow heeds for 8 bits only.
    out = (np.clip(grey / white, 0, 1) * 255 + 0.5).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        out[values == key] = 255
    return out


def _white_of_floats(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    brightest = float(finite.max(initial=0))
    if brightest <= _BRIGHTEST:
        return 1.0
    return next((w for w in (255.0, 65535.0) if brightest <= w), brightest)
