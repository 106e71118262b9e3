"""Every form of a picture gives the same pixels; every other file is refused by reason."""

import io
import time
import warnings

import numpy as np
import pytest
from image_forms import (
    FORMS,
    IMAGE,
    POSTSCRIPT,
    RGB,
    badly_summed_png,
    encoded,
    gif_of_comments,
    jpeg_of_scans,
)
from PIL import Image, PngImagePlugin

from repfusion.images import decode
from repfusion.images.decode import EncodedImage, is_plain_png, png_text, read_image, read_pixels
from repfusion.images.limits import BadImage

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def reason(data: bytes, **limits: int) -> str | None:
    """Why bytes are refused; also whether both functions say so."""
    reasons = []
    for read in (read_image, read_pixels):
        try:
            read(data, **limits)
            reasons.append(None)
        except BadImage as error:
            assert error.detail and " 0x" not in error.detail
            reasons.append(error.reason)
    assert reasons[0] == reasons[1]
    return reasons[0]


@pytest.mark.filterwarnings("ignore:.*Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_picture_becomes_its_upright_8_bit_rgb(name):
    form = FORMS[name]
    image = read_image(form.data)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert pixels.shape == form.pixels.shape
    assert np.abs(pixels.astype(int) - form.pixels).max() <= form.tolerance
    np.testing.assert_array_equal(read_pixels(form.data), pixels)


@pytest.mark.filterwarnings("ignore:.*Corrupt EXIF:UserWarning")
def test_what_is_plain_has_the_same_pixels_in_every_decoder():
    """Pillow without a word about orientation or alpha, and OpenCV."""
    import cv2

    plain = {name: form for name, form in FORMS.items() if EncodedImage(form.data).plain_extension}
    assert plain.keys() == {
        "png",
        "interlaced png",
        "jpeg",
        "progressive jpeg",
        "rgb jpeg",
        "several jpegs",
        "webp",
        "broken exif",
        "jpeg of exif 1",
    }
    for form in plain.values():
        with Image.open(io.BytesIO(form.data)) as image:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), read_pixels(form.data))
        opencv = cv2.imdecode(np.frombuffer(form.data, np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(opencv[..., ::-1], read_pixels(form.data))


def test_a_png_is_plain_by_its_chunks_alone():
    data = encoded(IMAGE)
    assert is_plain_png(data) and not is_plain_png(data[:-12]) and not is_plain_png(data[:30])
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "Raw profile type exif, and tRNS eXIf acTL")
    assert is_plain_png(encoded(IMAGE, pnginfo=info))


def test_what_opencv_refuses_is_left_to_pillow():
    """Very wide pictures, and pixels whose checksum is wrong."""
    wide = encoded(Image.new("RGB", (1_200_000, 1), (1, 2, 3)))
    assert is_plain_png(wide) and read_pixels(wide).shape == (1, 1_200_000, 3)
    data = badly_summed_png()
    assert is_plain_png(data)
    np.testing.assert_array_equal(read_pixels(data), RGB)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_no_known_range_are_refused(mode):
    with pytest.raises(BadImage, match=rf"undecodable_image.*mode {mode}\) have no known range"):
        read_image(encoded(IMAGE.convert(mode), "TIFF"))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_are_cut_short(kind):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)), kind)
    assert reason(data) is None
    for keep in (0, 1, 10, 40, len(data) // 2, len(data) - max(16, len(data) // 20)):
        with warnings.catch_warnings(action="ignore"):
            assert reason(data[:keep]) == "undecodable_image"


def test_nothing_but_the_listed_formats_is_opened_whatever_pillow_knows():
    """PostScript reaches Ghostscript, icons hold PNGs, FITS and others lie about their size."""
    Image.init()
    tried = 0
    for kind in sorted(Image.SAVE.keys() - set(KINDS) - {"MPO"}):
        try:
            with warnings.catch_warnings(action="ignore"):
                data = encoded(IMAGE, kind)
        except Exception:  # noqa: BLE001  no RGB, or not into memory
            continue
        tried += 1
        with pytest.raises(BadImage, match=r"\[undecodable_image\] no known format"):
            read_image(data)
    assert tried >= 10
    assert reason(POSTSCRIPT) == "undecodable_image"


def test_changed_bytes_give_a_picture_or_a_reason_and_nothing_else():
    for number, form in enumerate(FORMS.values()):
        rng = np.random.default_rng(number)
        for _ in range(12):
            data = np.frombuffer(form.data, np.uint8).copy()
            places = rng.integers(0, len(data), rng.integers(1, 8))
            data[places] = rng.integers(0, 256, len(places))
            with warnings.catch_warnings(action="ignore"):
                reason(data.tobytes(), max_pixels=1_000_000)


def test_a_text_is_read_before_and_after_the_pixels():
    info = PngImagePlugin.PngInfo()
    info.add_text("early", "é \U0001f600")
    info.add(b"tEXt", b"late\0more", after_idat=True)
    data = encoded(IMAGE, pnginfo=info)
    assert png_text(data, "early") == "é \U0001f600" and png_text(data, "late") == "more"
    assert png_text(data, "other") is png_text(encoded(IMAGE, "GIF"), "comment") is None
    with pytest.raises(BadImage):
        png_text(b"hello", "early")


def test_a_decoder_that_reads_for_ever_is_stopped(monkeypatch):
    """Pillow puts a GIF's comment together from pieces of 255 bytes, copying all before."""
    data = gif_of_comments(20 << 20)
    monkeypatch.setattr(decode, "MAX_SECONDS", 0.2)
    start = time.thread_time()
    with pytest.raises(BadImage, match=r"\[slow_to_decode\] not decoded in 0.2 s of computing"):
        read_image(data)
    assert time.thread_time() - start < 0.5


def test_a_png_bomb_is_refused_by_its_header():
    black = encoded(Image.new("1", (20_000, 20_000)))
    assert len(black) < 100_000
    start = time.thread_time()
    assert reason(black, max_pixels=100_000_000) == "too_many_pixels"
    assert reason(black) == "too_many_pixels"
    assert time.thread_time() - start < 0.1
    assert reason(encoded(IMAGE), max_pixels=RGB.size // 3 - 1) == "too_many_pixels"
    assert reason(encoded(IMAGE), max_pixels=RGB.size // 3) is None


def test_as_many_scans_as_encoders_write_and_many_more_are_decoded():
    np.testing.assert_array_equal(read_pixels(jpeg_of_scans(100)), read_pixels(jpeg_of_scans(10)))
    start = time.thread_time()
    assert reason(jpeg_of_scans(101)) == reason(jpeg_of_scans(10_000)) == "too_many_scans"
    assert time.thread_time() - start < 0.5


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [30, 90])
def test_baseline_jpegs_have_the_same_pixels_by_opencv(quality, subsampling, monkeypatch):
    """Whichever decoder reads them; what is progressive is Pillow's, whose time is bounded."""
    rng, called = np.random.default_rng(0), []
    by_opencv = decode._by_opencv
    monkeypatch.setattr(decode, "_by_opencv", lambda data: (called.append(1), by_opencv(data))[1])
    for progressive in (False, True):
        small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
        image, stream = small.resize((61, 83), Image.Resampling.BICUBIC), io.BytesIO()
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        image.save(stream, "JPEG", **options)
        expected = np.asarray(read_image(stream.getvalue()))
        np.testing.assert_array_equal(read_pixels(stream.getvalue()), expected)
        assert len(called) == 1
