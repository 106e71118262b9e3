"""Pictures that a program holds -> pixels as requests hold them."""

import io
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from repfusion.config import naming
from repfusion.images.decode import read_pixels
from repfusion.llm.chats.eyes import check_image

Picture = Image.Image | np.ndarray
UNSAVED = ("CMYK", "YCbCr", "HSV", "LAB")
"""Modes of pictures in memory that no PNG holds."""


def to_pixels(picture: Any) -> UInt8[np.ndarray, "h w 3"]:
    """A picture as requests hold it; PIL's of any mode become RGB as files do, arrays are that already.

    Raises:
        ValueError: it is neither, PIL's mode says no colours, or a side has one pixel.
    """
    if isinstance(picture, np.ndarray):
        check_image(picture)
        return picture
    if not isinstance(picture, Image.Image):
        raise ValueError(
            f"a {type(picture).__name__}; expected a PIL image or a uint8 array [h, w, 3], such as "
            "repfusion.images.decode.read_pixels makes of a file's bytes"
        )
    exif, stream = picture.getexif(), io.BytesIO()
    try:
        (picture.convert("RGB") if picture.mode in UNSAVED else picture).save(stream, "PNG", exif=exif)
    except OSError as error:
        raise ValueError(f"a PIL image of mode {picture.mode!r}: {error}; convert it to RGB") from error
    pixels = read_pixels(stream.getvalue())
    check_image(pixels)
    return pixels


def all_pixels(image: Any) -> tuple[UInt8[np.ndarray, "_ _ 3"], ...]:
    """Pictures, one or several or none, as requests hold them. Raises ValueError, which says which of them is
    none.
    """
    pictures = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    found = []
    for number, picture in enumerate(pictures, 1):
        with naming(f"image {number} of {len(pictures)}"):
            found.append(to_pixels(picture))
    return tuple(found)
