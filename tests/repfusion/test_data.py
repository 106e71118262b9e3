"""Columns of tars -> batches: the join, its checks, and the order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import GRID, WIDTH, make_columns, npy, write_tar

from repfusion.data import (
    ColumnDataset,
    batches,
    manifest_digest,
    micro_positions,
    sample_at,
    scan_tar,
)


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
        np.testing.assert_array_equal(sample.text, rng.standard_normal((4, 32)).astype(np.float16))
        assert len(sample.captions) == (2 if i % 2 else 1)


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


def test_alternative_captions_are_drawn_by_position(columns: Path):
    rows = read_all(open_columns(columns), 0, 20, micro_batch_size=8)
    drawn = {caption for _, key, caption, _ in rows if key == "000001"}
    assert drawn == set(open_columns(columns)[1].captions)
    assert rows == read_all(open_columns(columns), 0, 20, micro_batch_size=8)


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
