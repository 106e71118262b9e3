"""Clips of any length, rate and size -> frames of one length, rate and size, one at a time; and stored clips,
which have one, as arrays.

At each of the times i / rate of the wanted form stands the frame that the clip shows then. No frame is made
up: a clip of a lower rate than the wanted one is refused, as is one that is too short.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from repfusion.images.square import square
from repfusion.video.files import ClipHeader, EncodedClip, Frame, encode_clip
from repfusion.video.forms import ClipForm
from repfusion.video.limits import GIF_TICK_SEC, JITTER_SEC, MAX_CLIP_PIXELS, BadClip

RATE_ROOM = 0.02
"""Share by which a clip's own rate may lie below the wanted one: 23.976 frames a second count as 24."""


@dataclass(frozen=True)
class Fitted:
    """A clip in the wanted form: its file and what is said of it."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    original_sec: float
    original_rate: float


def fit_clip(data: bytes, form: ClipForm, size: int | None, max_pixels: int = MAX_CLIP_PIXELS) -> Fitted:
    """A clip as an mp4 of a form, decoded and encoded frame by frame: whatever its length, no more than a few
    of its frames are in memory.

    Args:
        data: an mp4, webm or gif.
        form: length, rate and quality.
        size: side in px of the squares that are cut from the middle of its frames; None keeps their size.
        max_pixels: most pixels of a frame.

    Raises:
        BadClip: where it has no frames of that form.
    """
    clip = EncodedClip(data, max_pixels, form.max_sec)
    _check(header := clip.header, form)
    sides: list[tuple[int, int]] = []
    original: list[tuple[int, int]] = []

    def fitted() -> Iterator[Frame]:
        for frame in _resampled(clip, form):
            own = frame if size is None else square(frame, size)
            original[:], sides[:] = [frame.shape[:2]], [own.shape[:2]]
            yield own

    encoded = encode_clip(fitted(), form.rate, form.quality)
    (height, width), (before_height, before_width) = sides[0], original[0]
    return Fitted(encoded, width, height, before_width, before_height, header.seconds, header.rate)


def _check(header: ClipHeader, form: ClipForm) -> None:
    """Raises BadClip where a clip has no frames of a form."""
    if form.variable_rate == "drop" and not header.is_constant:
        raise BadClip("variable_rate", f"{header.rate:.3g} frames a second on average, not evenly")
    if header.seconds < form.seconds - 0.5 / form.rate:
        raise BadClip("clip_too_short", f"{header.seconds:.3g} s, at least {form.seconds:g}")
    if header.rate < form.rate * (1 - RATE_ROOM):
        raise BadClip("rate_too_low", f"{header.rate:.4g} frames a second, at least {form.rate:g}")


def _resampled(clip: EncodedClip, form: ClipForm) -> Iterator[Frame]:
    """The frame that is on screen at each of the form's times. Raises BadClip where the file ends before."""
    room = GIF_TICK_SEC / 2 if clip.header.kind == "gif" else JITTER_SEC
    shown: Frame | None = None
    number = 0
    for stamp, frame in clip.frames():
        while shown is not None and number < form.num_frames and number / form.rate < stamp - room:
            yield shown
            number += 1
        shown = frame
        if number == form.num_frames:
            return
    # the last one stays on screen for as long as the frames before it
    while shown is not None and number < form.num_frames and number / form.rate < clip.header.seconds:
        yield shown
        number += 1
    if number < form.num_frames:
        raise BadClip("undecodable_clip", f"cut short: {number} of {form.num_frames} frames")


@dataclass(frozen=True)
class Clip:
    """A decoded clip of a constant rate."""

    frames: UInt8[np.ndarray, "f h w 3"]
    rate: float
    """Frames a second."""


def read_clip(data: bytes, max_pixels: int = MAX_CLIP_PIXELS, max_frames: int = 2048) -> Clip:
    """A clip of a constant rate as an array, which is filled frame by frame: nothing else holds it.

    Raises:
        BadClip: where it cannot be decoded, has more frames, or a rate that varies.
    """
    clip = EncodedClip(data, max_pixels)
    header = clip.header
    if header.num_frames > max_frames:
        raise BadClip("clip_too_long", f"{header.num_frames:,} frames, at most {max_frames:,}")
    if not header.is_constant:
        raise BadClip("variable_rate", f"{header.rate:.3g} frames a second on average, not evenly")
    return Clip(_filled((frame for _, frame in clip.frames()), header.num_frames), header.rate)


def _filled(frames: Iterable[Frame], num_frames: int) -> UInt8[np.ndarray, "f h w 3"]:
    """Frames as one array. Raises BadClip where they are more or fewer."""
    whole: np.ndarray | None = None
    number = 0
    for number, frame in enumerate(frames, start=1):
        if whole is None:
            whole = np.empty((num_frames, *frame.shape), np.uint8)
        if number <= num_frames:
            whole[number - 1] = frame
    if whole is None or number != num_frames:
        raise BadClip("undecodable_clip", f"{number} frames, its packets are {num_frames}")
    return whole
