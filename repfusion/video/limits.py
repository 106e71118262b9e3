"""What an encoded clip may be, told from its own bytes before a decoder sees them."""

from repfusion.images.limits import BadImage

MAX_CLIP_PIXELS = 8192 * 4320
"""Pixels of a frame; a file that tells of more is not decoded."""
MAX_CLIP_SEC = 3600.0
"""Length of a clip in seconds that is looked into at all."""
MAX_PACKETS = 1 << 19
"""Packets of a clip's picture, which are about its frames: an hour at 120 a second has fewer."""
JITTER_SEC = 0.0015
"""Largest difference of a time between two frames from the mean one at a constant rate: WebM counts whole
milliseconds.
"""
GIF_TICK_SEC = 0.01
"""A GIF counts hundredths of a second, so that its frames may be as far from their places."""
CONTAINERS = {"mp4": "mov", "webm": "matroska", "gif": "gif"}
"""How each kind of file is called by libavformat. Its other readers, of playlists above all, which open what
they name, are no place for bytes from the web.
"""
CODECS = {"h264", "hevc", "mpeg4", "vp8", "vp9", "av1", "libdav1d", "gif", "mjpeg", "prores"}
"""Decoders of pictures that are let at bytes, as libavcodec names them."""


class BadClip(BadImage):
    """Bytes that become no clip; `reason` is counted, `detail` is for people.

    Reasons: undecodable_clip (also where it is cut short), no_frames, sound_only, too_many_pixels,
    clip_too_long, clip_too_short, rate_too_low, variable_rate, changing_size, slow_to_decode; of what a clip
    shows, black_clip and still_clip.
    """


def container_of(data: bytes) -> str:
    """The kind of a clip's file: `mp4` (QuickTime's too), `webm` (Matroska's too) or `gif`, whatever it is
    called. Raises BadClip: undecodable_clip.
    """
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "webm"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    raise BadClip("undecodable_clip", "no mp4, webm or gif")
