"""Encoded images from anywhere -> upright 8-bit RGB: the only file that opens them.

EXIF orientation is applied and transparency laid over white; grey, palettes, CMYK (Adobe's, which is
inverted) and 16-bit channels become 8-bit RGB; an animation gives its first frame. Colour profiles are
ignored: values count as sRGB's.
"""

import io
import re
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from repfusion.images.limits import MAX_PIXELS, BadImage, check_jpeg, check_pixels, check_tiff
from repfusion.images.rgb import PNG_HEADER, PNG_START, orientation, to_rgb

READERS = (
    JpegImageFile,
    PngImageFile,
    WebPImageFile,
    GifImageFile,
    BmpImageFile,
    TiffImageFile,
    AvifImageFile,
)
FORMATS = tuple(str(reader.format) for reader in READERS)
"""What bytes may be taken for, whatever their file is called. Pillow's other readers, PostScript's above all,
are no place for bytes from the web.
"""
MAX_SECONDS = 30.0
"""Computing time of a decoder, looked at as it reads on. Those of JPEG, PNG, GIF and BMP read 64 KiB at
a time or less; WebP's, AVIF's and libtiff's take a file at once and are bounded by its pixels alone.
"""
READS_A_LOOK = 32
"""Asking for the time takes longer than to read a few bytes of a header."""
PNG_CHUNK = struct.Struct(">I4s")
PNG_PLAIN = (8, 2, 0, 0)
"""Bit depth, colour type, compression and filter of 8-bit RGB. Pillow shows 16 bits as 8: only the
bytes tell.
"""
PNG_CHANGES = {b"tRNS", b"eXIf", b"acTL"}
"""Chunks that make another picture of a PNG's pixels: a transparent colour, an orientation, an animation."""
PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
PNG_ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Names of texts that may hold an orientation."""


def read_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image in mode RGB. Raises BadImage."""
    return EncodedImage(data, max_pixels).decode()


def read_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of `read_image`; those of a plain PNG or baseline JPEG by OpenCV, in a quarter and in half
    of the time. Raises BadImage.
    """
    if is_plain_png(data):
        check_pixels(*PNG_HEADER.unpack_from(data, len(PNG_START))[:2], max_pixels)
        if (pixels := _by_opencv(data)) is not None:
            return pixels
    image = EncodedImage(data, max_pixels)
    is_baseline = image.plain_extension == "jpg" and not image.opened.info.get("progressive")
    if is_baseline and (pixels := _by_opencv(data)) is not None:
        return pixels
    return np.asarray(image.decode())


def _by_opencv(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
    import cv2

    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def png_text(data: bytes, name: str) -> str | None:
    """The text chunk of a name, before or after a PNG's pixels; None without one. Raises BadImage."""
    image = EncodedImage(data)
    image.decode()
    text = image.opened.info.get(name)
    return text if isinstance(text, str) else None


class EncodedImage:
    """An image whose header was read and found within the limits; nothing is decoded yet.

    Args:
        data: the file's bytes.
        max_pixels: most that are decoded.

    Raises:
        BadImage: for no known format, and for what declares more than it may.
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS):
        self._data, self._stream = data, _TimedStream(data)
        check_tiff(data, max_pixels)
        with _reasons():
            self.opened = Image.open(self._stream, formats=FORMATS)
        check_pixels(*self.size, max_pixels)
        if self.opened.format == "PNG" and not data.startswith(PNG_START):
            raise BadImage("undecodable_image", "a PNG that does not begin with its header")
        self._is_jpeg = self.opened.format in ("JPEG", "MPO")  # an MPO is several JPEGs; the first counts
        self._has_end = self._is_jpeg and check_jpeg(data)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as stored; EXIF may have them change places."""
        return self.opened.size

    @cached_property
    def plain_extension(self) -> Literal["jpg", "png", "webp"] | None:
        """The extension of a file that every decoder reads as the same upright 8-bit RGB: a still JPEG, PNG
        or WebP without transparency or orientation, whole as far as its end tells. None for all others.
        """
        image = self.opened
        if image.mode != "RGB":
            return None
        if self._is_jpeg:
            return "jpg" if self._has_end and orientation(image) == 1 else None
        if image.format == "PNG":
            return "png" if is_plain_png(self._data) else None
        if isinstance(image, WebPImageFile) and not image.is_animated and orientation(image) == 1:
            is_whole = len(self._data) >= int.from_bytes(self._data[4:8], "little") + 8
            return "webp" if is_whole else None
        return None

    def decode(self) -> Image.Image:
        """The image in mode RGB. Raises BadImage."""
        with _reasons():
            self._stream.restart()
            self.opened.load()
            return to_rgb(self.opened, self._data)


def is_plain_png(data: bytes) -> bool:
    """Whether bytes are a PNG of 8-bit RGB that means no other picture than its pixels."""
    if not data.startswith(PNG_START) or len(data) < len(PNG_START) + PNG_HEADER.size:
        return False
    if PNG_HEADER.unpack_from(data, len(PNG_START))[2:6] != PNG_PLAIN:
        return False
    at = 8
    while at + 12 <= len(data):
        length, name = PNG_CHUNK.unpack_from(data, at)
        if name == b"IEND":
            return True
        if name in PNG_CHANGES or (name in PNG_TEXTS and data.startswith(PNG_ORIENTED, at + 8)):
            return False
        at += 12 + length
    return False


class _TimedStream(io.BytesIO):
    """Bytes that can be read for MAX_SECONDS of the thread's computing time: by a clock on the wall, a busy
    machine would drop images.
    """

    def __init__(self, data: bytes):
        super().__init__(data)
        self.restart()

    def restart(self) -> None:
        self._reads, self._until = 0, time.thread_time() + MAX_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads % READS_A_LOOK == 0 and time.thread_time() > self._until:
            raise BadImage("slow_to_decode", f"not decoded in {MAX_SECONDS:g} s of computing")
        return super().read(size)


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever Pillow raises on hostile bytes as a BadImage, without the addresses in memory that it
    names.
    """
    try:
        yield
    except (BadImage, MemoryError):
        raise  # too little memory says something of the machine
    except Image.UnidentifiedImageError as error:
        raise BadImage("undecodable_image", "no known format") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too_many_pixels", str(error)) from error
    # decoders raise anything on hostile bytes: it costs the image, and nothing else
    except Exception as error:
        detail = re.sub(r" ?<[\w.]+ object at 0x[0-9a-f]+>", "", str(error)) or type(error).__name__
        raise BadImage("undecodable_image", detail) from error
