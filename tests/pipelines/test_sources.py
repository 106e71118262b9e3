"""Which samples curate drops."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.curate import CurateConfig, judge


def png(side: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"png": b"no image"}, "undecodable_image"),
        ({"png": png()[:-40]}, "undecodable_image"),
        ({"png": png(8)}, "image_too_small"),
        ({"json": b'{"original_width": 9, "original_height": 50}'}, "image_too_small"),
        ({"json": b"{"}, "undecodable_metadata"),
        ({"txt": b"  \n"}, "empty_caption"),
        ({"txt": b"ab"}, "caption_too_short"),
        ({"txt": b"a" * 99}, "caption_too_long"),
        ({"txt": b"\xff\xfe"}, "undecodable_caption"),
        ({"png": None}, "no_image"),
        ({"txt": None}, "no_caption"),
    ],
)
def test_curate_judges(change, reason):
    members = {"png": png(), "txt": b"a red circle", "json": b"{}"} | change
    config = CurateConfig(min_caption_chars=3, max_caption_chars=50)
    verdict = judge({name: data for name, data in members.items() if data is not None}, config)
    assert (verdict and verdict[0]) == reason
