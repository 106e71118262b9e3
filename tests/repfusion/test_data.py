"""Columns of tars -> batches: the join, its checks, and the order."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import GRID, WIDTH, make_columns, npy, write_tar

from repfusion.columns import manifest_digest, scan_tar, shard_names
from repfusion.data import ColumnDataset, DataConfig, batches, micro_positions, sample_at


@pytest.fixture
def columns(tmp_path: Path) -> Path:
    return make_columns(tmp_path)


def open_columns(root: Path, **changes) -> ColumnDataset:
    return ColumnDataset(**{"images": root / "curate", "features": root / "latents", **changes})


def test_columns_are_joined_key_for_key(columns: Path):
    dataset = open_columns(columns, text=columns / "features")
    rng = np.random.default_rng(0)
    assert len(dataset) == 20
    for i in range(20):
        sample = dataset[i]
        assert sample.key == f"{i:06d}"
        np.testing.assert_array_equal(
            sample.features, rng.standard_normal((GRID**2, WIDTH)).astype(np.float16)
        )
        assert sample.text is not None
        np.testing.assert_array_equal(sample.text["txt"], rng.standard_normal((4, 32)).astype(np.float16))
        assert list(sample.captions) == ["txt"] and len(sample.captions["txt"]) == (2 if i % 2 else 1)


def test_the_cache_holds_to_its_size_and_gives_the_same_samples(columns: Path):
    bare, cached = open_columns(columns), open_columns(columns, cache_bytes=1000)
    for _ in range(2):
        for i in range(20):
            np.testing.assert_array_equal(bare[i].features, cached[i].features)
    assert 0 < cached.cached_bytes <= 1000
    assert 0 < len(cached.cache) < 20


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [[sample_at(20, 3, epoch * 20 + i) for i in range(20)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [sample_at(20, 4, i) for i in range(20)] != epochs[0]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 4), (2, 6), (2, 3), (3, 2), (4, 3)])
def test_positions_do_not_depend_on_ranks_or_micro_batches(world_size: int, micro: int):
    for step in (0, 5):
        parts = [p for rank in range(world_size) for p in micro_positions(step, 12, micro, rank, world_size)]
        assert [position for part in parts for position in part] == list(range(step * 12, step * 12 + 12))


def read_all(dataset: ColumnDataset, first_step: int, num_steps: int, **layout: int) -> list:
    stream = batches(
        dataset, seed=1, first_step=first_step, num_steps=num_steps, global_batch_size=8, **layout
    )
    return [
        (p, k, c, f.tolist())
        for parts in stream
        for batch in parts
        for p, k, c, f in zip(batch.positions, batch.keys, batch.captions, batch.features, strict=True)
    ]


def test_batches_across_epochs_ranks_and_restarts(columns: Path):
    dataset = open_columns(columns)
    whole = read_all(dataset, 0, 6, micro_batch_size=8)
    assert len(whole) == 48 and len({key for _, key, _, _ in whole[:20]}) == 20
    assert read_all(dataset, 0, 2, micro_batch_size=8) + read_all(dataset, 2, 6, micro_batch_size=2) == whole
    ranks = [read_all(dataset, 0, 6, micro_batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1], key=lambda row: row[0]) == whole


def test_variants_of_the_caption_are_drawn_by_position(columns: Path):
    rows = read_all(open_columns(columns), 0, 20, micro_batch_size=8)
    drawn = {caption for _, key, caption, _ in rows if key == "000001"}
    assert drawn == set(open_columns(columns)[1].captions["txt"])
    assert rows == read_all(open_columns(columns), 0, 20, micro_batch_size=8)


@pytest.mark.parametrize("variants", ["one text", {"a": "b"}, [1, 2]])
def test_variants_that_are_no_list_of_texts(columns: Path, variants):
    members = {"txt": b"x", "json": json.dumps({"captions": variants}).encode()}
    write_tar(columns / "curate" / "00002.tar", [(f"{i:06d}", members) for i in range(16, 20)])
    dataset = open_columns(columns)
    with pytest.raises(
        ValueError, match=r"00002\.tar, key 000017: the json's 'captions' are .*rename the field"
    ):
        dataset[17]


def test_sizes_that_do_not_divide_are_refused(columns: Path):
    with pytest.raises(ValueError, match="micro_batch_size=3 x world_size=2 must divide global_batch_size=8"):
        next(batches(open_columns(columns), seed=0, first_step=0, num_steps=1, global_batch_size=8,
                     micro_batch_size=3, world_size=2))  # fmt: skip


@pytest.mark.parametrize("keep", [0, 700, 3000, -1024])
def test_a_truncated_tar_is_named(columns: Path, keep: int):
    shard = columns / "latents" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[: keep if keep >= 0 else -10240 + 512])
    with pytest.raises(ValueError, match=r"00001\.tar.*(truncated|empty).*re-run the 'latents' stage"):
        open_columns(columns)


def test_bytes_that_are_no_tar(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(b"0" * 2048)
    with pytest.raises(ValueError, match=r"x\.tar: no(t a readable tar| tar header)"):
        scan_tar(tmp_path / "x.tar")


def test_long_member_names_are_read(tmp_path: Path):
    key = "k" * 150
    write_tar(tmp_path / "x.tar", [(key, {"txt": b"hello"})])
    offset, size = scan_tar(tmp_path / "x.tar")[f"{key}.txt"]
    assert (tmp_path / "x.tar").read_bytes()[offset : offset + size] == b"hello"


def good(count: int = 4) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (f"{16 + i:06d}", {"features.npy": npy(np.zeros((GRID**2, WIDTH), np.float16))}) for i in range(count)
    ]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (good()[:3], r"00002\.tar, key 000019: no member 000019\.features\.npy \(1 of 4 keys"),
        (good(5), r"00002\.tar, key 000020: not among the 4 keys"),
        (
            [*good()[:3], ("000019", {"features.npy": npy(np.zeros((GRID**2, 8), np.float16))})],
            r"00002\.tar, key 000019: features are \(4, 8\) float16, expected \(4, 16\) float16; .*'latents'",
        ),
        (
            [(key, {"features.npy": npy(np.zeros((GRID**2, WIDTH), np.float32))}) for key, _ in good()],
            r"key 000016: features are \(4, 16\) float32, expected \(4, 16\) float16",
        ),
        (
            [*good()[:3], ("000019", {"features.npy": b"\0" * 200})],
            r"00002\.tar, key 000019: not a readable npy",
        ),
    ],
)
def test_columns_that_do_not_match_name_shard_and_key(columns: Path, shard: list, message: str):
    write_tar(columns / "latents" / "00002.tar", shard)
    with pytest.raises(ValueError, match=message):
        open_columns(columns)


def test_a_missing_shard_is_named(columns: Path):
    (columns / "latents" / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"latents/00001\.tar is missing; re-run the 'latents' stage"):
        open_columns(columns)


def test_a_damaged_sample_is_raised_in_the_loop(columns: Path):
    dataset = open_columns(columns)
    shard = columns / "latents" / "00001.tar"
    offset, _ = scan_tar(shard)["000011.features.npy"]
    data = bytearray(shard.read_bytes())
    data[offset : offset + 6] = b"junk!!"
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"00001\.tar, key 000011: not a readable npy"):
        read_all(dataset, 0, 3, micro_batch_size=8)


def test_features_reach_torch_as_they_lie_on_disk(columns: Path):
    dataset = open_columns(columns)
    parts = next(batches(dataset, seed=0, first_step=0, num_steps=1, global_batch_size=8, micro_batch_size=4))
    assert [tuple(part.features.shape) for part in parts] == [(4, GRID**2, WIDTH)] * 2
    assert parts[0].features.dtype == torch.float16 and parts[0].text is None


def test_a_folder_without_manifest_has_no_digest(columns: Path):
    assert manifest_digest(columns / "latents") is None


def write_stage(folder: Path, names: list[str]):
    """A complete stage of shards that hold one sample each, as the pipelines write it."""
    from pipelines.manifest import Manifest, ShardTable, write_output
    from pipelines.storage import Folder
    from pipelines.store import ShardCommit
    from pipelines.tars import tar_shard

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


LONG = {f"{i:06d}": f"a long caption of {i}" for i in range(0, 20, 2)}
"""Every second sample has one."""


@pytest.fixture
def captioned(columns: Path) -> Path:
    """The columns with an alternative caption `long.txt`, and its text features, for every second sample."""
    rng = np.random.default_rng(9)
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        keys = [member.split(".")[0] for member in scan_tar(columns / "features" / name)]
        long = [(key, {"long.txt": LONG[key].encode()} if key in LONG else {}) for key in keys]
        write_tar(columns / "captions" / name, long)
        text = []
        for index, key in enumerate(keys):
            members = {"text.npy": npy(rng.standard_normal((4, 32)).astype(np.float16))}
            if index == 3:
                members = {"text.ref": f"{keys[0]}.long.text.npy".encode()}
            if key in LONG:
                members["long.text.npy"] = npy(rng.standard_normal((9, 32)).astype(np.float16))
            text.append((key, members))
        write_tar(columns / "features" / name, text)
    return columns


def open_captioned(root: Path, weights: dict[str, float], **changes) -> ColumnDataset:
    config = DataConfig(
        images=root / "curate",
        features=root / "latents",
        **{"captions": root / "captions", "caption_weights": weights, **changes},
    )
    return ColumnDataset.open(config)


def test_captions_are_drawn_in_proportion_to_their_weights(captioned: Path):
    dataset = open_captioned(captioned, {"txt": 1, "long.txt": 3})
    rows = read_all(dataset, 0, 500, micro_batch_size=8)
    having = [caption for _, key, caption, _ in rows if key in LONG]
    # 2000 draws of probability 3/4: a standard deviation of 0.0097
    assert abs(np.mean([caption.startswith("a long") for caption in having]) - 0.75) < 0.03
    assert all(caption == LONG[key] for _, key, caption, _ in rows if caption.startswith("a long"))
    assert {key for _, key, caption, _ in rows if caption.startswith("a long")} == LONG.keys()
    two = read_all(dataset, 0, 500, micro_batch_size=2)
    assert two == rows and rows[160:] == read_all(dataset, 20, 500, micro_batch_size=8)
    reordered = open_captioned(captioned, {"long.txt": 1.5, "txt": 0.5})
    assert read_all(reordered, 0, 500, micro_batch_size=8) == rows


@pytest.mark.parametrize("weights", [{"txt": 1}, {"txt": 0.2, "long.txt": 0}])
def test_with_one_caption_the_draws_do_not_depend_on_the_column(captioned: Path, weights: dict[str, float]):
    bare = read_all(open_columns(captioned), 0, 20, micro_batch_size=8)
    assert read_all(open_captioned(captioned, weights), 0, 20, micro_batch_size=8) == bare


def test_variants_and_names_are_drawn_independently(columns: Path):
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        keys = {member.split(".")[0]: None for member in scan_tar(columns / "curate" / name)}
        write_tar(columns / "captions" / name, [(key, {"long.txt": b"long"}) for key in keys])
    dataset = open_captioned(columns, {"txt": 1, "long.txt": 1})
    rows = read_all(dataset, 0, 500, micro_batch_size=8)
    odd = [caption for _, key, caption, _ in rows if int(key) % 2 and caption != "long"]
    assert abs(len(odd) / 2000 - 0.5) < 0.04
    assert abs(np.mean([len(caption.split()) == 4 for caption in odd]) - 0.5) < 0.06


def test_text_features_follow_the_drawn_caption(captioned: Path):
    dataset = open_captioned(captioned, {"txt": 1, "long.txt": 1}, text=captioned / "features")
    stream = batches(dataset, seed=0, first_step=0, num_steps=10, global_batch_size=8, micro_batch_size=8)
    lengths = {True: set(), False: set()}
    for parts in stream:
        for batch in parts:
            for key, caption, text in zip(batch.keys, batch.captions, batch.text, strict=True):
                if int(key) % 8 != 3:
                    lengths[caption.startswith("a long")].add(len(text))
    assert lengths == {True: {9}, False: {4}}
    assert dataset.text_width == 32


def test_a_reference_stands_for_the_member_it_names(captioned: Path):
    dataset = open_captioned(captioned, {"txt": 1, "long.txt": 1}, text=captioned / "features")
    for first in (0, 8, 16):
        np.testing.assert_array_equal(dataset[first + 3].text["txt"], dataset[first].text["long.txt"])
    only_txt = open_captioned(captioned, {"txt": 1}, text=captioned / "features")
    np.testing.assert_array_equal(only_txt[3].text["txt"], dataset[3].text["txt"])


def test_a_reference_to_nothing_is_named(captioned: Path):
    shard = captioned / "features" / "00001.tar"
    offset, size = scan_tar(shard)["000011.text.ref"]
    data = bytearray(shard.read_bytes())
    data[offset : offset + size] = b"000099.long.text.npy"
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"00001\.tar, key 000011: 000011\.text\.ref names '000099\.long"):
        open_captioned(captioned, {"txt": 1}, text=captioned / "features")


def test_missing_text_features_of_a_caption_are_named(captioned: Path):
    write_tar(
        captioned / "features" / "00002.tar",
        [(f"{i:06d}", {"text.npy": npy(np.zeros((4, 32), np.float16))}) for i in range(16, 20)],
    )
    with pytest.raises(
        ValueError, match=r"00002\.tar, key 000016: no member 000016\.long\.text\.npy \(2 of 4 keys"
    ):
        open_captioned(captioned, {"txt": 1, "long.txt": 1}, text=captioned / "features")


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({"txt": -1}, {}, "'txt' has weight -1.0; expected a number that is 0 or more"),
        ({"txt": float("nan")}, {}, "'txt' has weight nan"),
        ({"txt": 0, "long.txt": 0}, {}, "leaves nothing to draw"),
        ({}, {}, "leaves nothing to draw"),
        ({"long": 1}, {}, "'long' names no caption; expected 'txt', the main one, or NAME.txt"),
        ({"long.txt": 1}, {"captions": None}, "'long.txt' lies in the captions column, but data.captions"),
        ({"txt": 1, "lnog.txt": 1}, {}, r"no sample of .*captions has a member 'lnog.txt'.*\['long.txt'\]"),
        (
            {"long.txt": 1},
            {},
            r"captions/00000\.tar, key 000001: none of the captions long\.txt \(4 of 8 keys\); give 'txt'",
        ),
    ],
)
def test_weights_that_do_not_hold(captioned: Path, weights: dict[str, float], changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        open_captioned(captioned, weights, **changes)


def test_captions_of_other_keys_are_refused(captioned: Path):
    write_tar(captioned / "captions" / "00001.tar", [("000099", {"long.txt": b"x"})])
    with pytest.raises(ValueError, match=r"captions/00001\.tar, key 000099: not among the 8 keys"):
        open_captioned(captioned, {"txt": 1, "long.txt": 1})
