"""One picture in the forms that images come in, each with the upright 8-bit RGB that it means; and files that
are made to harm a decoder.
"""

import io
import struct
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, PngImagePlugin

ORIENTATION = 0x0112
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


class Form(NamedTuple):
    """An encoded image, its pixels, and the largest difference that its encoding may make."""

    data: bytes
    pixels: np.ndarray
    tolerance: int = 0


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def smooth(seed: int = 7, size: tuple[int, int] = (48, 40)) -> np.ndarray:
    """Random colours, as smooth as lossy encoders like them."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC))


RGB = smooth()
IMAGE = Image.fromarray(RGB)
GREY = np.asarray(IMAGE.convert("L"))
GREY_IMAGE = Image.fromarray(GREY)
GREY_16 = np.random.default_rng(0).integers(0, 65536, GREY.shape).astype(np.uint16)
FROM_16 = np.rint(GREY_16 / 257)
ALPHA = np.random.default_rng(1).integers(0, 256, GREY.shape, dtype=np.uint8)
FADED = np.rint(RGB * (ALPHA[..., None] / 255) + 255.0 - ALPHA[..., None])
WHITE = np.full_like(RGB, 255)
BLACK_FRAME = Image.new("RGB", (48, 40))


def three(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, -1)


def with_alpha(image: Image.Image, alpha: np.ndarray = ALPHA) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[ORIENTATION] = orientation
    return made


def stored(orientation: int) -> Image.Image:
    """The picture as a camera that was held otherwise stores it: `orientation` brings it upright."""
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    turns = [
        lambda a: a,
        np.fliplr,
        lambda a: np.rot90(a, 2),
        np.flipud,
        lambda a: a.transpose(1, 0, 2),
        lambda a: np.rot90(a, -1),
        lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        np.rot90,
    ]
    return Image.fromarray(np.ascontiguousarray(turns[undo.get(orientation, 1) - 1](RGB)))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    width: int, height: int, depth: int, colour: int, rows: list[bytes], *more: bytes, interlace: int = 0
) -> bytes:
    """A PNG of unfiltered rows, with more chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def badly_summed_png() -> bytes:
    """A PNG whose pixels are all there, with a wrong checksum after them."""
    data = encoded(IMAGE)
    at = data.index(b"IEND") - 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def interlaced_png() -> bytes:
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    rows = [line[x::dx].tobytes() for x, y, dx, dy in passes for line in RGB[y::dy]]
    return png(48, 40, 8, 2, rows, interlace=1)


def late_exif_png(orientation: int) -> bytes:
    """Its orientation comes after the pixels."""
    data = encoded(stored(orientation))
    return data[:-12] + chunk(b"eXIf", exif(orientation).tobytes()[6:]) + data[-12:]


def text_png(image: Image.Image, name: str, value: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(name, value) if name.startswith("XML") else info.add_text(name, value)
    return encoded(image, pnginfo=info)


def raw_profile(orientation: int) -> str:
    """EXIF as ImageMagick puts it into a PNG's text."""
    data = exif(orientation).tobytes()
    return f"\nexif\n{len(data):8d}\n{data.hex()}\n"


def keyed_grey_png(depth: int) -> Form:
    """Grey of few bits whose value 0 is transparent."""
    top = (1 << depth) - 1
    values = np.arange(64).reshape(8, 8) % (top + 1) if depth < 16 else np.arange(64).reshape(8, 8) * 1040
    bits = "".join(f"{value:0{depth}b}" for value in values.ravel())
    row_bits = 8 * depth
    rows = [
        int(bits[i : i + row_bits], 2).to_bytes(row_bits // 8, "big") for i in range(0, len(bits), row_bits)
    ]
    shown = np.rint(values * 255 / top)
    shown[values == 0] = 255
    return Form(png(8, 8, depth, 0, rows, chunk(b"tRNS", struct.pack(">H", 0))), three(shown))


def keyed_rgb_png(depth: int) -> Form:
    """RGB whose colour (0, 0, 0) is transparent."""
    values = RGB.astype(int) * (257 if depth == 16 else 1)
    values[:10] = 0
    shown = RGB.copy()
    shown[:10] = 255
    rows = [line.astype(f">u{depth // 8}").tobytes() for line in values]
    return Form(png(48, 40, depth, 2, rows, chunk(b"tRNS", bytes(6))), shown)


def tiff(
    width: int, height: int, fields: list[tuple[int, int, int, int]], body: bytes, order: str = "<"
) -> bytes:
    """A TIFF of one strip; `fields` are (tag, kind, number of values, value or place)."""
    usual = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, 8),
        277: (3, 1, 1),
        278: (4, 1, height),
        279: (4, 1, len(body)),
    }
    usual |= {tag: (kind, count, value) for tag, kind, count, value in fields}
    body += bytes(len(body) % 2)
    entries = b""
    for tag, (kind, count, value) in sorted(usual.items()):
        packed = struct.pack(f"{order}I", value)
        if kind == 3 and count == 1:
            packed = struct.pack(f"{order}HH", value, 0)
        entries += struct.pack(f"{order}HHI", tag, kind, count) + packed
    start = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(usual)) + entries + bytes(4)
    return start + struct.pack(f"{order}I", 8 + len(body)) + body + directory


def tiff_12_bit() -> Form:
    values = np.arange(48 * 40).reshape(40, 48) * 2 % 4096
    bits = "".join(f"{value:012b}" for value in values.ravel())
    body = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return Form(tiff(48, 40, [(258, 3, 1, 12)], body), three(np.rint(values * 255 / 4095)))


def premultiplied_grey_tiff() -> Form:
    grey = (GREY * (ALPHA / 255)).astype(np.uint8)
    body = np.stack([grey, ALPHA], -1).tobytes()
    bits = struct.unpack("<I", struct.pack("<HH", 8, 8))[0]
    data = tiff(48, 40, [(258, 3, 2, bits), (277, 3, 1, 2), (338, 3, 1, 1)], body)
    return Form(data, three(grey.astype(int) + 255 - ALPHA), 1)


def bmp_with_alpha() -> bytes:
    pixels = np.asarray(with_alpha(IMAGE))[::-1, :, [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 48, 40, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks + bytes(52)
    return struct.pack("<2sIHHI", b"BM", 122 + len(pixels), 0, 0, 122) + header + pixels


def palette_with_alphas() -> Form:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    image.putpalette(bytes(range(192)))
    alphas = np.arange(64) * 4
    colours = np.arange(192).reshape(8, 8, 3)
    shown = np.rint(colours * (alphas / 255).reshape(8, 8, 1) + 255 - alphas.reshape(8, 8, 1))
    return Form(encoded(image, transparency=bytes(alphas.tolist())), shown)


def forms() -> dict[str, Form]:
    lossless = {"kind": "WEBP", "lossless": True, "exact": True}
    fine = {"kind": "JPEG", "quality": 100, "subsampling": 0}
    frames = {"save_all": True, "append_images": [BLACK_FRAME]}
    rgb_16 = np.random.default_rng(2).integers(0, 65536, (40, 48, 4)).astype(np.uint16)
    rgb_16[..., 3] = 257 * ALPHA.astype(np.uint16)
    over = np.rint(rgb_16[..., 2::-1] / 257 * (ALPHA[..., None] / 255) + 255.0 - ALPHA[..., None])
    keyed = np.zeros((40, 48), np.uint8)
    half = GREY > 128
    made = {
        "png": Form(encoded(IMAGE), RGB),
        "interlaced png": Form(interlaced_png(), RGB),
        "jpeg": Form(encoded(IMAGE, **fine), RGB, 3),
        "progressive jpeg": Form(encoded(IMAGE, progressive=True, **fine), RGB, 3),
        "rgb jpeg": Form(encoded(IMAGE, keep_rgb=True, **fine), RGB, 3),
        "several jpegs": Form(encoded(IMAGE, "MPO", quality=100, subsampling=0, **frames), RGB, 3),
        "webp": Form(encoded(IMAGE, **lossless), RGB),
        "bmp": Form(encoded(IMAGE, "BMP"), RGB),
        "tiff": Form(encoded(IMAGE, "TIFF"), RGB),
        "avif": Form(encoded(IMAGE, "AVIF", quality=100, subsampling="4:4:4"), RGB, 3),
        "gif": Form(encoded(Image.fromarray(three(GREY)), "GIF"), three(GREY), 4),
        "palette": Form(encoded(GREY_IMAGE.convert("P")), three(GREY)),
        "grey png": Form(encoded(GREY_IMAGE), three(GREY)),
        "grey jpeg": Form(encoded(GREY_IMAGE, "JPEG", quality=100), three(GREY), 3),
        "bilevel png": Form(encoded(Image.fromarray(half)), 255 * three(half)),
        "bilevel tiff": Form(encoded(Image.fromarray(half), "TIFF", compression="group4"), 255 * three(half)),
        "grey 16 png": Form(encoded(Image.fromarray(GREY_16)), three(FROM_16)),
        "grey 16 tiff": Form(encoded(Image.fromarray(GREY_16), "TIFF"), three(FROM_16)),
        "grey 16 tiff, big-endian": Form(
            tiff(48, 40, [(258, 3, 1, 16)], GREY_16.astype(">u2").tobytes(), ">"), three(FROM_16)
        ),
        "grey 16 tiff, white is 0": Form(
            tiff(48, 40, [(258, 3, 1, 16), (262, 3, 1, 0)], GREY_16.tobytes()), three(255 - FROM_16)
        ),
        "grey 12 tiff": tiff_12_bit(),
        "rgb 16 png": Form(
            cv2.imencode(".png", rgb_16[..., :3])[1].tobytes(), np.rint(rgb_16[..., 2::-1] / 257), 1
        ),
        "rgba 16 png": Form(cv2.imencode(".png", rgb_16)[1].tobytes(), over, 1),
        "rgb 16 tiff": Form(
            cv2.imencode(".tiff", rgb_16[..., :3])[1].tobytes(), np.rint(rgb_16[..., 2::-1] / 257), 1
        ),
        "cmyk jpeg": Form(encoded(IMAGE.convert("CMYK"), "JPEG", quality=100), RGB, 6),
        "cmyk tiff": Form(encoded(IMAGE.convert("CMYK"), "TIFF"), RGB),
        "ycbcr tiff": Form(encoded(IMAGE.convert("YCbCr"), "TIFF"), RGB, 3),
        "alpha png": Form(encoded(with_alpha(IMAGE)), FADED),
        "alpha webp": Form(encoded(with_alpha(IMAGE), **lossless), FADED),
        "alpha avif": Form(encoded(with_alpha(IMAGE), "AVIF", quality=100, subsampling="4:4:4"), FADED, 3),
        "alpha tiff": Form(encoded(with_alpha(IMAGE), "TIFF"), FADED),
        "alpha bmp": Form(bmp_with_alpha(), FADED),
        "grey alpha": Form(
            encoded(with_alpha(GREY_IMAGE)), np.rint(three(GREY * (ALPHA / 255) + 255.0 - ALPHA)), 1
        ),
        "premultiplied grey": premultiplied_grey_tiff(),
        "clear": Form(encoded(with_alpha(IMAGE, np.zeros_like(ALPHA))), WHITE),
        "transparent palette": Form(encoded(Image.fromarray(keyed, "P"), transparency=0), WHITE),
        "palette with alphas": palette_with_alphas(),
        "transparent gif": Form(encoded(Image.fromarray(keyed, "P"), "GIF", transparency=0), WHITE),
        "turned tiff": Form(encoded(stored(6), "TIFF", tiffinfo={ORIENTATION: 6}), RGB),
        "turned avif": Form(
            encoded(stored(6), "AVIF", quality=100, subsampling="4:4:4", exif=exif(6)), RGB, 3
        ),
        "turned webp": Form(encoded(stored(6), **lossless, exif=exif(6)), RGB),
        "turned webp, by xmp": Form(encoded(stored(8), **lossless, xmp=XMP.format(8).encode()), RGB),
        "turned png, late": Form(late_exif_png(6), RGB),
        "turned png, by xmp": Form(text_png(stored(5), "XML:com.adobe.xmp", XMP.format(5)), RGB),
        "turned png, by text": Form(text_png(stored(7), "Raw profile type exif", raw_profile(7)), RGB),
        "turned alpha": Form(
            encoded(with_alpha(IMAGE).transpose(Image.Transpose.ROTATE_180), exif=exif(3)), FADED
        ),
        "broken exif": Form(encoded(IMAGE, **fine, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), RGB, 3),
        "animated webp": Form(encoded(IMAGE, **lossless, **frames), RGB),
        "animated png": Form(encoded(IMAGE, **frames), RGB),
        "animated gif": Form(
            encoded(Image.fromarray(three(GREY)), "GIF", save_all=True, append_images=[BLACK_FRAME]),
            three(GREY),
            4,
        ),
        "animated avif": Form(encoded(IMAGE, "AVIF", quality=100, subsampling="4:4:4", **frames), RGB, 3),
    }
    made |= {f"png of exif {n}": Form(encoded(stored(n), exif=exif(n)), RGB) for n in range(1, 9)}
    made |= {f"jpeg of exif {n}": Form(encoded(stored(n), **fine, exif=exif(n)), RGB, 4) for n in range(1, 9)}
    made |= {f"keyed grey {depth}": keyed_grey_png(depth) for depth in (1, 2, 4, 8, 16)}
    made |= {f"keyed rgb {depth}": keyed_rgb_png(depth) for depth in (8, 16)}
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        made[name] = Form(encoded(IMAGE, "TIFF", compression=name), RGB)
    made["tiff with jpeg"] = Form(encoded(IMAGE, "TIFF", compression="jpeg", quality=100), RGB, 12)
    return made


FORMS = forms()


def jpeg_of_scans(number: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan comes again and again, each of a few bytes."""
    data = encoded(Image.new("RGB", (side, side), "gray"), "JPEG", progressive=True)
    last, more = data.rindex(b"\xff\xda"), number - data.count(b"\xff\xda")
    return data[:-2] + data[last:-2] * more + data[-2:]


def gif_of_comments(num_bytes: int) -> bytes:
    """A GIF with a comment that Pillow puts together from pieces, anew for each."""
    data = encoded(Image.new("L", (8, 8)), "GIF")
    image = data.index(b",", 13)
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * (num_bytes // 256) + b"\0"
    return data[:image] + comment + data[image:]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
