"""Columns of tars -> samples: the join and its checks."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_columns import READERS, folders, open_captioned, open_columns
from tiny_training import GRID, WIDTH, npy, scan_and_replace, write_tar

from repfusion.data.columns import manifest_digest, scan_tar, shard_names
from repfusion.data.config import DatasetConfig
from repfusion.data.dataset import ColumnDataset

FEATURES, TEXT = "image_features", "prompt_features"


def test_columns_are_joined_key_for_key(columns: Path):
    dataset = open_columns(columns, TEXT)
    rng = np.random.default_rng(0)
    assert len(dataset) == 20
    for i in range(20):
        sample = dataset[i]
        assert sample.key == f"{i:06d}"
        np.testing.assert_array_equal(
            sample.read(FEATURES), rng.standard_normal((GRID**2, WIDTH)).astype(np.float16)
        )
        np.testing.assert_array_equal(sample.read(TEXT), rng.standard_normal((4, 32)).astype(np.float16))
        assert list(sample.captions) == ["txt"] and len(sample.captions["txt"]) == (2 if i % 2 else 1)


def test_the_cache_holds_to_its_size_and_gives_the_same_samples(columns: Path):
    bare, cached = open_columns(columns), open_columns(columns, cache_bytes=10_000)
    for _ in range(2):
        for i in range(20):
            np.testing.assert_array_equal(bare[i].read(FEATURES), cached[i].read(FEATURES))
    assert 0 < cached.cached_bytes <= 10_000
    assert 0 < len(cached.cache) < 20


@pytest.mark.parametrize("variants", ["one text", {"a": "b"}, [1, 2]])
def test_variants_that_are_no_list_of_texts(columns: Path, variants):
    members = {"txt": b"x", "json": json.dumps({"captions": variants}).encode()}
    write_tar(columns / "curate" / "00002.tar", [(f"{i:06d}", members) for i in range(16, 20)])
    dataset = open_columns(columns)
    with pytest.raises(
        ValueError, match=r"00002\.tar, key 000017: the json's 'captions' are .*rename the field"
    ):
        dataset[17]


@pytest.mark.parametrize("keep", [0, 700, 3000, -1024])
def test_a_truncated_tar_is_named(columns: Path, keep: int):
    shard = columns / FEATURES / "00001.tar"
    shard.write_bytes(shard.read_bytes()[: keep if keep >= 0 else -10240 + 512])
    with pytest.raises(ValueError, match=r"00001\.tar.*(truncated|empty).*re-run the 'image_features' stage"):
        open_columns(columns)


def test_bytes_that_are_no_tar(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(b"0" * 2048)
    with pytest.raises(ValueError, match=r"x\.tar: not a readable tar"):
        scan_tar(tmp_path / "x.tar")


def test_long_member_names_are_read(tmp_path: Path):
    key = "k" * 150
    write_tar(tmp_path / "x.tar", [(key, {"txt": b"hello"})])
    offset, size = scan_tar(tmp_path / "x.tar")[f"{key}.txt"]
    assert (tmp_path / "x.tar").read_bytes()[offset : offset + size] == b"hello"


def good(count: int = 4) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (f"{16 + i:06d}", {f"{FEATURES}.npy": npy(np.zeros((GRID**2, WIDTH), np.float16))})
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (good()[:3], r"00002\.tar, key 000019: no member 000019\.image_features\.npy \(1 of 4 keys"),
        (good(5), r"00002\.tar, key 000020: not among the 4 keys"),
        (
            [*good()[:3], ("000019", {f"{FEATURES}.npy": npy(np.zeros((GRID**2, 8), np.float16))})],
            r"00002\.tar, key 000019: image_features are \(4, 8\) float16, expected \(4, 16\) float16; .*"
            "'image_features'",
        ),
        (
            [(key, {f"{FEATURES}.npy": npy(np.zeros((GRID**2, WIDTH), np.float32))}) for key, _ in good()],
            r"key 000016: image_features are \(4, 16\) float32, expected \(4, 16\) float16",
        ),
        (
            [*good()[:3], ("000019", {f"{FEATURES}.npy": b"\0" * 200})],
            r"00002\.tar, key 000019: not a readable npy",
        ),
    ],
)
def test_columns_that_do_not_match_name_shard_and_key(columns: Path, shard: list, message: str):
    write_tar(columns / FEATURES / "00002.tar", shard)
    with pytest.raises(ValueError, match=message):
        open_columns(columns)


def test_a_missing_shard_is_named(columns: Path):
    (columns / FEATURES / "00001.tar").unlink()
    with pytest.raises(ValueError, match=rf"{FEATURES}/00001\.tar is missing; re-run the '{FEATURES}' stage"):
        open_columns(columns)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", ">f4"])
def test_arrays_are_read_as_numpy_reads_them(columns: Path, order: str, dtype: str):
    rng, arrays = np.random.default_rng(3), {}
    for name in shard_names(columns / FEATURES):
        keys = dict.fromkeys(member.split(".")[0] for member in scan_tar(columns / FEATURES / name))
        made = {key: np.asarray(rng.standard_normal((GRID**2, WIDTH)), dtype, order=order) for key in keys}
        write_tar(columns / FEATURES / name, [(key, {f"{FEATURES}.npy": npy(made[key])}) for key in keys])
        arrays |= made
    dataset = open_columns(columns)
    for i in range(20):
        assert dataset[i].read(FEATURES).dtype == np.dtype(dtype)
        np.testing.assert_array_equal(dataset[i].read(FEATURES), arrays[dataset[i].key])


def test_a_shard_cut_short_after_it_was_opened(columns: Path):
    dataset = open_columns(columns)
    shard = columns / FEATURES / "00002.tar"
    offset, _ = scan_tar(shard)["000018.image_features.npy"]
    with shard.open("r+b") as file:
        file.truncate(offset + 10)
    assert dataset[17].key == "000017"
    with pytest.raises(ValueError, match=r"00002\.tar, key 000018: image_features\.npy has 10 of its 256"):
        dataset[18].read(FEATURES)


def test_a_disk_that_fails(columns: Path):
    dataset = open_columns(columns)
    dataset.close()
    shard = columns / FEATURES / "00002.tar"
    shard.unlink()
    shard.mkdir()  # reading it is an OSError
    with pytest.raises(ValueError, match=r"00002\.tar, key 000019: image_features\.npy cannot be read"):
        dataset[19].read(FEATURES)


@pytest.mark.parametrize("member", ["000017.txt", "000017.json"])
def test_text_that_is_no_text(columns: Path, member: str):
    shard = columns / "curate" / "00002.tar"
    scan_and_replace(shard, member, b"\xff" * scan_tar(shard)[member][1])
    dataset = open_columns(columns)
    with pytest.raises(ValueError, match=r"00002\.tar, key 000017: a caption or its json is not readable"):
        dataset[17]


def test_a_folder_without_manifest_has_no_digest(columns: Path):
    assert manifest_digest(columns / FEATURES) is None


def write_stage(folder: Path, names: list[str]):
    """A complete stage of shards that hold one sample each, as the pipelines write it."""
    from pipelines.shards.manifest import Manifest, ShardTable, write_output
    from pipelines.shards.storage import Folder
    from pipelines.shards.store import ShardCommit
    from pipelines.shards.tars import tar_shard

    sidecars = []
    for name in names:
        with ShardCommit(Folder.at(folder), name, "f", {}) as commit:
            with tar_shard(commit) as samples:
                samples.write("0", {"txt": b"a"})
            sidecars.append(commit.commit(f"{name}.tar"))
    table = ShardTable.of(sidecars)
    manifest = Manifest(
        stage="curate", fingerprint="f", fields={"ü": 1.5}, upstream={}, lineage={}, num_shards=len(names),
        samples=len(names), bytes=table.bytes, shards_digest=table.digest, drops={}, seconds=3.0,
        shard_seconds=2.0, files={}, extra={},
    )  # fmt: skip
    return write_output(Folder.at(folder), manifest, table)


def test_shards_are_those_of_the_manifest_in_its_order(tmp_path: Path):
    write_stage(tmp_path, ["100000", "00001", "00002"])
    (tmp_path / "00003.tar").write_bytes(b"of another run")
    assert shard_names(tmp_path) == ["100000.tar", "00001.tar", "00002.tar"]


def test_a_folder_without_shards_is_named(tmp_path: Path):
    write_stage(tmp_path, [])
    (tmp_path / "00003.tar").write_bytes(b"of another run")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=rf"{folder.name}: no shards \(\*\.tar\) here"):
            shard_names(folder)


def test_the_digest_is_that_of_the_manifest(tmp_path: Path):
    output = write_stage(tmp_path / "a", ["00000"])
    assert manifest_digest(tmp_path / "a") == output.manifest.digest
    faster = output.manifest.model_copy(update={"seconds": 1.0, "shard_seconds": 0.5})
    other = output.manifest.model_copy(update={"samples": 7})
    assert faster.digest == output.manifest.digest != other.digest


def test_a_reference_stands_for_the_member_it_names(captioned: Path):
    dataset = open_captioned(captioned, {"txt": 1.0, "long.txt": 1.0}, TEXT)
    for first in (0, 8, 16):
        np.testing.assert_array_equal(dataset[first + 3].read(TEXT), dataset[first].read(TEXT, "long.txt"))
    only_txt = open_captioned(captioned, {"txt": 1.0}, TEXT)
    np.testing.assert_array_equal(only_txt[3].read(TEXT), dataset[3].read(TEXT))


def test_a_reference_to_nothing_is_named(captioned: Path):
    shard = captioned / TEXT / "00001.tar"
    offset, size = scan_tar(shard)["000011.prompt_features.ref"]
    data = bytearray(shard.read_bytes())
    data[offset : offset + size] = b"000099.long.prompt_features.npy"
    shard.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"00001\.tar, key 000011: 000011\.prompt_features\.ref names '000099"
    ):
        open_captioned(captioned, {"txt": 1.0}, TEXT)


def test_missing_text_features_of_a_caption_are_named(captioned: Path):
    write_tar(
        captioned / TEXT / "00002.tar",
        [(f"{i:06d}", {"prompt_features.npy": npy(np.zeros((4, 32), np.float16))}) for i in range(16, 20)],
    )
    with pytest.raises(
        ValueError,
        match=r"00002\.tar, key 000016: no member 000016\.long\.prompt_features\.npy \(2 of",
    ):
        open_captioned(captioned, {"txt": 1.0, "long.txt": 1.0}, TEXT)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"txt": -1}, "'txt' has weight -1.0; expected a number that is 0 or more"),
        ({"txt": float("nan")}, r"caption_weights\.txt\s+Input should be a finite number"),
        ({"txt": 0, "long.txt": 0}, "leaves nothing to draw"),
        ({}, "leaves nothing to draw"),
        ({"long": 1}, "'long' names no caption; expected 'txt', the main one, or NAME.txt"),
        ({"txt": 1, "lnog.txt": 1}, r"no sample of .*captions has a member 'lnog.txt'.*\['long.txt'\]"),
        (
            {"long.txt": 1},
            r"captions/00000\.tar, key 000001: none of the captions long\.txt \(4 of 8 keys\); give 'txt'",
        ),
    ],
)
def test_weights_that_do_not_hold(captioned: Path, weights: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        open_captioned(captioned, weights)


def test_a_caption_of_a_column_that_is_not_given(captioned: Path):
    with pytest.raises(ValueError, match=r"'long\.txt' lies in the captions column, which data\.columns"):
        DatasetConfig(images=captioned / "curate", caption_weights={"long.txt": 1})


def test_a_column_that_the_model_needs_and_one_that_it_cannot_use(captioned: Path):
    with pytest.raises(ValueError, match=r"no 'image_features', which the model reads; it has .*run the"):
        ColumnDataset(captioned / "curate", {TEXT: captioned / TEXT}, READERS)
    columns = {**folders(captioned), "audio": captioned / "nowhere"}
    dataset = ColumnDataset(captioned / "curate", columns, READERS)
    assert dataset.folders.keys() == {"images", FEATURES} and dataset[0].read(TEXT) is None


def test_captions_of_other_keys_are_refused(captioned: Path):
    write_tar(captioned / "captions" / "00001.tar", [("000099", {"long.txt": b"x"})])
    with pytest.raises(ValueError, match=r"captions/00001\.tar, key 000099: not among the 8 keys"):
        open_captioned(captioned, {"txt": 1, "long.txt": 1})
