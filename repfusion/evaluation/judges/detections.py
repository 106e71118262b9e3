"""What a detector finds in an image: boxes with a class, how sure it is, and, of some detectors, masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool

from repfusion.evaluation.suites.base import Image

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in px of the image."""


@dataclass(frozen=True, eq=False)
class Detection:
    """One thing that a detector found."""

    box: Box
    score: float
    """How sure the detector is, in [0, 1]."""
    mask: Bool[np.ndarray, "h w"] | None = None
    """Which pixels are the thing's; None of a detector of boxes alone."""


class Detector(Protocol):
    """Finds things of named classes."""

    def __call__(self, image: Image, classes: Sequence[str]) -> Mapping[str, Sequence[Detection]]:
        """All things of these classes, the surest first, by class; a class without any may be left out."""
        ...


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, whose last row and column of pixels belong to them, as COCO's
    tools count; 0 where both are empty.
    """
    shared = _area(
        (
            max(first[0], second[0]),
            max(first[1], second[1]),
            min(first[2], second[2]),
            min(first[3], second[3]),
        )
    )
    union = _area(first) + _area(second) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0.0) * max(box[3] - box[1] + 1, 0.0)
