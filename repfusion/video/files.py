"""Encoded clips <-> frames of upright 8-bit RGB, one at a time: the only file that opens them (PyAV).

What a file says of itself is checked before its frames are decoded: its packets are read through once, which
decodes nothing, and tell its length and whether its rate is constant. Sound is ignored. Rotation is applied,
transparency laid over white; pixels count as square. What is written depends on frames and settings alone:
one thread, and no time or version of the library in the file but x264's own.
"""

import io
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np
from av.codec.context import Flags
from av.video.stream import VideoStream
from jaxtyping import UInt8

from repfusion.images.limits import BadImage, check_pixels
from repfusion.video.limits import (
    CODECS,
    CONTAINERS,
    GIF_TICK_SEC,
    JITTER_SEC,
    MAX_CLIP_PIXELS,
    MAX_CLIP_SEC,
    MAX_PACKETS,
    BadClip,
    container_of,
)

Frame = UInt8[np.ndarray, "h w 3"]
MAX_SECONDS = 60.0
"""Computing time of a clip's decoder, looked at after each frame."""


@dataclass(frozen=True)
class ClipHeader:
    """What a clip says of itself: `num_frames` and `rate` (frames a second) are those of its packets."""

    kind: str
    width: int
    height: int
    num_frames: int
    seconds: float
    rate: float
    is_constant: bool
    """Whether its frames are equally far apart in time."""


class EncodedClip:
    """A clip whose packets were read through and found within the limits; nothing is decoded yet.

    Args:
        data: the file's bytes.
        max_pixels: most pixels of a frame.
        max_sec: longest clip, in seconds.

    Raises:
        BadClip: for no known kind of file, and for what is no picture that moves or more than it may be.
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_CLIP_PIXELS, max_sec: float = MAX_CLIP_SEC):
        self._data, self._max_pixels = data, min(max_pixels, MAX_CLIP_PIXELS)
        self._kind = container_of(data)
        with _said(), self._open() as container:
            self.header = self._checked(container, max_sec)
        """What it says of itself."""

    def frames(self) -> Iterator[tuple[float, Frame]]:
        """Frames with the second at which each is shown, the first one's 0, decoded one at a time.

        Raises:
            BadClip: undecodable_clip, changing_size, slow_to_decode.
        """
        until, first, size = time.thread_time() + MAX_SECONDS, None, None
        with _said(), self._open() as container:
            for frame in container.decode(_picture(container)):
                if frame.is_corrupt:
                    raise BadClip("undecodable_clip", "a damaged frame")
                if frame.pts is None or frame.time is None:
                    raise BadClip("undecodable_clip", "a frame without a time")
                first = frame.time if first is None else first
                size = (frame.width, frame.height) if size is None else size
                if (frame.width, frame.height) != size:
                    raise BadClip(
                        "changing_size",
                        f"{size[0]} x {size[1]} px, then {frame.width} x {frame.height}",
                    )
                if time.thread_time() > until:
                    raise BadClip("slow_to_decode", f"not decoded in {MAX_SECONDS:g} s of computing")
                yield frame.time - first, _rgb(frame)

    def _open(self) -> Any:
        """The container; its decoders refuse a frame of more pixels than the limit."""
        options = {"max_pixels": str(self._max_pixels)}
        form = CONTAINERS[self._kind]
        return av.open(io.BytesIO(self._data), format=form, options=options, metadata_errors="replace")

    def _checked(self, container: Any, max_sec: float) -> ClipHeader:
        stream = _picture(container)
        width, height = stream.codec_context.width, stream.codec_context.height
        check_pixels(width, height, self._max_pixels)
        if width * height == 0:
            raise BadClip("undecodable_clip", f"frames of {width} x {height} px")
        stamps = self._stamps(container, stream)
        if not stamps:
            raise BadClip("no_frames", "a picture of no frames")
        gaps = [after - before for before, after in pairwise(stamps)]
        mean = math.fsum(gaps) / len(gaps) if gaps else _last_sec(stream)
        jitter = GIF_TICK_SEC if self._kind == "gif" else JITTER_SEC
        is_constant = all(abs(gap - mean) <= jitter for gap in gaps)
        seconds = stamps[-1] - stamps[0] + mean
        if seconds > max_sec:
            raise BadClip("clip_too_long", f"{seconds:.1f} s, at most {max_sec:g}")
        return ClipHeader(self._kind, width, height, len(stamps), seconds, 1 / mean, is_constant)

    def _stamps(self, container: Any, stream: VideoStream) -> list[float]:
        """When the frames are shown, in seconds and in order, as the packets say."""
        tick, found = stream.time_base, set()
        assert tick is not None
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:  # the end, and what an edit list leaves out
                continue
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None:
                raise BadClip("undecodable_clip", "frames without times")
            found.add(stamp)
            if len(found) > MAX_PACKETS:
                raise BadClip("clip_too_long", f"more than {MAX_PACKETS:,} frames")
        return [float(stamp * tick) for stamp in sorted(found)]


def encode_clip(frames: Iterable[Frame], rate: float, quality: int | None = None) -> bytes:
    """An mp4 (H.264) of frames of one size, which may come one at a time: the same bytes each time.

    Args:
        rate: frames a second.
        quality: x264's constant rate factor, 0 to 51, lower is better, in YUV 4:4:4; None is lossless RGB.

    Raises:
        ValueError: for no frames.
    """
    stream = io.BytesIO()
    tick = Fraction(1) / Fraction(rate).limit_denominator(1001)
    lossless = quality is None
    form = "rgb24" if lossless else "yuv444p"
    options = {"qp": "0"} if lossless else {"crf": str(quality)}
    with av.open(stream, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        written: VideoStream | None = None
        for number, pixels in enumerate(frames):
            if written is None:
                written = container.add_stream("libx264rgb" if lossless else "libx264", 1 / tick, options)
                written.height, written.width = pixels.shape[:2]
                written.pix_fmt = form
                written.codec_context.thread_count = 1
                written.codec_context.flags |= Flags.bitexact
                written.codec_context.time_base = tick
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if not lossless:
                frame = frame.reformat(format=form, threads=1)
            frame.pts, frame.time_base = number, tick
            container.mux(written.encode(frame))
        if written is None:
            raise ValueError("a clip of no frames")
        container.mux(written.encode())
    return stream.getvalue()


def _picture(container: Any) -> VideoStream:
    """The stream of the moving picture. Raises BadClip."""
    streams = container.streams.video
    if not streams:
        if container.streams.audio:
            raise BadClip("sound_only", "sound and no picture")
        raise BadClip("no_frames", "no picture in it")
    stream = streams[0]
    context = stream.codec_context
    if context is None or context.codec.name not in CODECS:
        name = "unknown" if context is None else context.codec.name
        raise BadClip("undecodable_clip", f"a picture of the codec {name}, which is not read")
    context.thread_count = 1
    return stream


def _last_sec(stream: VideoStream) -> float:
    """How long a lone frame is shown, in seconds."""
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 1.0


def _rgb(frame: Any) -> Frame:
    """A decoded frame upright, over white."""
    has_alpha = (
        any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    )
    if has_alpha:
        layers = frame.to_ndarray(format="rgba", threads=1)
        share = layers[..., 3:].astype(np.uint16)
        pixels = (layers[..., :3] * share + 255 * (255 - share) + 127) // 255
        pixels = pixels.astype(np.uint8)
    else:
        pixels = frame.to_ndarray(format="rgb24", threads=1)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


@contextmanager
def _said() -> Iterator[None]:
    """Whatever libav raises on hostile bytes as a BadClip."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except av.error.MemoryError as error:
        raise MemoryError(str(error)) from error  # it says something of the machine
    except (av.error.FFmpegError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise BadClip("undecodable_clip", getattr(error, "strerror", None) or str(error)) from error
