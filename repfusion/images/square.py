"""Pixels of any shape -> a square of a given side."""

import cv2
import numpy as np
from jaxtyping import UInt8


def square(image: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The middle of an image, resized to a square of that side in px."""
    height, width, _ = image.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    cut = image[top : top + short, left : left + short]
    if short == side:
        return np.ascontiguousarray(cut)
    return cv2.resize(cut, (side, side), interpolation=cv2.INTER_AREA if short > side else cv2.INTER_CUBIC)
