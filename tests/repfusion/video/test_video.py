"""Clips in and out: what is read of any file, what is refused and why, and that the same clip gives the same
bytes.
"""

import hashlib
import io
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from repfusion.images.limits import BadImage
from repfusion.scenes.moving.clips import ClipWorldConfig, draw_clip, render_clip
from repfusion.video.files import EncodedClip, encode_clip
from repfusion.video.fitting import fit_clip, read_clip
from repfusion.video.forms import ClipForm
from repfusion.video.limits import BadClip
from repfusion.video.sheets import animation, contact_sheet

FRAMES = render_clip(draw_clip(0, kinds=("move",)))
FORM = ClipForm(num_frames=9, rate=8)


def written(
    frames: Sequence[np.ndarray],
    kind: str = "mp4",
    rate: float = 8,
    stamps: Sequence[int] | None = None,
    codec: str = "",
    rotation: int = 0,
) -> bytes:
    """A file as others write it; `stamps` are the frames' times in thousandths of a second."""
    if kind == "gif":
        return gif([Image.fromarray(frame) for frame in frames], rate)
    codec = codec or {"mp4": "libx264rgb", "webm": "libvpx-vp9"}[kind]
    form = {"libx264rgb": "rgb24", "libvpx-vp9": "gbrp"}.get(codec, "yuv420p")
    options = {"libx264rgb": {"qp": "0"}, "libvpx-vp9": {"lossless": "1"}}.get(codec, {})
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        track = container.add_stream(codec, Fraction(rate).limit_denominator(1001), options)
        track.height, track.width = frames[0].shape[:2]
        track.pix_fmt = form
        if rotation:
            track.set_display_rotation(rotation)
        if stamps is not None:
            track.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=form)
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()


def gif(frames: Sequence[Image.Image], rate: float) -> bytes:
    stream, milliseconds = io.BytesIO(), round(100 / rate) * 10
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, disposal=2)
    return stream.getvalue()


def sound(kind: str = "mp4") -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        track = container.add_stream("aac", 16000)
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, number * 1024
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()


def grey(levels: Sequence[int], height: int = 16, width: int = 16) -> list[np.ndarray]:
    return [np.full((height, width, 3), level, np.uint8) for level in levels]


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_every_kind_of_file_gives_its_frames(kind: str):
    data = written(FRAMES, kind)
    header = EncodedClip(data).header
    assert (header.kind, header.num_frames, header.width, header.height) == (kind, 9, 64, 64)
    assert header.rate == pytest.approx(8, rel=0.05) and header.is_constant
    clip = read_clip(data)
    if kind == "gif":  # of 256 colours
        assert np.abs(clip.frames.astype(int) - FRAMES).mean() < 1
    else:
        assert np.array_equal(clip.frames, FRAMES)


def test_what_is_stored_is_lossless_or_close_and_the_same_bytes_each_time_and_in_another_process():
    data = encode_clip(FRAMES, 8.0)
    assert np.array_equal(read_clip(data).frames, FRAMES) and read_clip(data).rate == pytest.approx(8)
    assert encode_clip(iter(FRAMES), 8.0) == data
    code = (
        "import hashlib\n"
        "from repfusion.scenes.moving.clips import draw_clip, render_clip\n"
        "from repfusion.video.files import encode_clip\n"
        "print(hashlib.sha256(encode_clip(render_clip(draw_clip(0, kinds=('move',))), 8)).hexdigest())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(data).hexdigest()
    lossy = encode_clip(FRAMES, 8.0, quality=18)
    assert encode_clip(FRAMES, 8.0, quality=18) == lossy != data
    assert np.abs(read_clip(lossy).frames.astype(int) - FRAMES).mean() < 4
    with pytest.raises(ValueError, match="no frames"):
        encode_clip([], 8.0)


def test_a_clip_is_brought_to_a_length_a_rate_and_a_size():
    """At 24 a second every third frame stands at the times of 8 a second, whatever the size."""
    frames = grey(range(0, 240, 8), 40, 60)
    fitted = fit_clip(written(frames, rate=24), FORM, 32)
    assert (fitted.width, fitted.height, fitted.original_width, fitted.original_height) == (32, 32, 60, 40)
    assert (fitted.original_rate, fitted.original_sec) == pytest.approx((24, 1.25))
    clip = read_clip(fitted.data)
    assert clip.frames.shape == (9, 32, 32, 3) and clip.rate == pytest.approx(8)
    assert clip.frames[:, 0, 0, 0].tolist() == [24 * i for i in range(9)]
    whole = read_clip(fit_clip(written(frames, rate=24), FORM, None).data).frames
    assert whole.shape == (9, 40, 60, 3)
    again = fit_clip(written(frames, rate=24), FORM, 32).data
    assert (
        again
        == fitted.data
        != fit_clip(written(frames, rate=24), FORM.model_copy(update={"quality": 20}), 32).data
    )


def test_at_each_time_stands_the_frame_that_is_on_screen_then():
    """Frames shown at 0, 100, 200, 290, 400, ... ms, asked for every 125 ms."""
    stamps = [0, 100, 200, 290, 400, 480, 600, 700, 800, 880, 1000, 1100]
    data = written(grey([10 * i for i in range(12)]), stamps=stamps)
    assert not EncodedClip(data).header.is_constant
    clip = read_clip(fit_clip(data, FORM, None).data)
    shown = [max(i for i, stamp in enumerate(stamps) if stamp <= 125 * number) for number in range(9)]
    assert (clip.frames[:, 0, 0, 0] // 10).tolist() == shown
    with pytest.raises(BadClip, match="variable_rate"):
        fit_clip(data, FORM.model_copy(update={"variable_rate": "drop"}), None)
    with pytest.raises(BadClip, match="variable_rate"):
        read_clip(data)


BAD = {
    "no clip": (lambda: b"neither this nor that" * 20, "undecodable_clip"),
    "nothing": (lambda: b"", "undecodable_clip"),
    "a picture": (lambda: _png(), "undecodable_clip"),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "undecodable_clip"),
    "cut short": (lambda: written(FRAMES)[:1500], "undecodable_clip"),
    "a head alone": (lambda: written(FRAMES, "webm")[:300], "undecodable_clip|no_frames"),
    "sound": (lambda: sound(), "sound_only"),
    "an hour": (lambda: written(grey([0, 9, 0]), stamps=[0, 1000, 3_700_000]), "clip_too_long"),
    "too long": (lambda: written(grey([0, 9, 0]), stamps=[0, 1000, 700_000]), "clip_too_long"),
    "too short": (lambda: written(FRAMES[:4]), "clip_too_short"),
    "too slow": (lambda: written(grey([0] * 9), rate=2), "rate_too_low"),
    "too large": (lambda: written(grey([0] * 9, 300, 400)), "too_many_pixels"),
    "a codec": (lambda: written(FRAMES, codec="mpeg2video", rate=25), "undecodable_clip"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_clip_of_the_form_is_refused_by_name(name: str):
    made, reason = BAD[name]
    with pytest.raises(BadImage, match=rf"\[({reason})\] \S"):
        fit_clip(made(), FORM, 32, max_pixels=100_000)


def _png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def test_a_size_that_changes_within_a_stream_is_refused():
    small, large = (
        written(grey([10] * 9, 16, 16), codec="mpeg4"),
        written(grey([90] * 9, 32, 32), codec="mpeg4"),
    )
    both = io.BytesIO()
    with av.open(both, "w", format="mp4") as out:
        track = None
        for number, part in enumerate((small, large)):
            with av.open(io.BytesIO(part)) as inside:
                for packet in inside.demux(video=0):
                    if packet.dts is None:
                        continue
                    track = track or out.add_stream_from_template(inside.streams.video[0])
                    # each part's own header goes before its first picture
                    extra = inside.streams.video[0].codec_context.extradata if packet.pts == 0 else b""
                    joined = av.Packet(bytes(extra or b"") + bytes(packet))
                    joined.time_base = packet.time_base
                    joined.pts = joined.dts = packet.dts + number * 9 * 2048
                    joined.stream, joined.is_keyframe = track, packet.is_keyframe
                    out.mux(joined)
    with pytest.raises(BadClip, match="changing_size"):
        read_clip(both.getvalue())


def test_turned_and_transparent_clips_come_upright_and_over_white():
    frames = [np.zeros((16, 32, 3), np.uint8) for _ in range(9)]
    for frame in frames:
        frame[:, :16] = (250, 0, 0)
    turned = read_clip(written(frames, rotation=90)).frames
    assert turned.shape == (9, 32, 16, 3)
    assert turned[0, -1, 0, 0] == 250 and turned[0, 0, 0, 0] == 0  # the left side went down
    layers = [Image.new("RGBA", (16, 16), (0, 200, 0, 255)) for _ in range(9)]
    for number, layer in enumerate(layers):
        layer.paste((0, 0, 0, 0), (0, 0, 8, 8 + number % 2))
    assert read_clip(gif(layers, 8)).frames[0, 0, 0].tolist() == [255, 255, 255]


def test_hostile_bytes_give_a_clip_or_a_reason_and_nothing_else():
    rng = np.random.default_rng(0)
    seeds = [written(FRAMES, kind) for kind in ("mp4", "webm", "gif")]
    reasons = set()
    for number in range(60):
        data = bytearray(seeds[number % 3])
        for at in rng.integers(8, len(data), 1 + number % 12):
            data[at] = rng.integers(256)
        try:
            fit_clip(bytes(data), FORM, 16)
        except BadImage as error:
            reasons.add(error.reason)
    assert "undecodable_clip" in reasons


def test_a_clip_is_shown_as_a_sheet_and_as_an_animation():
    sheet = contact_sheet(FRAMES, 4)
    assert sheet.shape == (3 * 66 - 2, 4 * 66 - 2, 3)
    assert np.array_equal(sheet[66:130, :64], FRAMES[4]) and (sheet[132:, 66:] == 255).all()
    assert contact_sheet(FRAMES).shape == (64, 9 * 66 - 2, 3)
    data = animation(FRAMES, 8.0)
    shown = Image.open(io.BytesIO(data))
    assert shown.n_frames == 9 and animation(FRAMES, 8.0) == data
    shown.seek(8)
    assert np.array_equal(np.asarray(shown.convert("RGB")), FRAMES[8]) and shown.info["duration"] == 125


@pytest.mark.slow
def test_a_long_clip_is_fitted_in_the_memory_of_a_few_frames_and_read_in_that_of_its_own():
    code = (
        "import resource, sys, numpy as np\n"
        "from repfusion.video.files import encode_clip\n"
        "from repfusion.video.fitting import fit_clip, read_clip\n"
        "from repfusion.video.forms import ClipForm\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "def drawn():\n"
        "    for i in range(81):\n"
        "        frame = np.zeros((480, 480, 3), np.uint8); frame[:, i * 5:i * 5 + 60] = 200; yield frame\n"
        "data = encode_clip(drawn(), 16, 20)\n"
        "before = peak()\n"
        "fit_clip(data, ClipForm(num_frames=81, rate=16, quality=20), 480)\n"
        "between = peak()\n"
        "clip = read_clip(data)\n"
        "print(clip.frames.nbytes / 2**20, between - before, peak() - between)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    whole, fitting, reading = map(float, done.stdout.split())
    print(f"81 frames at 480 px: {whole:.0f} MiB; fitting added {fitting:.0f}, reading {reading:.0f}")
    assert whole == pytest.approx(53.4, abs=0.1)
    assert fitting < whole and reading < 1.3 * whole


def test_a_seeded_clip_of_another_world_survives_storage():
    config = ClipWorldConfig(num_frames=17, rate=12.5, background="white")
    frames = render_clip(draw_clip(4, config), config)
    clip = read_clip(fit_clip(encode_clip(frames, 12.5), ClipForm(num_frames=17, rate=12.5), 64).data)
    assert np.array_equal(clip.frames, frames)
