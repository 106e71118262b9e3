"""What `curate` copies and what it lists, from shards that `judge` looked at."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.duplicates.find import DUPLICATES, find_duplicates
from pipelines.runtime.pool import ShardJob
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar
from pipelines.shards.tars import read_samples, tar_shard
from pipelines.stages.curate import CurateConfig, CurateWorker
from pipelines.stages.judge import JudgeWorker

Samples = dict[str, dict[str, bytes]]


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def sample(seed: int, caption: str = "a thing") -> dict[str, bytes]:
    return {"png": picture(seed), "txt": caption.encode(), "json": b'{"key":"as it was"}'}


SHARDS: list[Samples] = [
    {"000": sample(0), "001": sample(1, ""), "002": sample(2), "003": sample(0, "again")},
    {"010": sample(2), "011": {"txt": b"a"}, "012": sample(3), "013": sample(1)},
    {},
    {"030": sample(3), "031": sample(4)},
]
DROPS = [
    {"001": ("empty_caption", ""), "003": ("exact_duplicate", "duplicate of 000")},
    {"010": ("exact_duplicate", "duplicate of 002"), "011": ("no_image", "members: txt")},
    {},
    {"030": ("exact_duplicate", "duplicate of 012")},
]


def write_raw(root: Path, shards: list[Samples]) -> None:
    for index, samples in enumerate(shards):
        with ShardCommit(Folder.at(root / "ingest"), f"{index:05d}", "f", {}) as commit:
            with tar_shard(commit) as tar:
                for key, members in samples.items():
                    tar.write(key, members)
            commit.commit(f"{index:05d}.tar")


def curate_all(root: Path, config: CurateConfig, order: list[int]) -> list[Sidecar]:
    """Both stages; the shards of each in an order, their sidecars in that of the shards."""
    source, judged, folder = (Folder.at(root / name) for name in ("ingest", "judge", "curate"))
    judge = JudgeWorker(judged, source, config)
    verdicts = {index: judge(ShardJob(f"{index:05d}", "j")) for index in order}
    shards = ShardTable.of(verdicts[index] for index in sorted(verdicts))
    find_duplicates(judged, shards, config.duplicates, config.near_duplicate_bits)
    curate = CurateWorker(folder, source, judged, config)
    done = {index: curate(ShardJob(f"{index:05d}", "c")) for index in order}
    return [done[index] for index in sorted(done)]


def listed_drops(root: Path, name: str) -> dict[str, tuple[str, str]]:
    path = root / "curate" / f"{name}.drops.parquet"
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    return {row["key"]: (row["reason"], row["detail"]) for row in rows}


def test_every_sample_is_copied_or_listed(tmp_path):
    write_raw(tmp_path, SHARDS)
    sidecars = curate_all(tmp_path, CurateConfig(), [0, 1, 2, 3])
    for sidecar, samples, drops in zip(sidecars, SHARDS, DROPS, strict=True):
        kept = dict(read_samples(Folder.at(tmp_path / "curate"), sidecar.file, sidecar))
        assert kept == {key: members for key, members in samples.items() if key not in drops}
        assert listed_drops(tmp_path, sidecar.name) == drops
        assert sidecar.samples + sum(sidecar.drops.values()) == len(samples)
        assert list(sidecar.files) == ([f"{sidecar.name}.drops.parquet"] if drops else [])
    assert sidecars[0].drops == {"empty_caption": 1, "exact_duplicate": 1}


def test_duplicates_may_stay(tmp_path):
    write_raw(tmp_path, SHARDS)
    sidecars = curate_all(tmp_path, CurateConfig(duplicates="keep"), [0, 1, 2, 3])
    assert [sidecar.drops for sidecar in sidecars] == [{"empty_caption": 1}, {"no_image": 1}, {}, {}]


def test_the_same_bytes_whatever_the_order(tmp_path):
    outputs = []
    for name, order in (("a", [0, 1, 2, 3]), ("b", [3, 1, 0, 2])):
        write_raw(tmp_path / name, SHARDS)
        curate_all(tmp_path / name, CurateConfig(duplicates="near"), order)
        outputs.append(
            {
                path.relative_to(tmp_path / name): path.read_bytes()
                for stage in ("judge", "curate")
                for path in (tmp_path / name / stage).iterdir()
                if path.suffix != ".json"
            }
        )
    assert outputs[0] == outputs[1] and len(outputs[0]) == 4 + 1 + 4 + 3


def test_a_shard_that_loses_too_much_fails(tmp_path):
    again = [SHARDS[0], {key: sample(0) for key in ("010", "011")}]
    write_raw(tmp_path, again)
    with pytest.raises(ShardError, match=r"2 of 2 samples dropped.*exact_duplicate 2; .*duplicate of 000"):
        curate_all(tmp_path, CurateConfig(), [0, 1])
    assert not (tmp_path / "curate" / "00001.json").exists()
    sidecars = curate_all(tmp_path, CurateConfig(max_drop_fraction=1), [0, 1])
    assert (sidecars[1].samples, sidecars[1].drops) == (0, {"exact_duplicate": 2})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"000": sample(0), "009": sample(1)}, "holds 009 where .* judged 001"),
        ({"000": sample(0)}, "holds no more samples where .* judged 001"),
        ({**SHARDS[0], "004": sample(5)}, "holds 004 where .* judged no more samples"),
    ],
)
def test_samples_that_judge_did_not_see_are_refused(tmp_path, other, message):
    write_raw(tmp_path, SHARDS[:1])
    curate_all(tmp_path, CurateConfig(), [0])
    write_raw(tmp_path, [other])
    folders = [Folder.at(tmp_path / name) for name in ("curate", "ingest", "judge")]
    with pytest.raises(ShardError, match=f"{message}.*re-run the stage 'judge'"):
        CurateWorker(*folders, CurateConfig())(ShardJob("00000", "c"))


def test_without_a_list_of_duplicates_it_does_not_start(tmp_path):
    write_raw(tmp_path, SHARDS)
    curate_all(tmp_path, CurateConfig(), [0, 1, 2, 3])
    (tmp_path / "judge" / DUPLICATES).unlink()
    folders = [Folder.at(tmp_path / name) for name in ("curate", "ingest", "judge")]
    with pytest.raises(ShardError, match="re-run the stage 'judge'"):
        CurateWorker(*folders, CurateConfig())


def test_editing_samples_are_copied_whole_and_compared_as_a_whole(tmp_path):
    first = sample(0, "make it blue") | {"source.png": picture(7), "source2.png": picture(8)}
    shard = {
        "000": first,
        "001": first | {"txt": b"make it green"},
        "002": first | {"source2.png": picture(9)},
        "003": first,
        "004": sample(0, "make it blue"),
        "005": first | {"source.png": b"no image"},
        "006": {extension: data for extension, data in first.items() if extension != "source.png"},
    }
    write_raw(tmp_path, [shard])
    (sidecar,) = curate_all(tmp_path, CurateConfig(max_drop_fraction=1), [0])
    assert listed_drops(tmp_path, "00000") == {
        "003": ("exact_duplicate", "duplicate of 000"),
        "005": ("broken_source", "source.png: [undecodable_image] no known format"),
        "006": ("missing_source", "no source image 1 beside source2.png"),
    }
    kept = dict(read_samples(Folder.at(tmp_path / "curate"), sidecar.file, sidecar))
    assert kept == {key: shard[key] for key in ("000", "001", "002", "004")}
