"""Whoever reads an image, of whatever form, sees the picture that its plain twin shows."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from image_forms import FORMS, Form, badly_summed_png, encoded
from PIL import Image

from pipelines.sources.ingest import ImageFitter, IngestConfig
from pipelines.sources.raw_samples import SampleMaker
from pipelines.stages.curate import CurateConfig
from pipelines.stages.image_features import decode_image
from pipelines.stages.judge import judge

SMALL = 6
FIT = ImageFitter(IngestConfig(image_size=SMALL))
KEEP = SampleMaker(IngestConfig(image_size=None))


def stored(data: bytes) -> np.ndarray:
    """Pixels as they lie in the file, which is of RGB."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB" and image.format in ("JPEG", "MPO", "PNG", "WEBP")
        return np.asarray(image).astype(int)


def ingested_with_a_size(data: bytes) -> np.ndarray:
    return stored(FIT(data)[0])


def ingested_as_it_is(data: bytes) -> np.ndarray:
    members = KEEP("key", data, "caption", {})
    return stored(members[next(iter(members.keys() & {"jpg", "png", "webp"}))])


def hashed_by_judge(data: bytes) -> np.ndarray:
    verdict = judge({"png": data, "txt": b"x"}, CurateConfig(duplicates="near", min_side_px=1))
    assert verdict.reason is None and verdict.hash is not None
    return np.array([verdict.width, verdict.height, *(verdict.hash >> bit & 1 for bit in range(64))])


def encoded_as_features(data: bytes) -> np.ndarray:
    return decode_image({"jpg": data}, SMALL, "here").astype(int)


READERS = [ingested_with_a_size, ingested_as_it_is, hashed_by_judge, encoded_as_features]


@pytest.mark.filterwarnings("ignore:.*Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("seen", READERS)
def test_every_reader_sees_the_plain_twin(seen: Callable[[bytes], np.ndarray], name: str):
    form: Form = FORMS[name]
    found = seen(form.data)
    expected = seen(encoded(Image.fromarray(form.pixels.astype(np.uint8))))
    assert found.shape == expected.shape
    if seen is hashed_by_judge:
        assert (found[:2] == expected[:2]).all()
        # a bit right at the median may fall to its other side
        assert (found != expected).sum() <= (8 if form.tolerance else 0)
    else:
        # resizing rounds once more
        assert np.abs(found - expected).max() <= form.tolerance + (form.tolerance > 0)


def test_what_opencv_is_stricter_with_is_taken_as_the_decoder_takes_it():
    plain, badly_summed = FORMS["png"].data, badly_summed_png()
    assert FIT(badly_summed) == FIT(plain)
    assert (ingested_as_it_is(badly_summed) == ingested_as_it_is(plain)).all()


def test_without_a_size_only_plain_images_keep_their_bytes():
    for name in ("png", "jpeg", "progressive jpeg", "webp", "broken exif"):
        data = FORMS[name].data
        assert data in KEEP("key", data, "caption", {}).values()
    for name in ("png of exif 3", "grey 16 png", "alpha webp", "tiff", "grey png"):
        made = KEEP("key", FORMS[name].data, "caption", {})
        assert "png" in made and FORMS[name].data not in made.values()
