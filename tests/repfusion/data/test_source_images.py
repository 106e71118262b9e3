"""Pictures of samples as training reads them, and the requests that are drawn with them."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_columns import READERS, folders
from tiny_training import npy, write_tar

from repfusion.data.dataset import ColumnDataset
from repfusion.data.readers import PROMPT_FEATURES, CaptionArray
from repfusion.data.recipe import RECONSTRUCTIONS, Recipe, RecipeConfig
from repfusion.request import Branch, Request
from repfusion.train import TrainConfig

COLUMNS = {PROMPT_FEATURES: READERS[PROMPT_FEATURES]}
SEEDS = range(300)


def picture(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4 + value % 3), (value, 0, 255 - value)).save(stream, kind)
    return stream.getvalue()


SHARDS = {
    "00000.tar": {"000000": ("png", []), "000001": ("jpg", [])},
    "00001.tar": {
        "000002": ("png", ["source.png"]),
        "000003": ("webp", ["source.png", "source2.jpg", "source3.png"]),
    },
}
"""Extension of the target and of the sources of each key: the first shard has no editing samples."""


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    for name, samples in SHARDS.items():
        rows = []
        for key, (target, sources) in samples.items():
            kinds = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
            own = {one: picture(50 * n, kinds[one.split(".")[1]]) for n, one in enumerate(sources, start=1)}
            own[target] = picture(9 + int(key), kinds[target])
            rows.append((key, {**own, "txt": f"caption {int(key)}".encode(), "json": b"{}"}))
        write_tar(tmp_path / "curate" / name, rows)
    return tmp_path


def opened(root: Path, reads_images: bool = True, **more) -> ColumnDataset:
    return ColumnDataset(root / "curate", {}, {}, reads_images=reads_images, **more)


def drawn(dataset: ColumnDataset, index: int, **shares) -> list[tuple[Request, Branch]]:
    return [Recipe(**shares).draw(dataset[index], seed, {}) for seed in SEEDS]


def same(one: list[tuple[Request, Branch]], two: list[tuple[Request, Branch]]) -> bool:
    def parts(drawn):
        return [(r.prompt, [i.tobytes() for i in r.images], dict(r.computed), b) for r, b in drawn]

    return parts(one) == parts(two)


def test_sources_are_those_of_the_key_decoded_and_in_order(edits):
    dataset = opened(edits)
    assert [dataset[i].num_sources for i in range(4)] == [0, 0, 1, 3]
    assert dataset[0].sources() == ()
    for row, count in ((2, 1), (3, 3)):
        for number, pixels in enumerate(dataset[row].sources(), start=1):
            assert pixels.dtype == np.uint8 and pixels.shape == (4 + 50 * number % 3, 6, 3)
            assert abs(int(pixels[0, 0, 0]) - 50 * number) <= 3
        assert len(dataset[row].sources()) == count
    target = dataset[2].target()
    assert target is not None and target[0, 0].tolist() == [11, 0, 244]


def test_pictures_stay_in_memory_while_there_is_room(edits):
    kept, fresh = opened(edits, cache_bytes=10_000_000), opened(edits)
    assert kept[3].sources()[1] is kept[3].sources()[1]
    assert fresh[3].sources()[1] is not fresh[3].sources()[1]
    assert all(np.array_equal(a, b) for a, b in zip(kept[3].sources(), fresh[3].sources(), strict=True))


def test_a_model_that_reads_no_images_is_not_shown_instructions(edits):
    with pytest.raises(ValueError, match=r"00001.tar, key 000002: an editing sample.* without .txt."):
        opened(edits, reads_images=False)
    for index, name in enumerate(SHARDS):
        keys = list(SHARDS[name])
        write_tar(edits / "captions" / name, [(key, {"target.txt": b"a thing"}) for key in keys])
        assert index < 2
    dataset = ColumnDataset(
        edits / "curate", {"captions": edits / "captions"}, {}, caption_weights={"target.txt": 1.0}
    )
    assert dataset[3].num_sources == 0 and dataset[3].target() is None


def test_a_missing_or_broken_source_names_shard_and_key(edits):
    members = {"png": picture(1), "txt": b"x", "json": b"{}"}
    for extra, message in (
        ({"source2.png": picture(2)}, "key 000002: no source image 1 beside source2.png; delete 00001.tar"),
        ({"source.png": b"no image"}, r"key 000002: source.png: \[undecodable_image\]"),
    ):
        write_tar(edits / "curate" / "00001.tar", [("000002", members | extra)])
        with pytest.raises(ValueError, match=message):
            Recipe().draw(opened(edits)[2], 1, {})


def test_an_editing_sample_is_shown_with_its_images_whatever_is_not_dropped(edits):
    for request, branch in drawn(opened(edits), 3):
        assert (request.prompt, branch, len(request.images)) == ("caption 3", "full", 3)


def test_text_images_or_all_are_dropped_as_often_as_the_recipe_says(edits):
    shares = {"condition_dropout": 0.2, "text_dropout": 0.3, "image_dropout": 0.1}
    found = [(branch, len(request.images)) for request, branch in drawn(opened(edits), 2, **shares)]
    expected = {("none", 0): 0.2, ("images", 1): 0.24, ("full", 0): 0.08, ("full", 1): 0.48}
    assert set(found) == set(expected)
    for case, share in expected.items():
        assert found.count(case) / len(SEEDS) == pytest.approx(share, abs=0.08), case


def test_what_was_made_in_sight_of_the_images_is_left_out_with_them(edits):
    for name, keys in SHARDS.items():
        members = [(key, {"rewrites.npy": npy(np.arange(3))}) for key in keys]
        write_tar(edits / "rewrites" / name, members)
    for sees, blind in ((True, set()), (False, {"rewrites"})):
        readers = {"rewrites": CaptionArray(sees_images=sees)}
        dataset = ColumnDataset(
            edits / "curate", {"rewrites": edits / "rewrites"}, readers, reads_images=True
        )
        shown = [Recipe(image_dropout=0.5).draw(dataset[2], seed, readers)[0] for seed in SEEDS]
        assert {bool(one.images) for one in shown} == {True, False}
        for one in shown:
            assert set(one.computed) == ({"rewrites"} if one.images else blind)
        # a sample without sources has its column whatever is dropped
        assert set(Recipe(image_dropout=1.0).draw(dataset[0], 1, readers)[0].computed) == {"rewrites"}


def test_a_share_of_other_samples_is_asked_for_itself(edits):
    dataset = opened(edits)
    target = dataset[0].target()
    kept = 0
    for request, branch in drawn(dataset, 0, reconstruction_share=0.3, text_dropout=1.0):
        assert branch == "full"
        if not request.images:
            assert request.prompt == "caption 0"
            continue
        kept += 1
        assert request.prompt in RECONSTRUCTIONS and np.array_equal(request.images[0], target)
    assert kept / len(SEEDS) == pytest.approx(0.3, abs=0.08)
    # an editing sample has an image already
    assert all(len(request.images) == 1 for request, _ in drawn(dataset, 2, reconstruction_share=1.0))


def test_a_larger_share_shows_what_a_smaller_one_showed(edits):
    dataset = opened(edits)
    few, many = (
        [bool(request.images) for request, _ in drawn(dataset, 0, reconstruction_share=share)]
        for share in (0.05, 0.4)
    )
    assert all(more for one, more in zip(few, many, strict=True) if one) and 0 < sum(few) < sum(many)


def test_shares_of_0_change_no_draw_of_a_sample_without_sources(columns):
    plain = ColumnDataset(columns / "curate", folders(columns, PROMPT_FEATURES), READERS)
    seeing = ColumnDataset(columns / "curate", folders(columns, PROMPT_FEATURES), READERS, reads_images=True)
    for index in (0, 1):
        one, two = (
            [Recipe(0.3).draw(dataset[index], seed, COLUMNS) for seed in SEEDS] for dataset in (plain, seeing)
        )
        assert [(r.prompt, b) for r, b in one] == [(r.prompt, b) for r, b in two]
        assert all(not request.images for request, _ in two)


def test_what_is_drawn_of_images_leaves_other_draws_as_they_are(edits):
    dataset = opened(edits)
    bare = drawn(dataset, 2, condition_dropout=0.3)
    more = drawn(dataset, 2, condition_dropout=0.3, text_dropout=0.2, image_dropout=0.2)
    assert [branch == "none" for _, branch in bare] == [branch == "none" for _, branch in more]
    assert [request.prompt for request, _ in bare] == [request.prompt for request, _ in more]
    assert same(drawn(dataset, 2, text_dropout=0.2), drawn(dataset, 2, text_dropout=0.2))


def test_of_a_dropped_sample_no_picture_is_decoded(edits, monkeypatch):
    dataset = opened(edits)
    monkeypatch.setattr(dataset.pictures, "read", lambda *place: pytest.fail("read"))
    Recipe(condition_dropout=1.0).draw(dataset[3], 1, {})
    Recipe(image_dropout=1.0).draw(dataset[3], 1, {})
    Recipe(reconstruction_share=0.0).draw(dataset[0], 1, {})


def test_drops_of_more_than_everything_are_an_error():
    with pytest.raises(ValueError, match=r"text_dropout 0.7 and image_dropout 0.4 are more than 1"):
        RecipeConfig(text_dropout=0.7, image_dropout=0.4)
    config = RecipeConfig(condition_dropout=0.5, reconstruction_share=0.03, text_dropout=0.1)
    assert config.recipe == Recipe(0.5, 0.03, 0.1, 0.0)


@pytest.mark.parametrize("share", ["reconstruction_share", "text_dropout", "image_dropout"])
def test_shares_of_images_are_of_methods_that_read_them(share, tmp_path):
    values = {"output_dir": tmp_path, "data": {"images": tmp_path}}
    assert TrainConfig.model_validate({**values, share: 0.0}).recipe == Recipe(condition_dropout=0.1)
    with pytest.raises(ValueError, match=rf"{share}: the method 'noisy_latents' reads no images; leave them"):
        TrainConfig.model_validate({**values, share: 0.03})
