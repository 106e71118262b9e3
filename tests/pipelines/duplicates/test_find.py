"""Which samples repeat earlier ones: against brute force, over shards, and where many are alike."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from slowly import all_but_one_slow

from pipelines.duplicates import find as duplicates
from pipelines.duplicates.find import DIGEST_BYTES, DUPLICATES, DuplicateList, find_duplicates, first_equal
from pipelines.duplicates.hamming import first_near
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar


def brute_force(hashes: np.ndarray, bits: int) -> np.ndarray:
    """The definition, word for word: in order, one goes if an earlier one that stays is near."""
    kept = np.arange(len(hashes))
    for index in range(len(hashes)):
        earlier = np.flatnonzero(kept[:index] == np.arange(index))
        near = earlier[np.bitwise_count(hashes[earlier] ^ hashes[index]) <= bits]
        kept[index] = near[0] if len(near) else index
    return kept


def flip(hashes: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Up to so many bits of each changed."""
    for _ in range(number):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64))
    return hashes


def draw(kind: str, number: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    spread = rng.integers(0, 2**64, number, dtype=np.uint64)
    match kind:
        case "planted":
            chosen = rng.integers(0, number, (2, number // 4))
            for flips in range(10):
                part = chosen[:, flips::10]
                spread[part[0]] = flip(spread[part[1]], flips, rng)
        case "narrow":
            spread &= np.uint64(0xFFF)
        case "one cloud":
            spread = flip(np.full(number, spread[0]), 3, rng)
        case "wide cloud":
            spread = flip(np.full(number, spread[0]), 9, rng)
        case "half alike":
            spread[::2] = (spread[::2] & np.uint64(0xFFFFFFFF)) | np.uint64(7 << 40)
        case "walk":
            steps = np.uint64(1) << rng.integers(0, 64, number, dtype=np.uint64)
            spread = np.bitwise_xor.accumulate(steps)
        case "one value":
            spread[:] = spread[0]
    return spread


KINDS = ["planted", "narrow", "one cloud", "wide cloud", "half alike", "walk", "one value"]


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_near_duplicates_are_those_of_brute_force(kind, bits):
    hashes = draw(kind, 3000)
    np.testing.assert_array_equal(first_near(hashes, bits), brute_force(hashes, bits))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_hardly_any_hashes(number):
    hashes = np.arange(number, dtype=np.uint64)
    np.testing.assert_array_equal(first_near(hashes, 4), np.zeros(number))


def test_a_chain_does_not_fall_with_its_first():
    """Each 3 bits from the one before: every other one stays, none within 4 bits of another."""
    chain = np.array([(1 << 3 * i) - 1 for i in range(6)], np.uint64)
    assert first_near(chain, 4).tolist() == [0, 0, 2, 2, 4, 4]
    # the same set in another order has another first
    assert first_near(chain[[1, 0, 2]], 4).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "number"),
    all_but_one_slow(
        [("one value", 1_000_000), ("half alike", 30_000), ("one cloud", 20_000), ("walk", 20_000)],
        ("one value", 1_000_000),
    ),
)
def test_huge_groups_take_no_quadratic_time(kind, number):
    hashes = draw(kind, number)
    start = time.process_time()
    found = first_near(hashes, 4)
    assert time.process_time() - start < 30
    stay = hashes[found == np.arange(len(found))]
    assert (np.bitwise_count(hashes ^ hashes[found]) <= 4).all()
    for one in stay[:200]:
        assert (np.bitwise_count(stay ^ one) <= 4).sum() == 1


def test_equal_digests():
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 6, (500, 2), dtype=np.uint64)
    expected = [digests.tolist().index(one) for one in digests.tolist()]
    assert first_equal(digests).tolist() == expected
    assert first_equal(digests[:0]).tolist() == []


Row = tuple[str, str | None, int, int | None]
"""Key, reason, a number for the digest, hash."""


def write_verdicts(folder: Folder, shards: list[list[Row]]) -> ShardTable:
    sidecars: list[Sidecar] = []
    for index, rows in enumerate(shards):
        table = pa.table(
            {
                "key": pa.array([row[0] for row in rows], pa.string()),
                "reason": pa.array([row[1] for row in rows], pa.string()),
                "digest": pa.array(
                    [row[2].to_bytes(DIGEST_BYTES, "big") for row in rows], pa.binary(DIGEST_BYTES)
                ),
                "hash": pa.array([row[3] for row in rows], pa.uint64()),
            }
        )
        with ShardCommit(folder, f"{index:05d}", "f", {}) as commit:
            commit.samples = len(rows)
            pq.write_table(table, commit.staging / f"{index:05d}.parquet")
            sidecars.append(commit.commit(f"{index:05d}.parquet"))
    return ShardTable.of(sidecars)


def found(folder: Folder) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(folder.path / DUPLICATES).to_pylist()
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    return {row["key"]: (row["reason"], row["duplicate_of"]) for row in rows}


SHARDS: list[list[Row]] = [
    [("00", None, 1, 0b0), ("01", "empty_caption", 2, 0b0), ("02", None, 3, 0xFF00)],
    [],
    [("10", None, 1, 0b0), ("11", None, 2, 0xFF << 20), ("12", None, 4, 0b11), ("13", "no_image", 0, None)],
    [("20", None, 4, 0b11), ("21", None, 2, 0xFF << 20), ("22", None, 5, 0xFF03), ("23", None, 6, 0xF << 40)],
]
EXACT = {
    "10": ("exact_duplicate", "00"),
    # the one before, 01, is dropped for another reason
    "21": ("exact_duplicate", "11"),
    "20": ("exact_duplicate", "12"),
}


def test_over_shards_the_first_that_stays_stays(tmp_path):
    folder = Folder.at(tmp_path)
    shards = write_verdicts(folder, SHARDS)
    assert find_duplicates(folder, shards, "exact") == [DUPLICATES]
    assert found(folder) == EXACT
    find_duplicates(folder, shards, "near", 2)
    near = {
        "12": ("near_duplicate", "00"),
        # the same bytes as 12, which goes itself: every duplicate names one that stays
        "20": ("near_duplicate", "00"),
        "22": ("near_duplicate", "02"),
    }
    assert found(folder) == EXACT | near
    find_duplicates(folder, shards, "near", 0)
    assert found(folder) == EXACT
    find_duplicates(folder, shards, "keep")
    assert found(folder) == {}


def test_no_samples_at_all(tmp_path):
    folder = Folder.at(tmp_path)
    for mode in ("keep", "exact", "near"):
        find_duplicates(folder, write_verdicts(folder, [[], []]), mode, 4)
        assert found(folder) == {}
    find_duplicates(folder, ShardTable.of([]), "exact")
    assert DuplicateList(folder).of(pa.chunked_array([["a"]])) == {}


def random_shards(rng: np.random.Generator) -> list[list[Row]]:
    hashes = draw("planted", 2000).tolist()
    rows: list[Row] = []
    for index in range(2000):
        image = int(rng.integers(0, 1500))
        reason = "empty_caption" if rng.random() < 0.1 else None
        rows.append((f"{index:09d}", reason, image, hashes[image]))
    return [rows[start : start + 130] for start in range(0, 2000, 130)]


def test_the_same_bytes_whatever_order_the_shards_were_written_in(tmp_path):
    shards = random_shards(np.random.default_rng(0))
    config = "near", 4
    written = []
    for name, order in (("a", range(len(shards))), ("b", reversed(range(len(shards))))):
        folder = Folder.at(tmp_path / name)
        write_verdicts(folder, shards)
        sidecars = {index: Sidecar.model_validate_json(folder.read(f"{index:05d}.json")) for index in order}
        find_duplicates(folder, ShardTable.of(sidecars[index] for index in sorted(sidecars)), config)
        written.append(folder.read(DUPLICATES))
    assert written[0] == written[1]


def test_each_shard_reads_the_row_groups_of_its_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "ROW_GROUP", 50)
    folder = Folder.at(tmp_path)
    shards = random_shards(np.random.default_rng(0))
    find_duplicates(folder, write_verdicts(folder, shards), "near", 4)
    everything, listed = found(folder), DuplicateList(folder)
    assert pq.read_metadata(tmp_path / DUPLICATES).num_row_groups > 5
    together: dict[str, tuple[str, str]] = {}
    for rows in shards:
        together |= listed.of(pa.chunked_array([[row[0] for row in rows]]))
    assert together == everything
    assert listed.of(pa.chunked_array([["zzz"]])) == {}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_missing_and_changed_verdicts_are_named(tmp_path):
    folder = Folder.at(tmp_path)
    shards = write_verdicts(folder, SHARDS)
    damage(tmp_path / "00002.parquet")
    with pytest.raises(ShardError, match=r"00002\.parquet: not the bytes that its sidecar describes"):
        find_duplicates(folder, shards, "exact")
    (tmp_path / "00002.parquet").unlink()
    with pytest.raises(ShardError, match=r"00002\.parquet: no such file; re-run the stage"):
        find_duplicates(folder, shards, "exact")
    with pytest.raises(ShardError, match=r"duplicates\.parquet: no such file"):
        DuplicateList(folder)
