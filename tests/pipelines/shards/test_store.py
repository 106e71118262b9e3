"""Shards on disk: the same bytes each time, drops listed, nothing left behind, one set of files at a time."""

import pyarrow.parquet as pq
import pytest

from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples, tar_shard
from repfusion.files import atomic_path, canonical_json


def write_shard(folder: Folder, num_samples: int = 5, with_drop: bool = True) -> Sidecar:
    with ShardCommit(folder, "00000", "f" * 64, {"source": "a" * 64}) as commit:
        with tar_shard(commit) as samples:
            for index in range(num_samples):
                samples.write(
                    f"{index:09d}", {"txt": f"caption {index}".encode(), "png": bytes([index]) * 700}
                )
        if with_drop:
            commit.drop("000000009", "http_404", "HTTP Error 404: Not Found")
        commit.write_drops()
        return commit.commit("00000.tar")


def test_a_shard_reads_back_and_its_bytes_are_reproducible(tmp_path):
    a, b = Folder.at(tmp_path / "a"), Folder.at(tmp_path / "b")
    first, second = write_shard(a), write_shard(b)
    for name in (first.file, *first.files):
        assert a.read(name) == b.read(name)
    assert first.sha256 == second.sha256 and first.samples == 5 and first.drops == {"http_404": 1}
    assert read_sidecar(a, "00000") == first
    samples = list(read_samples(a, "00000.tar", first))
    assert [key for key, _ in samples] == [f"{index:09d}" for index in range(5)]
    assert samples[3][1] == {"txt": b"caption 3", "png": bytes([3]) * 700}
    drops = pq.read_table(tmp_path / "a" / "00000.drops.parquet").to_pylist()
    assert drops == [{"key": "000000009", "reason": "http_404", "detail": "HTTP Error 404: Not Found"}]
    names = ["00000.drops.parquet", "00000.json", "00000.tar"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names


def test_a_shard_made_again_takes_the_place_of_the_old_one(tmp_path):
    folder = Folder.at(tmp_path)
    write_shard(folder)
    sidecar = write_shard(folder, num_samples=3, with_drop=False)
    assert sidecar.files == {} and folder.names() == {"00000.json", "00000.tar"}
    assert len(list(read_samples(folder, "00000.tar", sidecar))) == 3


def test_an_exception_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyError),
        ShardCommit(Folder.at(tmp_path), "00000", "f", {}) as commit,
        tar_shard(commit) as samples,
    ):
        samples.write("000000000", {"txt": b"a"})
        raise KeyError("on purpose")
    with pytest.raises(KeyError), atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise KeyError("on purpose")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"{", b'{"name": "00000"}', b"\xff\xfe"])
def test_what_is_no_sidecar_reads_as_none(tmp_path, data):
    assert read_sidecar(Folder.at(tmp_path), "00000") is None
    (tmp_path / "00000.json").write_bytes(data)
    assert read_sidecar(Folder.at(tmp_path), "00000") is None


def test_too_many_drops_fail_with_their_reasons(tmp_path):
    with ShardCommit(Folder.at(tmp_path), "00000", "f", {}) as commit:
        commit.samples = 1
        for key in "abc":
            commit.drop(key, "http_503", "HTTP Error 503")
        commit.check_drops(0.75)
        with pytest.raises(ShardError, match=r"3 of 4 samples dropped.*http_503 3"):
            commit.check_drops(0.5)


def test_canonical_json_refuses_nan():
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_a_drop_may_quote_a_name_that_is_no_text(tmp_path):
    with ShardCommit(Folder.at(tmp_path), "00000", "f", {}) as commit:
        commit.drop("000000000", "no_image", "caf\udce9.png: no image")
        commit.write_drops()
        (drop,) = pq.read_table(commit.staging / "00000.drops.parquet").to_pylist()
    assert drop["detail"] == "caf\\udce9.png: no image"
