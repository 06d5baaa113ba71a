"""Image files with what cameras, scanners and hostile hands put into them, made up byte by byte."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 64
ORIENTATION = 0x0112
TYPES = {"byte": (1, "B"), "text": (2, "s"), "short": (3, "H"), "long": (4, "I"), "undefined": (7, "s"),
         "signed short": (8, "h"), "float": (11, "f"), "double": (12, "d")}  # fmt: skip


def pattern():
    """(H, W, 3): four quarters that no turn nor mirror takes to themselves."""
    out = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    half, middle = HEIGHT // 2, WIDTH // 2
    out[:half, :middle] = (255, 0, 0)
    out[:half, middle:] = (0, 255, 0)
    out[half:, :middle] = (0, 0, 255)
    out[half:, middle:] = (255, 255, 255)
    return out


def upright(pixels, orientation):
    """Stored pixels as they are to be seen, by the words of the EXIF standard: where row 0 and column 0 are shown."""
    return {
        1: lambda p: p,  # top, left
        2: lambda p: p[:, ::-1],  # top, right
        3: lambda p: p[::-1, ::-1],  # bottom, right
        4: lambda p: p[::-1],  # bottom, left
        5: lambda p: p.transpose(1, 0, 2),  # left, top
        6: lambda p: p[::-1].transpose(1, 0, 2),  # right, top
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: lambda p: p[:, ::-1].transpose(1, 0, 2),  # left, bottom
    }[orientation](pixels)


def entry(tag, kind, value, order="<"):
    """A field of an image file directory whose value has at most four bytes."""
    number, letter = TYPES[kind]
    if letter == "s":
        count, packed = len(value), value
    else:
        values = value if isinstance(value, tuple) else (value,)
        count, packed = len(values), struct.pack(f"{order}{len(values)}{letter}", *values)
    assert len(packed) <= 4
    return struct.pack(f"{order}HHI", tag, number, count) + packed.ljust(4, b"\0")


def exif(*entries, order="<", following=0):
    """An EXIF block (as TIFF, without its prefix) of one directory."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + struct.pack(f"{order}I", following)


def oriented(value, kind="short", order="<"):
    """An EXIF block that tells an orientation."""
    return exif(entry(ORIENTATION, kind, value, order), order=order)


def xmp(orientation, as_element=False):
    """An XMP packet that tells an orientation, as an attribute or an element."""
    inside = f"<tiff:Orientation>{orientation}</tiff:Orientation>" if as_element else ""
    attribute = "" if as_element else f' tiff:Orientation="{orientation}"'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{attribute}>{inside}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def saved(image, format, **options):
    """The bytes of a file."""
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, format, **options)
    return out.getvalue()


def segment(jpeg, data, marker=0xE1):
    """A JPEG with a segment put first."""
    return jpeg[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


def chunk(name, data):
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png, new, late=False):
    """A PNG with a chunk before or after its pixels."""
    place = png.rindex(b"IEND") - 4 if late else png.index(b"IDAT") - 4
    return png[:place] + new + png[place:]


def itxt(packet):
    """The chunk in which a PNG holds XMP."""
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)


def raw_profile(orientation, packed=False):
    """The text in which ImageMagick put EXIF before a PNG had a chunk for it."""
    block = oriented(orientation)
    text = b"\nexif\n%8d\n%s\n" % (len(block), block.hex().encode())
    return b"Raw profile type exif\0" + (b"\0" + zlib.compress(text) if packed else text)


def jpeg(**options):
    """The pattern as a JPEG."""
    return saved(pattern(), "JPEG", quality=95, subsampling=0, **options)


def tiff(samples, bits, order="<", sample_format=1, photometric=1, extra=()):
    """An uncompressed TIFF of (H, W) samples in one strip."""
    data = samples.tobytes() if isinstance(samples, np.ndarray) else samples
    height, width = (HEIGHT, WIDTH) if not isinstance(samples, np.ndarray) else samples.shape[:2]
    fields = [(256, "long", width), (257, "long", height), (258, "short", bits), (259, "short", 1),
              (262, "short", photometric), (273, "long", 0), (277, "short", 1), (278, "long", height),
              (279, "long", len(data)), (339, "short", sample_format)]  # fmt: skip
    entries = [entry(*field, order) for field in fields] + list(extra)
    start = 8 + 2 + 12 * len(entries) + 4
    entries[5] = entry(273, "long", start, order)
    return exif(*sorted(entries, key=lambda e: struct.unpack(f"{order}H", e[:2])), order=order) + data


# Each puts an orientation into a file: a name to (what makes the file, by how much its pixels may be off).
CARRIERS = {
    "JPEG, EXIF": (lambda k: segment(jpeg(), b"Exif\0\0" + oriented(k)), 12),
    "JPEG, EXIF big-endian": (lambda k: segment(jpeg(), b"Exif\0\0" + oriented(k, order=">")), 12),
    "JPEG, EXIF as long": (lambda k: segment(jpeg(), b"Exif\0\0" + oriented(k, "long")), 12),
    "JPEG, EXIF as float": (lambda k: segment(jpeg(), b"Exif\0\0" + oriented(float(k), "float")), 12),
    "JPEG, XMP attribute": (lambda k: segment(jpeg(), b"http://ns.adobe.com/xap/1.0/\0" + xmp(k)), 12),
    "JPEG, XMP element": (lambda k: segment(jpeg(), b"http://ns.adobe.com/xap/1.0/\0" + xmp(k, True)), 12),
    "JPEG, CMYK": (lambda k: saved(Image.fromarray(pattern()).convert("CMYK"), "JPEG", quality=95,
                                   exif=b"Exif\0\0" + oriented(k)), 16),
    "PNG, eXIf": (lambda k: with_chunk(saved(pattern(), "PNG"), chunk(b"eXIf", oriented(k))), 0),
    "PNG, eXIf after the pixels": (lambda k: with_chunk(saved(pattern(), "PNG"), chunk(b"eXIf", oriented(k)), True), 0),
    "PNG, XMP": (lambda k: with_chunk(saved(pattern(), "PNG"), itxt(xmp(k))), 0),
    "PNG, XMP after the pixels": (lambda k: with_chunk(saved(pattern(), "PNG"), itxt(xmp(k)), True), 0),
    "PNG, raw profile": (
        lambda k: with_chunk(saved(pattern(), "PNG"), chunk(b"tEXt", raw_profile(k))), 0),
    "PNG, packed raw profile after the pixels": (
        lambda k: with_chunk(saved(pattern(), "PNG"), chunk(b"zTXt", raw_profile(k, packed=True)), True), 0),
    "PNG, palette": (lambda k: saved(Image.fromarray(pattern()).convert("P", palette=Image.Palette.ADAPTIVE), "PNG",
                                     exif=oriented(k)), 2),
    "WebP, EXIF": (lambda k: saved(pattern(), "WEBP", lossless=True, exif=oriented(k)), 0),
    "WebP, XMP": (lambda k: saved(pattern(), "WEBP", lossless=True, xmp=xmp(k)), 0),
    "AVIF": (lambda k: saved(pattern(), "AVIF", quality=95, subsampling="4:4:4", exif=oriented(k)), 16),
    "TIFF": (lambda k: saved(pattern(), "TIFF", tiffinfo={ORIENTATION: k}), 0),
    "TIFF, LZW": (lambda k: saved(pattern(), "TIFF", compression="tiff_lzw", tiffinfo={ORIENTATION: k}), 0),
    "TIFF, XMP": (lambda k: saved(pattern(), "TIFF", tiffinfo={700: xmp(k)}), 0),
}  # fmt: skip


def _grey(value, dtype):
    return np.full((HEIGHT, WIDTH), value, dtype)


def _pgm(value, most):
    return f"P5 {WIDTH} {HEIGHT} {most}\n".encode() + _grey(value, ">u2" if most > 255 else "u1").tobytes()


def _palette(alpha):
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, 40, 80, 120])
    return saved(image, "PNG", transparency=alpha)


def _png_of(bits, colour, row, extra=b""):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress((b"\0" + row) * HEIGHT))
    return b"\x89PNG\r\n\x1a\n" + head + extra + data + chunk(b"IEND", b"")


def _float_tiff(value):
    return saved(Image.fromarray(_grey(value, np.float32)), "TIFF")


# A quarter of white is 64 in 8 bits; each is one colour, and (file, RGB).
DEPTHS = {
    "PNG, 1 bit": (_png_of(1, 0, b"\xff" * (WIDTH // 8)), 255),
    "PNG, 2 bits": (_png_of(2, 0, b"\x55" * (WIDTH // 4)), 85),
    "PNG, 4 bits": (_png_of(4, 0, b"\x44" * (WIDTH // 2)), 68),
    "PNG, 8 bits": (_png_of(8, 0, b"\x40" * WIDTH), 64),
    "PNG, 16 bits": (_png_of(16, 0, b"\x40\x00" * WIDTH), 64),
    "PNG, 16 bits, dark": (_png_of(16, 0, b"\x00\xff" * WIDTH), 1),
    "PNG, 16 bits, white": (_png_of(16, 0, b"\xff\xff" * WIDTH), 255),
    "PNG, 16 bits with alpha": (_png_of(16, 4, b"\x40\x00\xff\xff" * WIDTH), 64),
    "PNG, 16 bits, half clear": (_png_of(16, 4, b"\x00\x00\x80\x00" * WIDTH), 127),
    "PNG, 16 bits RGB": (_png_of(16, 2, b"\x40\x00\x80\x00\xc0\x00" * WIDTH), (64, 128, 192)),
    "PNG, 16 bits RGBA": (_png_of(16, 6, b"\x40\x00\x80\x00\xc0\x00\xff\xff" * WIDTH), (64, 128, 192)),
    "PNG, 16 bits, a grey that is clear": (_png_of(16, 0, b"\x40\x00" * WIDTH, chunk(b"tRNS", b"\x40\x00")), 255),
    "PNG, 8 bits, a grey that is clear": (_png_of(8, 0, b"\x40" * WIDTH, chunk(b"tRNS", b"\x00\x40")), 255),
    "PNG, 1 bit, a grey that is clear": (_png_of(1, 0, b"\x00" * (WIDTH // 8), chunk(b"tRNS", b"\x00\x00")), 255),
    "PNG, 2 bits, a grey that is clear": (_png_of(2, 0, b"\x55" * (WIDTH // 4), chunk(b"tRNS", b"\0\1")), 255),
    "PNG, 4 bits, a grey that is clear": (_png_of(4, 0, b"\x11" * (WIDTH // 2), chunk(b"tRNS", b"\0\1")), 255),
    "PNG, 4 bits, another grey is clear": (_png_of(4, 0, b"\x11" * (WIDTH // 2), chunk(b"tRNS", b"\0\2")), 17),
    "PNG, 16 bits, a colour that is clear": (
        _png_of(16, 2, b"\1\x2c\2\0\x80\x80" * WIDTH, chunk(b"tRNS", b"\1\x2c\2\0\x80\x80")), 255),
    "PNG, 16 bits, another colour is clear": (
        _png_of(16, 2, b"\x80\x2c" * 3 * WIDTH, chunk(b"tRNS", b"\x2c\x80" * 3)), 128),
    "PNG, a colour that is clear": (_png_of(8, 2, b"\1\2\3" * WIDTH, chunk(b"tRNS", b"\0\1\0\2\0\3")), 255),
    "PNG, palette": (_palette(0), (40, 80, 120)),
    "PNG, palette, all clear": (_palette(1), 255),
    "PNG, palette, half clear": (_palette(b"\xff\x80"), (147, 167, 187)),
    "PNG, LA clear": (saved(Image.new("LA", (WIDTH, HEIGHT), (0, 0)), "PNG"), 255),
    "PNG, RGBA half clear": (saved(Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 128)), "PNG"), 127),
    "WebP, clear": (saved(Image.new("RGBA", (WIDTH, HEIGHT), (9, 9, 9, 0)), "WEBP", lossless=True), 255),
    "GIF": (saved(Image.new("L", (WIDTH, HEIGHT), 64), "GIF"), 64),
    "GIF, clear": (saved(Image.new("P", (WIDTH, HEIGHT), 0), "GIF", transparency=0), 255),
    "BMP": (saved(Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)), "BMP"), (1, 2, 3)),
    "PGM": (_pgm(64, 255), 64),
    "PGM, 16 bits": (_pgm(0x4000, 65535), 64),
    "PGM, 16 bits, dark": (_pgm(0xFF, 65535), 1),
    "PGM, 10 bits": (_pgm(256, 1023), 64),
    "PGM, 12 bits": (_pgm(1024, 4095), 64),
    "PGM, in words": (f"P2 {WIDTH} {HEIGHT} 65535\n".encode() + b"16384 " * WIDTH * HEIGHT, 64),
    "PPM, 16 bits": (f"P6 {WIDTH} {HEIGHT} 65535\n".encode() + b"\x40\x00\x80\x00\xc0\x00" * WIDTH * HEIGHT,
                     (64, 128, 192)),
    "PFM": (f"Pf\n{WIDTH} {HEIGHT}\n-1.0\n".encode() + _grey(0.25, "<f4").tobytes(), 64),
    "TIFF, 8 bits": (tiff(_grey(64, np.uint8), 8), 64),
    "TIFF, 8 bits, zero is white": (tiff(_grey(255 - 64, np.uint8), 8, photometric=0), 64),
    "TIFF, 12 bits": (tiff(b"\x40\x04\x00" * (WIDTH * HEIGHT // 2), 12), 64),
    "TIFF, 16 bits": (tiff(_grey(0x4000, "<u2"), 16), 64),
    "TIFF, 16 bits, zero is white": (tiff(_grey(0xFFFF - 0x4000, "<u2"), 16, photometric=0), 64),
    "TIFF, 16 bits, big-endian": (tiff(_grey(0x4000, ">u2"), 16, ">"), 64),
    "TIFF, 16 bits, dark": (tiff(_grey(0xFF, "<u2"), 16), 1),
    "TIFF, 16 bits, signed": (tiff(_grey(0x2000, "<i2"), 16, sample_format=2), 64),
    "TIFF, 16 bits, LZW": (saved(_grey(0x4000, np.uint16), "TIFF", compression="tiff_lzw"), 64),
    "TIFF, 32 bits": (tiff(_grey(0x40000000, "<u4"), 32), 64),
    "TIFF, 32 bits, bright": (tiff(_grey(0xC0000000, "<u4"), 32), 192),
    "TIFF, 32 bits, signed": (tiff(_grey(0x20000000, "<i4"), 32, sample_format=2), 64),
    "TIFF, 32 bits of 16": (tiff(_grey(0x4000, "<u4"), 32), 64),
    "TIFF, 32 bits of 8": (tiff(_grey(64, "<u4"), 32), 64),
    "TIFF, floats": (_float_tiff(0.25), 64),
    "TIFF, floats to 255": (_float_tiff(64), 64),
    "TIFF, floats to 65535": (_float_tiff(16384), 64),
    "TIFF, floats, too bright": (_float_tiff(1.5), 255),
    "TIFF, floats, negative": (_float_tiff(-1), 0),
    "TIFF, floats, not numbers": (_float_tiff(np.nan), 0),
    "TIFF, floats, infinite": (_float_tiff(np.inf), 255),
    "TIFF, CMYK": (saved(Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    "TIFF, Lab": (saved(Image.new("LAB", (WIDTH, HEIGHT), (127, 128, 128)), "TIFF"), 119),
    "TIFF, YCbCr": (saved(Image.new("YCbCr", (WIDTH, HEIGHT), (64, 128, 128)), "TIFF"), 64),
    "TIFF, RGBA": (saved(Image.new("RGBA", (WIDTH, HEIGHT), (9, 9, 9, 0)), "TIFF"), 255),
    "JPEG, grey": (saved(Image.new("L", (WIDTH, HEIGHT), 64), "JPEG"), 64),
    "JPEG, CMYK inverted, as Adobe": (saved(Image.new("CMYK", (WIDTH, HEIGHT), (0, 0, 0, 191)), "JPEG"), 64),
    "JPEG 2000": (saved(Image.new("RGB", (WIDTH, HEIGHT), (64, 128, 192)), "JPEG2000"), (64, 128, 192)),
    "JPEG 2000, 16 bits": (saved(_grey(0x4000, np.uint16), "JPEG2000"), 64),
    "AVIF": (saved(Image.new("RGB", (WIDTH, HEIGHT), (64, 64, 64)), "AVIF"), 64),
    "ICO": (saved(Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0)), "ICO", sizes=[(WIDTH, HEIGHT)]), 255),
    "ICNS": (saved(Image.new("RGB", (64, 64), (64, 128, 192)), "ICNS"), (64, 128, 192)),
    "TGA": (saved(Image.new("RGB", (WIDTH, HEIGHT), (64, 128, 192)), "TGA"), (64, 128, 192)),
    "PCX": (saved(Image.new("RGB", (WIDTH, HEIGHT), (64, 128, 192)), "PCX"), (64, 128, 192)),
    "SGI": (saved(Image.new("L", (WIDTH, HEIGHT), 64), "SGI"), 64),
    "XBM": (saved(Image.new("1", (WIDTH, HEIGHT), 1), "XBM"), 255),
    "DDS": (saved(Image.new("RGBA", (WIDTH, HEIGHT), (64, 128, 192, 255)), "DDS"), (64, 128, 192)),
    "QOI": (saved(Image.new("RGB", (WIDTH, HEIGHT), (64, 128, 192)), "QOI"), (64, 128, 192)),
}  # fmt: skip

_LONG = struct.pack("<HHI", 0x11A, 5, 1)
# Broken and hostile EXIF blocks; the picture's own orientation is 6 where they can still tell.
BROKEN_EXIF = {
    "a rational as text": exif(entry(ORIENTATION, "short", 6), entry(0x11A, "text", b"72\0")),
    "a short as text": exif(entry(ORIENTATION, "short", 6), entry(0x128, "text", b"in\0")),
    "text as a number": exif(entry(0x10F, "short", 7), entry(ORIENTATION, "short", 6)),
    "the orientation as text": oriented(b"6\0", "text"),
    "the orientation as bytes": oriented(b"\6\0", "undefined"),
    "the orientation as one byte": oriented(6, "byte"),
    "two orientations": oriented((6, 6)),
    "no orientation": exif(struct.pack("<HHII", ORIENTATION, 3, 0, 0)),
    "orientation 0": oriented(0),
    "orientation 9": oriented(9),
    "orientation 65535": oriented(65535),
    "a negative orientation": oriented(-1, "signed short"),
    "an orientation that is not a number": oriented(float("nan"), "float"),
    "a fraction of an orientation": oriented(6.5, "float"),
    "an unknown type": exif(struct.pack("<HHII", ORIENTATION, 99, 1, 6)),
    "a rational of nought": exif(_LONG + struct.pack("<I", 26)) + struct.pack("<II", 0, 0),
    "a rational beyond the end": exif(_LONG + struct.pack("<I", 1 << 30)),
    "a huge count": exif(struct.pack("<HHII", 0x10F, 2, 0xFFFFFFFF, 26)),
    "a directory that follows itself": exif(entry(ORIENTATION, "short", 6), following=8),
    "a sub-directory that is itself": exif(entry(ORIENTATION, "short", 6), entry(0x8769, "long", 8)),
    "a sub-directory beyond the end": exif(entry(ORIENTATION, "short", 6), entry(0x8769, "long", 1 << 30)),
    "a sub-directory that is text": exif(entry(ORIENTATION, "short", 6), entry(0x8769, "text", b"abc\0")),
    "a place that is text": exif(entry(ORIENTATION, "short", 6), entry(0x8825, "text", b"abc\0")),
    "cut in the directory": oriented(6)[:15],
    "cut in the header": b"II*\0\x08",
    "a directory beyond the end": b"II*\0" + struct.pack("<I", 1 << 30),
    "more fields than there are": b"II*\0" + struct.pack("<IH", 8, 60000) + entry(ORIENTATION, "short", 6),
    "nothing": b"",
    "zeros": bytes(64),
    "no EXIF": b"this is no EXIF at all, it is a sentence",
    "another byte order": b"XX*\0" + oriented(6)[4:],
}
