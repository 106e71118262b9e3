"""A clip -> pictures that show it: a contact sheet of its frames, and an animation that browsers play."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

GAP_PX = 2
"""Between the frames of a sheet, in pixels."""
GAP_LEVEL = 255


def contact_sheet(
    frames: UInt8[np.ndarray, "f h w 3"], columns: int | None = None
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Frames beside each other in reading order, `columns` to a row; None is one row."""
    num, height, width, _ = frames.shape
    columns = min(num, columns or num)
    rows = -(-num // columns)
    sides = rows * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX
    sheet = np.full((*sides, 3), GAP_LEVEL, np.uint8)
    for number, frame in enumerate(frames):
        top, left = (number // columns) * (height + GAP_PX), (number % columns) * (width + GAP_PX)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def animation(frames: UInt8[np.ndarray, "f h w 3"], rate: float) -> bytes:
    """An animated WebP, lossless, that plays over and over; the same bytes each time."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    stream = io.BytesIO()
    first.save(
        stream,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=round(1000 / rate),
        loop=0,
        lossless=True,
    )
    return stream.getvalue()
