"""Frames -> whether they show anything, whether anything in them moves, and the picture they are known by."""

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from repfusion.config import Config
from repfusion.video.limits import BadClip
from repfusion.video.sheets import contact_sheet

CHANGED_LEVEL = 16
"""Difference of a channel, of 255, from which on a pixel counts as changed: more than compression makes."""
SHOWN = 4
"""Frames, evenly spread, that a clip is recognised by."""


class ClipRules(Config):
    """What a clip has to show."""

    black_level: float | None = Field(default=16.0, ge=0, le=255)
    """Mean brightness, of 255, that a frame of the clip has to exceed; None takes black ones."""
    still_share: float | None = Field(default=0.001, ge=0, lt=1)
    """Share of the pixels that have to differ from those of the first frame, in some frame; None takes still
    ones.
    """


def check_looks(frames: UInt8[np.ndarray, "f h w 3"], rules: ClipRules) -> None:
    """Looks at frames one by one. Raises BadClip: black_clip, still_clip."""
    brightest = max(float(frame.mean()) for frame in frames)
    if rules.black_level is not None and brightest <= rules.black_level:
        raise BadClip("black_clip", f"mean brightness {brightest:.1f} of 255, above {rules.black_level:g}")
    if rules.still_share is None:
        return
    changed = max(_changed(frames[0], frame) for frame in frames)
    if changed <= rules.still_share:
        raise BadClip("still_clip", f"{changed:.2%} of the pixels change, above {rules.still_share:.2%}")


def _changed(one: UInt8[np.ndarray, "h w 3"], other: UInt8[np.ndarray, "h w 3"]) -> float:
    """Share of the pixels in which two frames differ."""
    difference = np.maximum(one, other) - np.minimum(one, other)
    return float((difference.max(axis=-1) >= CHANGED_LEVEL).mean())


def known_by(frames: UInt8[np.ndarray, "f h w 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    """Four frames of a clip, first to last, two by two: an image that differs where motions do."""
    chosen = np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)
    return contact_sheet(frames[chosen], 2)
