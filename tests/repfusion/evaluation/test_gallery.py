"""The picture shows the pixels, the marks and every word."""

import numpy as np
import pytest
from PIL import Image

from repfusion.evaluation.gallery import Tile, gallery, wrap


def images() -> list[np.ndarray]:
    return [np.full((32, 32, 3), value, np.uint8) for value in (0, 255)]


def test_gallery_shows_the_pixels_and_the_marks():
    captions = ["a black nothing", "a white nothing with a long prompt " * 3]
    tiles = [Tile(*one) for one in zip(images(), captions, [True, False], strict=True)]
    picture = gallery([("", tiles)], columns=2)
    colours = {colour for _, colour in picture.getcolors(1 << 16)}
    assert {(0, 0, 0), (255, 255, 255), (38, 140, 78), (200, 58, 48)} <= colours
    plain = gallery([("", [Tile(*one) for one in zip(images(), ("one", "two"), strict=True)])], columns=2)
    assert (38, 140, 78) not in {colour for _, colour in plain.getcolors(1 << 16)}
    assert plain.height < picture.height  # long prompts are wrapped, not cut


def test_rows_are_broken_at_the_width_and_a_title_takes_room_above():
    tile = Tile(images()[0], "one")
    assert gallery([("", [tile] * 4)], columns=2).size == gallery([("", [tile] * 2)] * 2, columns=2).size
    assert gallery([("title", [tile])]).height > gallery([("", [tile])]).height
    with pytest.raises(ValueError, match="a gallery of no tiles"):
        gallery([("empty", [])])


def test_wrap_keeps_every_word():
    lines = wrap("a purple triangle above a blue square", 12, len)
    assert lines == ["a purple", "triangle", "above a blue", "square"]


def test_each_titled_row_has_a_picture_of_its_own(tmp_path):
    """Which a tracker shows by task, with the steps."""
    from repfusion.evaluation.checkpoints import write_galleries

    tile = Tile(np.zeros((8, 8, 3), np.uint8), "a red circle")
    write_galleries([("two objects", [tile] * 2), ("scenes: counting", [tile])], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "galleries").iterdir()}
    assert names == {"two_objects.png", "scenes_counting.png"}
    sizes = [
        Image.open(tmp_path / "out" / name).size for name in ("gallery.png", "galleries/two_objects.png")
    ]
    assert sizes[0][1] > sizes[1][1]
    write_galleries([("", [tile])], tmp_path / "plain")
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["gallery.png"]
