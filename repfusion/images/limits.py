"""What an encoded image may declare, told from its own bytes before a decoder sees them."""

import re
import struct
from collections.abc import Iterator

from PIL import TiffTags

MAX_PIXELS = 178_956_970
"""Pillow reads no header that tells of more."""
MAX_SCANS = 100
"""Scans of a JPEG. Encoders write about ten. Each goes over the whole picture, and one that says nothing
takes a dozen bytes: a file of 250 kB can hold 10,000.
"""
MAX_TIFF_VALUES = 3 << 16
"""Values in a field of a TIFF: as many as the largest colour map has. Strips and tiles are fewer."""

JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""A marker that begins a segment, or the end mark."""
SCAN, END = 0xDA, 0xD9
TIFF_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}
"""None, CCITT's three, LZW, JPEG, deflate by two numbers, PackBits. libtiff knows more: old JPEG, WebP, LZMA,
whose dictionaries may take gigabytes.
"""
TIFF_JPEG = 7
PROGRESSIVE = b"\xff\xc2"


class BadImage(ValueError):
    """Bytes that become no image; `reason` is counted, `detail` is for people. Its text is `[reason] detail`.

    Reasons: undecodable_image (also where it is cut short), too_many_pixels, too_many_scans, slow_to_decode.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"[{self.reason}] {self.detail}"


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises BadImage: too_many_pixels."""
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width} x {height} px; max_pixels {max_pixels:,}")


def check_jpeg(data: bytes) -> bool:
    """Whether a file's first JPEG has its end mark. Raises BadImage: too_many_scans."""
    scans, at = 0, 2
    while found := JPEG_MARKER.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        if marker == END:
            return True
        if marker == SCAN and (scans := scans + 1) > MAX_SCANS:
            raise BadImage("too_many_scans", f"a JPEG of more than {MAX_SCANS} scans")
        at += int.from_bytes(data[at : at + 2], "big")
    return False


def check_tiff(data: bytes, max_pixels: int) -> None:
    """Raises BadImage for a TIFF whose first directory declares too much; other bytes pass.

    Pillow makes an object of each strip or tile when it opens a file, libtiff a buffer as large as a tile.
    """
    if data[:2] not in (b"II", b"MM") or not {42, 43} & {*data[2:4]}:
        return
    if 43 in data[2:4]:
        raise BadImage("undecodable_image", "a BigTIFF, which is for files above 4 GB")
    fields: dict[str, int] = {}
    for tag, kind, count, value in _tiff_entries(data):
        name = TiffTags.lookup(tag).name
        if count > MAX_TIFF_VALUES and kind not in (1, 2, 7):  # bytes, text and opaque data stay as they are
            raise BadImage(
                "undecodable_image", f"a TIFF with {count:,} values of {name}; at most {MAX_TIFF_VALUES:,}"
            )
        if name == "Compression" and value not in TIFF_COMPRESSIONS:
            raise BadImage("undecodable_image", f"a TIFF of compression {value}, which is not read")
        if name in ("ImageWidth", "ImageLength", "TileWidth", "TileLength"):
            if value == 0:
                raise BadImage("undecodable_image", f"a TIFF without a readable {name}")
        fields[name] = max(value, fields.get(name, 0))  # of a field given twice, readers may take either
    if fields.get("Compression") == TIFF_JPEG and PROGRESSIVE in data:
        raise BadImage("undecodable_image", "a TIFF with a progressive JPEG in it")
    if "TileWidth" in fields or "TileLength" in fields:
        _check_tiles(fields, max_pixels)


def _check_tiles(fields: dict[str, int], max_pixels: int) -> None:
    """Raises BadImage where the tiles of a TIFF cover more than may be decoded: they may be larger than
    it.
    """
    sides = [fields.get(name, 0) for name in ("ImageWidth", "ImageLength")]
    tiles = [fields.get(name, 1) for name in ("TileWidth", "TileLength")]
    width, height = (-(-side // tile) * tile for side, tile in zip(sides, tiles, strict=True))
    if width * height > max_pixels:
        raise BadImage(
            "too_many_pixels",
            f"{sides[0]} x {sides[1]} px in tiles of {tiles[0]} x {tiles[1]} px; max_pixels {max_pixels:,}",
        )


def _tiff_entries(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Tag, kind, number of values and value of each field of the first directory; the value is 0 where it is
    not one whole number.
    """
    order = "<" if data.startswith(b"II") else ">"
    header = struct.Struct(f"{order}HHI")
    start = struct.unpack(f"{order}I", data[4:8])[0] if len(data) >= 8 else len(data)
    number = struct.unpack_from(f"{order}H", data, start)[0] if start + 2 <= len(data) else 0
    for at in range(start + 2, min(start + 2 + 12 * number, len(data) - 11), 12):
        tag, kind, count = header.unpack_from(data, at)
        code = {1: "B", 3: "H", 4: "I"}.get(kind)
        value = 0 if code is None or count != 1 else struct.unpack_from(order + code, data, at + 8)[0]
        yield tag, kind, count, value
